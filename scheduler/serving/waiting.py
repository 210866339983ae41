"""Requests of a Cluster that wait for a place, in the order in which they are placed without an admission policy.

First those that had a place and lost it. Then one of each driver in turn, and of a driver one of each of its calls, so
that neither a driver that asks much nor a call of a million prompts holds up the others; within a call, as they came.
No operation looks at all that wait.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque

from rayk.scheduler.serving.requests import ServedRequest

_Calls = OrderedDict[int, deque[ServedRequest]]  # by call; the next one to take from first


class Waiting:
    """The scheduler's, in its turn."""

    def __init__(self) -> None:
        self._again: deque[ServedRequest] = deque()
        self._drivers: OrderedDict[int, _Calls] = OrderedDict()  # by driver; likewise
        self._there: dict[int, ServedRequest] = {}  # by ticket: what is in neither waits no more
        self._deadlines: list[tuple[float, int]] = []  # a heap of those with a timeout; may hold others

    def __len__(self) -> int:
        return len(self._there)

    def add(self, request: ServedRequest) -> None:
        """A new request, behind those of its call."""
        self.enter(request)
        calls = self._drivers.get(request.driver)
        if calls is None:
            calls = self._drivers[request.driver] = OrderedDict()
        queue = calls.get(request.want.call)
        if queue is None:
            queue = calls[request.want.call] = deque()
        queue.append(request)

    def put_back(self, request: ServedRequest) -> None:
        """It lost its place: before all others."""
        self.enter(request)
        self._again.appendleft(request)

    def enter(self, request: ServedRequest) -> None:
        """It waits, whoever says when its turn is."""
        self._there[request.want.ticket] = request
        if request.late_at is not None:
            heapq.heappush(self._deadlines, (request.late_at, request.want.ticket))

    @property
    def requests(self) -> list[ServedRequest]:
        """All that wait."""
        return list(self._there.values())

    def first(self) -> ServedRequest | None:
        """Who is next, or None."""
        there = self._there
        while self._again:
            if self._again[0].want.ticket in there:
                return self._again[0]
            self._again.popleft()
        while self._drivers:
            driver, calls = next(iter(self._drivers.items()))
            while calls:
                call, queue = next(iter(calls.items()))
                while queue and queue[0].want.ticket not in there:
                    queue.popleft()
                if queue:
                    return queue[0]
                del calls[call]
            del self._drivers[driver]
        return None

    def take(self, request: ServedRequest) -> None:
        """It waits no more; where it was first(), it is the turn of the next driver, and of its next call."""
        del self._there[request.want.ticket]
        if self._again and self._again[0] is request:
            self._again.popleft()
            return
        calls = self._drivers.get(request.driver)
        queue = calls.get(request.want.call) if calls is not None else None
        if calls is not None and queue and queue[0] is request:
            queue.popleft()
            calls.move_to_end(request.want.call)
            self._drivers.move_to_end(request.driver)

    def remove(self, ticket: int) -> None:
        """It does not wait any more; one that did not is ignored."""
        self._there.pop(ticket, None)

    def late(self, now: float) -> list[ServedRequest]:
        """Take out those whose time is up."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, ticket = heapq.heappop(self._deadlines)
            request = self._there.pop(ticket, None)
            if request is not None:
                found.append(request)
        return found

    def clear(self) -> None:
        """Nobody waits any more."""
        self._again.clear()
        self._drivers.clear()
        self._there.clear()
        self._deadlines.clear()
