"""Requests of a Cluster that wait in the driver, in the order in which they are placed without an admission policy.

First those that had a place and lost it. Then one of each call in turn, so that a call of a million prompts does not
hold up the next one; within a call, as they came. No operation looks at all that wait.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque

from rayk.dispatch.output import Handle


class Waiting:
    """The dispatcher's, under its lock."""

    def __init__(self) -> None:
        self._again: deque[Handle] = deque()
        self._calls: OrderedDict[int, deque[Handle]] = OrderedDict()  # by call; the next one to take from first
        self._there: dict[int, Handle] = {}  # by number: what is in neither waits no more
        self._deadlines: list[tuple[float, int]] = []  # a heap of those with a timeout; may hold others

    def __len__(self) -> int:
        return len(self._there)

    def add(self, handle: Handle) -> None:
        """A new request, behind those of its call."""
        self.enter(handle)
        queue = self._calls.get(handle.call)
        if queue is None:
            queue = self._calls[handle.call] = deque()
        queue.append(handle)

    def put_back(self, handle: Handle) -> None:
        """It lost its place: before all others."""
        self.enter(handle)
        self._again.appendleft(handle)

    def enter(self, handle: Handle) -> None:
        """It waits, whoever says when its turn is."""
        self._there[handle.number] = handle
        if handle.timeout is not None:
            heapq.heappush(self._deadlines, (handle.submitted_at + handle.timeout, handle.number))

    @property
    def handles(self) -> list[Handle]:
        """All that wait."""
        return list(self._there.values())

    def first(self) -> Handle | None:
        """Who is next, or None."""
        while self._again:
            if self._again[0].number in self._there:
                return self._again[0]
            self._again.popleft()
        while self._calls:
            call, queue = next(iter(self._calls.items()))
            while queue and queue[0].number not in self._there:
                queue.popleft()
            if queue:
                return queue[0]
            del self._calls[call]
        return None

    def take(self, handle: Handle) -> None:
        """It waits no more; where it was first(), it is the next call's turn."""
        del self._there[handle.number]
        if self._again and self._again[0] is handle:
            self._again.popleft()
        elif (queue := self._calls.get(handle.call)) and queue[0] is handle:
            queue.popleft()
            self._calls.move_to_end(handle.call)

    def remove(self, handle: Handle) -> None:
        """It does not wait any more; one that did not is ignored."""
        self._there.pop(handle.number, None)

    def late(self, now: float) -> list[Handle]:
        """Take out those whose time is up."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            handle = self._there.pop(number, None)
            if handle is not None:
                found.append(handle)
        return found

    def clear(self) -> None:
        """Nobody waits any more."""
        self._again.clear()
        self._calls.clear()
        self._there.clear()
        self._deadlines.clear()
