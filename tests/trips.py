"""How far a call travels through the code: product files entered, and changes of file, on each runtime.

    python tests/trips.py

A profile hook follows the calls of one manager over actors in this process (tests/unit/actors/fake.py, without what it
decodes to write down what was said), over cores, and of a Cluster. A change of file is a call or a return that goes
from one product file to another. A manager's figures are the same in every run; those of a Cluster, whose threads wait
for each other, differ by a few. They show whether a change made a way shorter or longer.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rayk import Cluster, InferenceSession, PagedKVCacheManager, TextContext, Tick  # noqa: E402  # needs the path
from tests.unit.actors.fake import FakeRuntime, content, params, session_on, stamp  # noqa: E402  # needs the path
from tests.unit.engine.fake import PageModel  # noqa: E402  # needs the path

PRODUCT = tuple(str(ROOT / part) + os.sep for part in ("rayk", "actors", "scheduler"))


class Trip:
    """Files entered and changes of file while it is followed."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.changes = 0
        self._at = ""
        self._looking = False  # the fake reads a message

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """The profile hook."""
        if frame.f_code is content.__code__:
            self._looking = event != "return"
        if self._looking or event not in ("call", "return"):
            return
        where = frame if event == "call" else frame.f_back
        file = os.path.realpath(where.f_code.co_filename) if where is not None else ""
        if file.startswith(PRODUCT) and file != self._at:
            self.files.add(file)
            self.changes += 1
            self._at = file

    def __str__(self) -> str:
        return f"{len(self.files)}/{self.changes}"


def follow(call: Callable[[], Any]) -> Trip:
    """The trip of a call in this thread."""
    trip = Trip()
    sys.setprofile(trip)
    try:
        call()
    finally:
        sys.setprofile(None)
    return trip


@contextmanager
def manager_on(kind: str) -> Iterator[PagedKVCacheManager]:
    """Two replicas that copy prefixes from each other."""
    with session_on(FakeRuntime()) if kind == "ray" else InferenceSession() as session:
        manager = PagedKVCacheManager(params(2), session, 64, max_batch_size=8, replace=False)
        yield manager
        manager.shutdown()


def trips(kind: str) -> dict[str, Trip]:
    """A request's life, each call once before it is followed, so that what is done only once does not count."""
    found: dict[str, Trip] = {}
    with manager_on(kind) as m:
        for name in ("first", "again"):
            ctx = TextContext(name, [*range(40), len(name)], 200)
            found["claim"] = follow(lambda name=name: m.claim(name, 0))
            found["alloc, prefill"] = follow(lambda ctx=ctx: m.alloc(ctx, 0))
            m.execute([[ctx], []], stamp)
            ctx.update(1)
            found["step"] = follow(lambda ctx=ctx: m.step([[ctx], []]))
            tick = Tick(alloc=[ctx], execute=[ctx])
            found["tick"] = follow(lambda tick=tick: m.tick([tick, Tick()], stamp))
            found["release"] = follow(lambda name=name: m.release(name, 0))
            other = TextContext(f"{name} elsewhere", [*range(40 if name == "again" else 8), 99], 200)
            found["try_admit with a copy"] = follow(lambda other=other: m.try_admit([other], [1]))
    return found


def generate() -> Trip:
    """Cluster.generate() of 20 + 4 tokens in one process, with what its engine's and its reader's threads do for it."""
    threads: list[Trip] = []
    counting = False

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        """The first event of a thread: it is followed from here on."""
        threads.append(Trip())
        sys.setprofile(partial(threads_hook, threads[-1]))

    def threads_hook(trip: Trip, *what: Any) -> None:
        if counting:
            trip(*what)

    threading.setprofile(hook)
    try:
        with Cluster(lambda device: PageModel(), page_size=4, pages=64, device="cpu") as cluster:
            cluster.generate([list(range(20))], max_new_tokens=4)
            counting = True
            whole = follow(lambda: cluster.generate([list(range(30, 50))], max_new_tokens=4))
            counting = False
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]  # what takes a hook away
    for trip in threads:
        whole.files |= trip.files
        whole.changes += trip.changes
    return whole


def main() -> None:
    """Print the table."""
    ray, inline = trips("ray"), trips("inline")
    print(f"{'files entered/changes of file':32}{'ray':>12}{'inline':>12}")
    for name in ray:
        print(f"{name:32}{ray[name]!s:>12}{inline[name]!s:>12}")
    print(f"{'Cluster.generate, 20 + 4 tokens':32}{'':12}{generate()!s:>12}")


if __name__ == "__main__":
    main()
