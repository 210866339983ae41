"""Tiers of small pages, and other processes that use them and die."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayk.tiers.directory import Directory
from rayk.tiers.segment import Segment

SHARED = Path("/dev/shm")
PRELUDE = """
import hashlib, os, signal
from pathlib import Path
key = lambda n: hashlib.sha256(b"%d" % n).digest()
keys = lambda *numbers: [key(n) for n in numbers]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed() -> Callable[[str], None]:
    """Runs code in a process of its own, which must end by SIGKILL. It knows key(n), keys(n, ..) and die()."""

    def run(code: str) -> None:
        done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=60)
        assert done.returncode == -9, done.stderr

    return run


@pytest.fixture
def shm() -> Iterator[Path]:
    """A name in shared memory that is gone afterwards."""
    path = SHARED / f"rayk-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def directory() -> Iterator[Callable[..., Directory]]:
    """Makes a Directory of some slots, at a path (shared) or private."""
    segments = []

    def make(slots: int, path: Path | None = None) -> Directory:
        segments.append(Segment.attach(path, Directory.num_bytes(slots), slots, lambda _: None))
        return Directory(segments[-1], slots)

    yield make
    for segment in segments:
        segment.close()
