"""Which length and batch size fit: found by searching on what fits, and tried again before they are said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rayk.memory.budget import cache_bytes, pages_in
from rayk.params import KVCacheParams


def last_that_fits(fits: Callable[[int], bool], upper: int) -> int | None:
    """The largest n in 1..upper with fits(n), where fits is true up to some n and false beyond; None if never."""
    if upper < 1 or not fits(1):
        return None
    low, high = 1, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Room:
    """What a KV cache may take, in bytes over all replicas: the `budget` of the utilization, and what is `left`.

    `left` is free memory less everything else. A budget beyond it (a utilization above 1) is what makes settings fail.
    """

    params: KVCacheParams
    budget: int
    left: int

    def fits(self, batch: int, length: int) -> bool:
        """Whether the cache of `batch` requests of `length` tokens per replica is within the memory that is there."""
        return pages_in(self.params, self.budget) >= 1 and self.size(batch, length) <= self.left

    def size(self, batch: int, length: int) -> int:
        """Bytes that the cache would take."""
        return cache_bytes(self.params, self.budget, batch, length)

    def longest(self, batch: int, upper: int) -> int | None:
        """The largest maximal length up to `upper` that fits with that batch."""
        return last_that_fits(lambda length: self.fits(batch, length), upper)

    def largest_batch(self, length: int, upper: int) -> int | None:
        """The largest batch up to `upper` that fits with that length."""
        return last_that_fits(lambda batch: self.fits(batch, length), upper)

    def suggestions(self, batch: int, length: int, length_is_set: bool) -> list[dict[str, int]]:
        """Settings below `batch` and `length` that fit; a default length is lowered unasked, so not suggested."""
        found = []
        shorter = self.longest(batch, length) if length_is_set else None
        if shorter is not None:
            found.append({"max_length": shorter})
        fewer = self.largest_batch(length, batch)
        if fewer is not None:
            found.append({"max_batch_size": fewer})
        if not found:
            fewer = self.largest_batch(1, batch)
            shorter = None if fewer is None else self.longest(fewer, length)
            if fewer is not None and shorter is not None:
                found.append({"max_length": shorter, "max_batch_size": fewer})
        return [s for s in found if self.fits(s.get("max_batch_size", batch), s.get("max_length", length))]
