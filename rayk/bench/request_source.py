"""Which request is sent next, and when: in order, as they arrive, or as so many users ask, each after the previous turn
of its session."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

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

    def finished(self, index: int, elapsed: float = 0.0) -> None:
        """Request `index` was served: its successor may be sent."""
        self._finished.add(index)
        for successor in self._deferred.pop(index, ()):
            heapq.heappush(self._ready, successor)


class Source(Protocol):
    """Who hands requests out. Times are seconds from the start."""

    @property
    def next_at(self) -> float:
        """When there may be another one, infinite when not before one that was taken has finished."""
        ...

    def take(self, elapsed: float) -> BenchRequest | None:
        """The next one to be sent now."""
        ...

    def finished(self, index: int, elapsed: float) -> None:
        """That one was served, or failed."""
        ...


class Users:
    """So many users at a time: each asks all turns of one session, then of the next one that nobody has. Between an
    answer and the next turn one thinks, for the time between the two arrivals in the workload, times `factor`."""

    def __init__(self, workload: Workload, users: int, factor: float, seed: int) -> None:
        self._requests, self._idle = workload.requests, users
        order, times = arrivals(workload, seed)
        at = dict(zip(order.tolist(), times.tolist(), strict=True))
        self._first = deque(r.index for r in workload.requests if r.after is None)
        self._next: dict[int, list[tuple[float, int]]] = {}  # after a request: what its user asks, having thought
        for each in workload.requests:
            if each.after is not None:
                think = max(0.0, at[each.index] - at[each.after]) * factor
                self._next.setdefault(each.after, []).append((think, each.index))
        self._due: list[tuple[float, int]] = []

    @property
    def next_at(self) -> float:
        """When the next request is sent."""
        if self._first and self._idle:
            return 0.0
        return self._due[0][0] if self._due else math.inf

    def take(self, elapsed: float = math.inf) -> BenchRequest | None:
        """A turn that was thought about long enough, else the first one of a new session."""
        if self._due and self._due[0][0] <= elapsed:
            return self._requests[heapq.heappop(self._due)[1]]
        if not (self._first and self._idle):
            return None
        self._idle -= 1
        return self._requests[self._first.popleft()]

    def finished(self, index: int, elapsed: float) -> None:
        """Its user thinks, or has asked all."""
        turns = self._next.pop(index, [])
        for think, turn in turns:
            heapq.heappush(self._due, (elapsed + think, turn))
        self._idle += 1 - len(turns)
