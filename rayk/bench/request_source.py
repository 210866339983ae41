"""Which request is sent next, and when: in order or as they arrive, each after the previous turn of its session."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from rayk.workloads.arrivals import arrivals
from rayk.workloads.request import BenchRequest, Workload


class Arrivals:
    """When the requests of a workload are sent, so many times as fast as recorded, at the moments at which
    `rayk simulate` has them: their order, and the seconds from the start of the run in that order."""

    def __init__(self, workload: Workload, speed: float, seed: int) -> None:
        order, times = arrivals(workload, seed)
        self.order: list[int] = order.tolist()
        self.times: list[float] = (times / speed).tolist()


class Feed:
    """Hands out requests: in the workload's order, or as they arrive.

    A request whose predecessor has not finished is passed over until it has.
    """

    def __init__(self, requests: Sequence[BenchRequest], arrivals: Arrivals | None = None) -> None:
        self._requests = requests
        self._order: Sequence[int] = range(len(requests)) if arrivals is None else arrivals.order
        self._times = None if arrivals is None else arrivals.times
        self._next = 0
        self._finished: set[int] = set()
        self._deferred: dict[int, list[int]] = {}
        self._ready: list[int] = []

    @property
    def next_at(self) -> float:
        """When the next request arrives, in seconds from the start; infinite after the last."""
        if self._next == len(self._order):
            return math.inf
        return 0.0 if self._times is None else self._times[self._next]

    def take(self, elapsed: float = math.inf) -> BenchRequest | None:
        """The next request that may be sent `elapsed` seconds after the start, or None when there is none (yet)."""
        if self._ready:
            return self._requests[heapq.heappop(self._ready)]
        while self._next < len(self._order) and self.next_at <= elapsed:
            request = self._requests[self._order[self._next]]
            self._next += 1
            if request.after is None or request.after in self._finished:
                return request
            self._deferred.setdefault(request.after, []).append(request.index)
        return None

    def finished(self, index: int) -> None:
        """Request `index` was served: its successor may be sent."""
        self._finished.add(index)
        for successor in self._deferred.pop(index, ()):
            heapq.heappush(self._ready, successor)
