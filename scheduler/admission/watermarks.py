"""Which replicas may be given one more request: the marks of an AdmissionPolicy, held by each replica for itself.

A page is in use when a request or a transfer holds it; shared ones count once, as the replica itself counts. What it
said last is what is known, from whichever driver heard it: each report bears a number of the replica's, and the
highest wins. Pages are promised from the moment that a request is placed until the replica has answered for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.router.replica_loads import BoolArray, Int64Array, ReplicaLoads


class Watermarks:
    """`loads` says which replicas there are, how many tokens their pages hold, and how busy they are."""

    def __init__(self, policy: AdmissionPolicy, loads: ReplicaLoads, page_size: int) -> None:
        self._policy = policy
        self._loads = loads
        self._page_size = page_size
        self._used: Int64Array = np.zeros(0, np.int64)
        self._promised: Int64Array = np.zeros(0, np.int64)
        self._turns: Int64Array = np.zeros(0, np.int64)  # numbers of the reports
        self._closed: BoolArray = np.zeros(0, np.bool_)  # above the high mark, and not yet down to the low one
        self._grow()

    def _grow(self) -> None:
        """Replicas that joined the loads have nothing in use."""
        new = len(self._loads) - len(self._used)
        if new:
            self._used, self._promised, self._turns = (
                np.append(array, np.zeros(new, np.int64)) for array in (self._used, self._promised, self._turns)
            )
            self._closed = np.append(self._closed, np.zeros(new, np.bool_))

    def report(self, replica: int, turn: int, used: int) -> None:
        """A replica had `used` pages in use when it answered for the `turn`-th time."""
        self._grow()
        if replica < len(self._used) and turn > self._turns[replica]:
            self._turns[replica], self._used[replica] = turn, used

    def reports(self, turns: Sequence[int], used: Sequence[int]) -> None:
        """What a driver heard last of each replica; 0 of one that it did not hear of."""
        for replica, (turn, pages) in enumerate(zip(turns, used, strict=False)):
            self.report(replica, turn, pages)

    def promise(self, replica: int, pages: int) -> None:
        """A request of so many pages goes there."""
        self._grow()
        self._promised[replica] += pages

    def settle_promise(self, replica: int, pages: int) -> None:
        """The replica has answered for it: what it said counts."""
        self._promised[replica] = max(0, self._promised[replica] - pages)

    def forget(self, replica: int) -> None:
        """The replica is gone, or another one took its place: nothing is in use there."""
        self._grow()
        self._used[replica] = self._promised[replica] = 0
        self._closed[replica] = False

    @property
    def most(self) -> int:
        """Pages that one request may have, on the replica that has most of them."""
        loads = self._loads
        here = loads.ready | loads.away
        return int(self._policy.high * (loads.capacity[here] // self._page_size).max(initial=0))

    def open(self, pages: int) -> BoolArray:
        """Whether each replica would take a request of so many pages now, [replicas]."""
        self._grow()
        policy, loads = self._policy, self._loads
        capacity, level = loads.capacity // self._page_size, self._used + self._promised
        over = level + pages > policy.high * capacity
        self._closed = (self._closed | over) & (level > policy.low * capacity)
        open_ = loads.ready & ~over & ~self._closed
        if policy.max_running is not None:
            open_ &= loads.requests < policy.max_running
        if policy.max_unfilled is not None:
            open_ &= loads.prefill_backlog < policy.max_unfilled
        return open_

    def fits(self, pages: int) -> bool:
        """Whether any replica would."""
        return bool(self.open(pages).any())

    @property
    def pages_committed(self) -> list[int]:
        """Pages of each replica that are in use or promised."""
        self._grow()
        return [int(pages) for pages in self._used + self._promised]
