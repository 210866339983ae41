"""Which request is sent next: in the workload's order, each after the previous turn of its session has finished."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from rayk.bench.request import BenchRequest


class Feed:
    """Hands out requests. A request whose predecessor has not finished is passed over until it has."""

    def __init__(self, requests: Sequence[BenchRequest]) -> None:
        self._requests = requests
        self._next = 0
        self._finished: set[int] = set()
        self._deferred: dict[int, list[int]] = {}
        self._ready: list[int] = []

    def take(self) -> BenchRequest | None:
        """The next request that may be sent now, or None when there is none (yet)."""
        if self._ready:
            return self._requests[heapq.heappop(self._ready)]
        while self._next < len(self._requests):
            request = self._requests[self._next]
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
