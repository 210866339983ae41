"""A histogram that costs an append where something is timed, and is counted when somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AT_ONCE = 1024  # appended before they are counted anyway


class Histogram:
    """Durations in seconds by upper bound: `counts[i]` of at most `bounds[i]`, the last ones above all bounds, and
    `sums` of each. One thread adds at a time; a reader has to be that one, or keep it out."""

    __slots__ = ("_new", "bounds", "counts", "sums")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sums = [0.0] * (len(bounds) + 1)
        self._new: list[float] = []

    def add(self, *seconds: float) -> None:
        """So long it took; nothing for 0, which is what was not done."""
        self._new += seconds
        if len(self._new) > AT_ONCE:
            self._count()

    def _count(self) -> None:
        values = np.array(self._new)
        self._new = []
        values = values[values > 0]
        places = np.searchsorted(self.bounds, values)
        size = len(self.counts)
        self.counts = (np.bincount(places, minlength=size) + self.counts).tolist()
        self.sums = (np.bincount(places, values, minlength=size) + self.sums).tolist()

    def read(self) -> Histogram:
        """A copy as of now."""
        if self._new:
            self._count()
        copy = Histogram(self.bounds)
        copy.counts, copy.sums = list(self.counts), list(self.sums)
        return copy

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.counts)

    @property
    def total(self) -> float:
        """Seconds together."""
        return sum(self.sums)

    def quantile(self, share: float) -> float | None:
        """Below which that share of all lies, taken as spread evenly in each bucket; None for none."""
        left = share * self.count
        if not self.count:
            return None
        for at, count in enumerate(self.counts):
            if count and left <= count:
                low = self.bounds[at - 1] if at else 0.0
                high = self.bounds[at] if at < len(self.bounds) else self.sums[at] / count
                return low + (high - low) * left / count
            left -= count
        return self.bounds[-1]

    def plus(self, other: Histogram) -> Histogram:
        """Both together; the bounds are the same."""
        copy = self.read()
        copy.counts = [a + b for a, b in zip(copy.counts, other.counts, strict=True)]
        copy.sums = [a + b for a, b in zip(copy.sums, other.sums, strict=True)]
        return copy
