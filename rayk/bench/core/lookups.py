"""W5: which replica holds the most of a request, and how much each of them holds, in an index of a million entries.

All replicas hold one prefix of 64 pages. A request of 256 pages goes on with 192 that one replica holds.
"""

from __future__ import annotations

from functools import cached_property
from itertools import cycle, islice
from time import thread_time_ns
from typing import TYPE_CHECKING

import numpy as np

from rayk.bench.core.case import Sample

if TYPE_CHECKING:
    from rayk.scheduler.router.prefix_index import PrefixIndex

ENTRIES = 1_000_000
SHARED, OWN = 64, 192  # pages of a request
FLEETS = (8, 32, 64)
QUERIES = 1000
FEW, ALL = 100, 5000  # different requests: their entries stay in the processor's caches, or do not


class Indexed:
    """An index of `entries` entries over `replicas` replicas, made when first asked for, and the requests in it."""

    def __init__(self, replicas: int, entries: int = ENTRIES) -> None:
        self._replicas, self._entries = replicas, entries
        self.requests: list[list[int]] = []

    @cached_property
    def index(self) -> PrefixIndex:
        """The index; `requests` are there once it is."""
        from rayk.scheduler.router.prefix_index import PrefixIndex

        index, random = PrefixIndex(self._replicas), np.random.default_rng(0)
        shared = random.integers(0, 1 << 63, SHARED).tolist()
        for replica in range(self._replicas):
            index.stored(replica, shared)
        for number in range((self._entries - len(index)) // OWN):
            own = random.integers(0, 1 << 63, OWN).tolist()
            index.stored(number % self._replicas, own)
            self.requests.append(shared + own)
        return index


class Lookups:
    """`distinct` requests in turns: the best replica of each, or with `scores` what each replica holds of it."""

    def __init__(self, indexed: Indexed, scores: bool, distinct: int) -> None:
        self._indexed, self._scores, self._distinct = indexed, scores, distinct

    def run(self, lap_ns: float) -> Sample:
        index = self._indexed.index
        look = index.reach if self._scores else index.best
        distinct = self._indexed.requests[: self._distinct]
        requests = list(islice(cycle(distinct), max(QUERIES, len(distinct))))

        def work() -> float:
            start = thread_time_ns()
            for keys in requests:
                look(keys)
            return (thread_time_ns() - start) / len(requests) / 1e3

        return Sample(work)
