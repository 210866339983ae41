"""What the scheduler knows of how busy each replica is, as arrays over the replicas, so that a choice among a
thousand costs about as much as one among ten.

It is exact and local: a request counts from the moment it is placed, so that a burst does not herd onto one replica.
Tokens to prefill go down by themselves where the prefill rate is known (`advance`), otherwise when the scheduler is
told (`prefilled`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_COLUMNS, _CAPACITY, _COMPUTED = 5, 3, 4


class ReplicaLoads:
    """Loads of `replicas` replicas, all [replicas]; read them, change them by the methods only.

    `rate`: tokens a second that each replica prefills, None where that is not known. `capacity`: tokens that a
    replica's pages hold, None where there is no limit.
    """

    def __init__(self, replicas: int, rate: float | None = None, capacity: int | None = None) -> None:
        self.rate = rate
        self.prefill_backlog: FloatArray
        """Tokens of placed requests that are still to be prefilled."""
        self.requests: Int64Array
        """Requests that are placed."""
        self.held: Int64Array
        """Tokens of placed requests; their pages cannot be evicted."""
        self.capacity: Int64Array
        """Tokens that the pages hold."""
        self.computed: Int64Array
        """Tokens that were ever placed to be prefilled; settles ties, so that the idle share what comes."""
        self._hold(np.zeros((_COLUMNS, 0), np.int64))
        self.ready: BoolArray = np.zeros(0, np.bool_)
        """Whether requests may be placed there."""
        self.away: BoolArray = np.zeros(0, np.bool_)
        """Whether it does not answer, and may come back."""
        self._all_ready = True
        self._now = 0.0
        self.join(replicas, capacity)

    def __len__(self) -> int:
        return len(self.prefill_backlog)

    def join(self, replicas: int = 1, capacity: int | None = None) -> None:
        """Add idle replicas; they get the next indices."""
        least = int(self.computed.min()) if len(self) else 0  # or the new ones would win every tie for long
        block = np.zeros((_COLUMNS, len(self) + replicas), np.int64)
        block[:, : len(self)] = self._block
        block[_CAPACITY, len(self) :] = 1 << 62 if capacity is None else capacity
        block[_COMPUTED, len(self) :] = least
        self.ready = np.append(self.ready, np.ones(replicas, np.bool_))
        self.away = np.append(self.away, np.zeros(replicas, np.bool_))
        self._hold(block)

    def _hold(self, block: Int64Array) -> None:
        """Have the columns in one block: [columns, replicas] int64, the backlog float64."""
        self._block, self._spare = block, -1
        self.prefill_backlog = block[0].view(np.float64)
        self.requests, self.held, self.capacity, self.computed = block[1:]
        # The same numbers, quicker to get at one by one.
        self._backlog, self._requests, self._held = self.prefill_backlog.data, self.requests.data, self.held.data
        self._capacity, self._computed = self.capacity.data, self.computed.data
        self._counted, replicas = block[:_COMPUTED], block.shape[1]
        self.numbers = struct.Struct(f"{replicas}d{3 * replicas}q").unpack
        """A snapshot() as Python numbers: of all replicas the backlog, then requests, held and capacity."""

    def set_ready(self, replica: int, ready: bool) -> None:
        """Let requests be placed on a replica, or (draining, lost) not any more."""
        self.ready[replica] = ready
        self._all_ready = bool(self.ready.all())

    @contextmanager
    def only(self, open_: BoolArray) -> Iterator[None]:
        """In a `with` block, none but those of the ready replicas is ready; [replicas]."""
        ready, all_ready = self.ready, self._all_ready
        self.ready, self._all_ready = ready & open_, all_ready and bool(open_.all())
        try:
            yield
        finally:
            self.ready, self._all_ready = ready, all_ready

    def renew(self, replica: int, capacity: int) -> None:
        """Another replica, idle and with pages for `capacity` tokens, is at that index now."""
        self.forget(replica)
        self.resize(replica, capacity)
        others = self.computed[self.ready]
        self.computed[replica] = others.min() if len(others) else 0

    def resize(self, replica: int, capacity: int) -> None:
        """The replica's pages hold `capacity` tokens from now on."""
        self.capacity[replica], self._spare = capacity, -1

    def forget(self, replica: int) -> None:
        """Nothing is placed on the replica any more: it was lost, or started anew."""
        self.prefill_backlog[replica] = self.requests[replica] = self.held[replica] = 0
        self.away[replica] = False

    def advance(self, now: float) -> None:
        """It is `now` (seconds, never less than before): what was prefilled meanwhile is done."""
        if self.rate is not None and now > self._now:
            self.prefill_backlog -= self.rate * (now - self._now)
            np.maximum(self.prefill_backlog, 0.0, out=self.prefill_backlog)
        self._now = max(now, self._now)

    def place(self, replica: int, compute: int, tokens: int) -> None:
        """A request of `tokens` tokens was placed, `compute` of which have to be prefilled."""
        self._backlog[replica] += compute
        self._computed[replica] += compute
        self._requests[replica] += 1
        self._held[replica] += tokens
        self._spare -= tokens

    def set_backlog(self, replica: int, tokens: int) -> None:
        """So many tokens are still to be prefilled there, by the replica's own account."""
        self.prefill_backlog[replica] = tokens

    def prefilled(self, replica: int, compute: int) -> None:
        """`compute` tokens of what was placed are done, or will never be."""
        self.prefill_backlog[replica] = max(0.0, self.prefill_backlog[replica] - compute)

    def release(self, replica: int, tokens: int) -> None:
        """A request of `tokens` tokens left."""
        self._requests[replica] -= 1
        self._held[replica] -= tokens

    def fits_everywhere(self, tokens: int) -> bool:
        """Whether every replica has room for `tokens` tokens, the ready ones and the others."""
        if tokens > self._spare:  # at most what the fullest has left; exact again when that does not do any more
            self._spare = int((self.capacity - self.held).min())
        return tokens <= self._spare

    def fits(self, replica: int, tokens: int) -> bool:
        """Whether the replica's pages have room for `tokens` tokens beside what is placed there."""
        return self._held[replica] + tokens <= self._capacity[replica]

    def limit(self, replica: int) -> int:
        """`capacity` of one replica."""
        return self._capacity[replica]

    def snapshot(self) -> bytes:
        """How backlog, requests, held and capacity are now, for from_snapshot()."""
        return self._counted.tobytes()

    @staticmethod
    def from_snapshot(snapshot: bytes) -> tuple[FloatArray, Int64Array, Int64Array, Int64Array]:
        """Backlog, requests, held and capacity as they were, [replicas] each, read-only."""
        columns = np.frombuffer(snapshot, np.int64).reshape(_COMPUTED, -1)
        return columns[0].view(np.float64), columns[1], columns[2], columns[3]

    def lowest(self, costs: FloatArray, fair: bool = True) -> int:
        """The ready replica of the lowest cost, -1 when none is ready. Of equals, if `fair`, the one that has computed
        least so far, then the one of the lowest index."""
        if not self._all_ready:
            if not self.ready.any():
                return -1
            costs = np.where(self.ready, costs, np.inf)
        best = int(costs.argmin())
        if fair:
            equal = np.flatnonzero(costs == costs[best])
            if len(equal) > 1:
                best = int(equal[self.computed[equal].argmin()])
        return best

    def cheapest(self, costs: list[float]) -> int:
        """lowest() where the costs are few numbers in a list."""
        if not self._all_ready:
            if not self.ready.any():
                return -1
            costs = [cost if ready else math.inf for cost, ready in zip(costs, self.ready.tolist(), strict=True)]
        least = min(costs)
        best = costs.index(least)
        if costs.count(least) > 1:
            computed = self._computed
            for r in range(best + 1, len(costs)):
                if costs[r] == least and computed[r] < computed[best]:
                    best = r
        return best
