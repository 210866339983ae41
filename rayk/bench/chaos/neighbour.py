"""Another driver of the cluster that is measured, in a process of its own, which is there to be killed.

    python -m rayk.bench.chaos.neighbour ADDRESS NAME < settings.json

It attaches, and always has some requests: of a manager claims with pages, of a Cluster streams. It says "up" once it
has; it ends when its standard input does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import msgspec

from rayk.bench.settings import BenchSettings
from rayk.context import TextContext
from rayk.errors import RaykError
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession

REQUESTS = 4  # at a time
TOKENS = 24  # of each prompt
TURN_SECONDS = 0.2


class Neighbour:
    """The process, as the benchmark sees it."""

    def __init__(self, settings: BenchSettings, address: str, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, address, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.up = threading.Event()
        """Whether it has requests."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(settings) + b"\n")
        self._process.stdin.flush()
        threading.Thread(target=self._read, name="rayk-neighbour", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == b"up\n":
                self.up.set()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def kill(self) -> None:
        """As kill -9 does."""
        self._process.kill()
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            with suppress(OSError):
                end.close()


def main() -> None:
    """The process; see the module."""
    address, name = sys.argv[1:3]
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=BenchSettings)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    session = InferenceSession("ray", address, name, log_to_driver=False)
    if settings.forward == "hf":
        _stream(session)
    else:
        _claim(session, settings)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _claim(session: InferenceSession, settings: BenchSettings) -> None:
    options = settings.manager_options()
    manager = PagedKVCacheManager(settings.params(), session, settings.pages, settings.host_pages, **options)
    for turn in count():
        contexts = [
            TextContext(f"neighbour-{os.getpid()}-{turn}-{i}", range(i, i + TOKENS), 2 * TOKENS)
            for i in range(REQUESTS)
        ]
        with _whatever_befalls():
            for context, admission in zip(contexts, manager.try_admit(contexts), strict=True):
                if admission.error is None:
                    sys.stdout.write("up\n")
                    sys.stdout.flush()
                    time.sleep(TURN_SECONDS)
                    manager.release(context.request_id, admission.replica)


def _stream(session: InferenceSession) -> None:
    from rayk.cluster import Cluster

    cluster = Cluster.attached(session)
    for turn in count():
        prompts = [{"id": f"n{turn}-{i}", "tokens": [i + 3] * TOKENS} for i in range(REQUESTS)]
        with _whatever_befalls():
            for update in cluster.stream(prompts, max_new_tokens=TOKENS, ignore_eos=True):
                if update.tokens:
                    sys.stdout.write("up\n")
                    sys.stdout.flush()


@contextmanager
def _whatever_befalls() -> Iterator[None]:
    """It lives in the same faults as everybody, and goes on."""
    try:
        yield
    except RaykError:
        time.sleep(TURN_SECONDS)


if __name__ == "__main__":
    main()
