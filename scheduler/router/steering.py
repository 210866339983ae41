"""Where a Cluster's requests go: a routing policy over the loads that it placed itself and the pages that engines
report. Exact and local, as the scheduler's own: a request counts from the moment that it is placed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rayk.context import IntArray
from rayk.kvcache.page_hash import PageHasher
from rayk.scheduler.router.cost import Cost
from rayk.scheduler.router.policies import make_policy
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.prefix_index import PrefixIndex
from rayk.scheduler.router.replica_loads import ReplicaLoads
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.indexed_copies import CopyPlanner
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers


class Placed(NamedTuple):
    """One request's place: what it holds there, what is to be computed of it, and pages that only it promises."""

    replica: int
    tokens: int
    compute: int
    promised: Sequence[int]
    spans: Sequence[Span] = ()


class Steering:
    """`limit`: requests that a replica is given at a time. `capacities[r]`: tokens that its pages hold. `hasher`: that
    of the engines, where they report their pages."""

    def __init__(
        self, router: str, page_size: int, capacities: Sequence[int], limit: int, hasher: PageHasher | None
    ) -> None:
        replicas = len(capacities)
        self._index, self._fleet = PrefixIndex(replicas), ReplicaLoads(0)
        for capacity in capacities:
            self._fleet.join(1, capacity)
        self._policy = make_policy(router, self._index, page_size)
        self._page_size = page_size
        self._limit = limit
        self._hasher = hasher
        # Only the cost policy weighs running requests for themselves; for the others all that was placed is load,
        # or fast prefills would leave every replica idle and the first one with all requests.
        self._forgets_prefill = router == "cost"
        self._off: set[int] = set()  # draining, lost, removed: nothing new goes there
        self._lost: set[int] = set()
        self._placed: dict[int, Placed] = {}
        self.fetching: CopyPlanner | None = None

    def copy_between(self, shares_tiers: bool, clock: Callable[[], float]) -> CopyPlanner:
        """From now on see what a request had better get from another replica than compute. Replicas have to join it."""
        self.fetching = CopyPlanner(self._index, PageTransfers(LinkTable(clock), self._page_size), shares_tiers)
        return self.fetching

    def spans_to_copy(self, number: int) -> Sequence[Span]:
        """What a placed request gets from other replicas."""
        return self._placed[number].spans

    def paces(self, replica: int, rate: float) -> None:
        """A replica computes so many tokens of prompts in a second."""
        if self.fetching is not None and self.fetching.prefills(replica, rate) and isinstance(self._policy, Cost):
            self._policy.reprice(self.fetching.price)

    def keys(self, tokens: IntArray, cache_salt: str | None) -> list[int]:
        """What the pages are known by that a prompt may reuse; none where the policy does not ask."""
        if self._hasher is None:
            return []
        whole = tokens[: (len(tokens) - 1) // self._page_size * self._page_size]
        hashes = self._hasher.chain(self._hasher.root((cache_salt, None)), whole.tobytes())
        return list(np.frombuffer(b"".join([each[:8] for each in hashes]), "<u8").tolist())

    def place(self, number: int, tokens: int, keys: Sequence[int], session: str | None) -> int:
        """Choose a replica for a request and count it there; -1, and nothing changed, when none has room."""
        fleet = self._fleet
        for replica in range(len(fleet)):
            room = replica not in self._off and fleet.requests[replica] < self._limit
            if fleet.ready[replica] != room:
                fleet.set_ready(replica, bool(room))
        if not fleet.ready.any():
            return -1
        choice = self._policy.choose(RouteRequest(tokens, keys, session), fleet)
        replica = choice.replica
        compute = max(0, tokens - choice.cached)
        fleet.place(replica, compute, tokens)
        spans = self.fetching.plan(replica, keys) if self.fetching is not None and keys else ()
        promised = self._index.promise(replica, keys) if keys else ()
        self._placed[number] = Placed(replica, tokens, compute, promised, spans)
        return replica

    def prefilled(self, number: int) -> None:
        """The request has its first token."""
        placed = self._placed.get(number)
        if placed is not None and placed.compute and self._forgets_prefill:
            self._fleet.prefilled(placed.replica, placed.compute)
            self._placed[number] = placed._replace(compute=0)

    def remove(self, number: int) -> None:
        """The request left; an unknown one is ignored."""
        placed = self._placed.pop(number, None)
        if placed is not None and placed.replica not in self._lost:
            self._fleet.prefilled(placed.replica, placed.compute)
            self._fleet.release(placed.replica, placed.tokens)
            self._index.withdraw(placed.replica, placed.promised)

    def hear(self, replica: int, changes: Iterable[tuple[bool, bytes]]) -> None:
        """What an engine cached (True) or dropped, in order: 8 bytes of each page's hash."""
        for stored, joined in changes:
            keys = np.frombuffer(joined, "<u8").tolist()
            (self._index.stored if stored else self._index.removed)(replica, keys)

    def join(self, replica: int, capacity: int) -> None:
        """A replica comes: with the next index, or in place of a lost one. It has nothing."""
        if replica == len(self._fleet):
            self._fleet.join(1, capacity)
            self._index.join()
        self._fleet.resize(replica, capacity)
        self._lost.discard(replica)
        self._off.discard(replica)

    def take_off(self, replica: int) -> None:
        """Place nothing there any more; what is there stays."""
        self._off.add(replica)

    def put_on(self, replica: int) -> None:
        """Take back take_off()."""
        self._off.discard(replica)

    def lose(self, replica: int) -> None:
        """The replica is gone, with what it had."""
        self._lost.add(replica)
        self._off.add(replica)
        self._fleet.forget(replica)
        self._index.cleared(replica)
        if self.fetching is not None:
            self.fetching.left(replica)
