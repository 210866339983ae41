"""How the core is timed: CPU time of the calling thread, without garbage collection, beside a unit of the machine.

The *unit* is the CPU time of hashing 64 pages of 64 bytes with one streaming sha256 and a digest at each page: a piece
of work in C that any page-wise hashing needs, and that grows with a machine's clock as the rest does. It is sampled
between the runs, so that a figure and its unit saw the same load. `REFERENCE_US` is the unit of the machine that the
limits were set on; figure x REFERENCE_US / unit is the figure that it would have had there.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import thread_time_ns

REFERENCE_US = 27.6
PAGES, PAGE_BYTES = 64, 64
_PER_SAMPLE = 20


class Unit:
    """Samples of the unit; `us` is their median in microseconds."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._pages = [bytes([page]) * PAGE_BYTES for page in range(PAGES)]
        self._hash()

    def sample(self) -> None:
        """Measure once more."""
        start = thread_time_ns()
        for _ in range(_PER_SAMPLE):
            self._hash()
        self.samples.append((thread_time_ns() - start) / _PER_SAMPLE / 1e3)

    @property
    def us(self) -> float:
        return median(self.samples)

    @property
    def speed(self) -> float:
        """This machine's unit over the reference's: less than 1 is faster."""
        return self.us / REFERENCE_US

    def _hash(self) -> None:
        stream = hashlib.sha256()
        for page in self._pages:
            stream.update(page)
            stream.copy().digest()


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside, and what exists already is left out of the next one."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def lap_ns() -> float:
    """What one pair of clock readings adds to the time between them, median of many."""
    laps = []
    for _ in range(2000):
        start = thread_time_ns()
        laps.append(thread_time_ns() - start)
    return median(laps)
