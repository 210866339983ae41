"""The router: which replica each request goes to, for managers and Clusters, and the account of what was placed.

    policy     chooses by the two below
    loads      how busy each replica is: what the replica reported last, and what was placed there since
    index      which pages it holds: what it reported, and what those placed there will store
    fetching   which of them a request had better get from a peer, where replicas copy by plan of the router

A request counts from the moment it is placed, so that a burst does not herd onto one replica, until it is removed.
Replicas of a manager report their prefill backlog with their answers (CacheDelta): a report settles what it covers, so
that nothing drifts. Engines of a Cluster report first tokens instead: prefilled().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec
import numpy as np

from rayk import protocol as m
from rayk.errors import ConfigError
from rayk.kvcache.page_hash import PageHasher, PageKeys, split_keys
from rayk.params import AUTO
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.from_replica import CacheDelta
from rayk.scheduler.router.cost import Cost
from rayk.scheduler.router.policies import make_policy, wants_keys
from rayk.scheduler.router.policy import Candidate, CostTerms, Decision, RouteRequest
from rayk.scheduler.router.prefix_index import PrefixIndex
from rayk.scheduler.router.replica_loads import BoolArray, ReplicaLoads
from rayk.scheduler.transfers.indexed_copies import CopyPlanner

REMEMBERED = 4096  # choices that can still be explained, at least
FORGOTTEN = 256  # at once: a dict that loses its first entry again and again gets slow


@dataclass(frozen=True)
class RouterSettings:
    """What a router is made from: the policy's name, pages of each replica, and how pages are hashed.

    `admission`: what requests wait by, if they do. `limit`: requests that a replica is given at a time. `plans_copies`:
    keys of pages are wanted for that, too. `reports_backlog`: replicas report what they still have to prefill.
    """

    router: str
    pages: tuple[int, ...]
    page_size: int
    algorithm: str = "xxh3_128"
    seed: bytes = b""
    caching: bool = True
    admission: AdmissionPolicy | None = None
    page_transport: str = AUTO  # the kind of line that copies go by
    offers: bool = False  # whether a replica that goes offers others what it has cached
    limit: int | None = None
    plans_copies: bool = False
    reports_backlog: bool = True

    @property
    def wants_keys(self) -> bool:
        """Whether requests need the keys of their pages once there are several replicas."""
        return self.caching and (self.plans_copies or wants_keys(self.router))

    @property
    def keyed(self) -> bool:
        """Whether replicas have to tell of their cached pages from the start."""
        return self.wants_keys and len(self.pages) > 1

    @property
    def hasher(self) -> PageHasher:
        """What makes the keys of pages."""
        return PageHasher(self.algorithm, self.seed, self.page_size)

    def make(self, clock: Callable[[], float]) -> Router:
        """The router; ConfigError for an unknown policy."""
        return Router(self, clock)

    def keys(self) -> PageKeys:
        """What makes the keys of requests' pages."""
        return PageKeys(self.hasher, self.page_size)


NO_KEYS: Sequence[int] = ()


class PastDecision(msgspec.Struct, frozen=True, gc=False):
    """A choice that was made: for so many tokens, when, and why if the policy goes by costs."""

    tokens: int
    replica: int
    at: float
    why: Callable[[], CostTerms] | None


class _Placed(msgspec.Struct, gc=False):
    """A request on a replica: `tokens` that its pages hold, of which it has `compute` to prefill. `promised` are keys
    of pages that it will store."""

    replica: int
    tokens: int
    compute: int
    promised: Sequence[int]
    under_way: bool = True


class Router:
    """See the module; `clock` in seconds."""

    def __init__(self, settings: RouterSettings, clock: Callable[[], float]) -> None:
        replicas = len(settings.pages)
        self.policy = settings.router
        self.index = PrefixIndex(replicas)
        self.loads = ReplicaLoads(0)
        for pages in settings.pages:
            self.loads.join(1, pages * settings.page_size)
        self.keys = settings.keys() if settings.keyed else None
        """What makes the keys of pages; None where no request needs any."""
        self.fetching: CopyPlanner | None = None
        """What plans copies, where the router does; replicas have to join it."""
        self.known = [-1] * replicas  # the last batch that each replica reported
        self._policy = make_policy(settings.router, self.index, settings.page_size)
        # Without reports, only a policy that weighs running requests forgets what is prefilled: for the others all that
        # is placed is load, or fast prefills would leave every replica idle and the first one with all requests.
        self._forgets_prefill = settings.reports_backlog or bool(getattr(self._policy, "weighs_running", False))
        self._page_size = settings.page_size
        self._limit = settings.limit
        self._clock = clock
        self._placed: dict[str, _Placed] = {}
        self._under_way = [0] * replicas  # tokens to compute for what was placed and not answered yet
        self._reported = [0] * replicas  # tokens that a replica said it still has to compute
        self._told = [0] * replicas  # by which batch that was
        self._decisions: dict[str, PastDecision] = {}  # the latest last
        self._aside: set[int] = set()  # replicas that have left something unanswered for long

    # -- membership --------------------------------------------------------------------------------

    def follow(self, keys: PageKeys) -> None:
        """Go by cached pages from now on: there is a choice now."""
        self.keys = keys

    def cordon(self, replica: int) -> None:
        """Place nothing there any more; what is there stays."""
        self.loads.set_ready(replica, False)

    def uncordon(self, replica: int) -> None:
        """Requests may be placed there again."""
        self.loads.set_ready(replica, True)

    def join(self) -> None:
        """One more index, at which nobody is yet."""
        self.index.join()
        self.loads.join(1, 0)
        self.cordon(len(self.known))
        self.known.append(-1)
        for numbers in (self._under_way, self._reported, self._told):
            numbers.append(0)

    def renew(self, replica: int, capacity: int) -> None:
        """A replica with pages for `capacity` tokens and nothing in them takes requests at that index."""
        self.lost(replica)
        self.known[replica], self._told[replica] = -1, 0
        self.loads.renew(replica, capacity)
        self.uncordon(replica)

    # -- choices -----------------------------------------------------------------------------------

    def choose(self, request_id: str, request: RouteRequest, open_: BoolArray | None = None) -> int:
        """The replica for a request, -1 when none takes any; one of those that are `open_`, where that is said."""
        if self._limit is not None:
            below = self.loads.requests < self._limit
            open_ = below if open_ is None else below & open_
            if not (open_ & self.loads.ready).any():
                return -1
        if open_ is not None or self._aside:
            open_ = self._calm(open_)
            if not open_.all():
                with self.loads.only(open_):
                    return self._choose(request_id, request)
        return self._choose(request_id, request)

    def _calm(self, open_: BoolArray | None) -> BoolArray:
        """Those that are open and not set aside; only if that leaves none, those that are open."""
        loads = self.loads
        calm = np.ones(len(loads), np.bool_) if open_ is None else open_.copy()
        if self._aside:
            calm[list(self._aside)] = False
            if not (calm & loads.ready).any():
                return np.ones(len(loads), np.bool_) if open_ is None else open_
        return calm

    def set_aside(self, replica: int, aside: bool) -> None:
        """It has left something unanswered for long, or not any more: it is chosen only if there is no other."""
        (self._aside.add if aside else self._aside.discard)(replica)

    def _choose(self, request_id: str, request: RouteRequest) -> int:
        choice, made = self._policy.choose(request, self.loads), self._decisions
        if choice.why is not None and choice.replica >= 0:
            slots = self._slots(request)
            if not self.loads.fits(choice.replica, slots):
                choice = self._with_room(choice, slots)
        made.pop(request_id, None)
        made[request_id] = PastDecision(request.tokens, choice.replica, self._clock(), choice.why)
        if len(made) >= REMEMBERED + FORGOTTEN:
            for old in list(islice(made, FORGOTTEN)):
                del made[old]
        return choice.replica

    def _with_room(self, choice: Decision, slots: int) -> Decision:
        """For a choice by cost whose replica would refuse: the cheapest that would not, if there is one."""
        loads, why = self.loads, choice.why
        full = loads.held + slots > loads.capacity
        if full.all() or why is None:
            return choice
        parts = why()
        replica = loads.lowest(np.where(full, np.inf, parts.cost))
        if full[replica] or not loads.ready[replica]:
            return choice
        return Decision(replica, int(parts.cached[replica]), why)

    def _slots(self, request: RouteRequest) -> int:
        """What its pages offer: whole ones, with room for the next token."""
        return -(-(request.tokens + 1) // self._page_size) * self._page_size if request.tokens else 0

    def held_elsewhere(self, replica: int, keys: Sequence[int]) -> bool:
        """Whether another replica has more of these pages, or soon will."""
        return self.index.more_elsewhere(replica, keys)

    def decision_of(self, request_id: str) -> PastDecision | None:
        """The choice for that request, if it was made here and not long ago."""
        return self._decisions.get(request_id)

    def explain(self, request_id: str) -> m.Explained:
        """That choice, with the candidates of the lowest costs; ConfigError when it is not remembered."""
        made = self.decision_of(request_id)
        if made is None:
            raise ConfigError(
                f"no routing decision for request {request_id!r} is remembered: it was placed by its driver, long ago, "
                "or never"
            )
        candidates = made.why().candidates(made.replica) if made.why is not None else []
        return m.Explained(
            self.policy,
            made.replica,
            made.tokens,
            self._clock() - made.at,
            list(Candidate.__struct_fields__) if candidates else [],
            [[float(value) for value in msgspec.structs.astuple(candidate)] for candidate in candidates],
        )

    # -- accounts ----------------------------------------------------------------------------------

    def place(self, request_id: str, replica: int, request: RouteRequest, copied: int = 0) -> None:
        """The request goes to `replica`; to be called once, before anything else is chosen. `copied`: leading pages of
        it that the replica has then, with those that a peer sends it."""
        compute, slots, promised = request.tokens, self._slots(request), NO_KEYS
        if request.keys:
            depth = self.index.depth(replica, request.keys)
            if self._forgets_prefill:
                compute -= max(depth, copied) * self._page_size
            promised = self.index.promise(replica, request.keys, depth)
        self.loads.place(replica, compute, slots)
        self._placed[request_id] = _Placed(replica, slots, compute, promised)
        self._under_way[replica] += compute

    def answered(self, replica: int, request_ids: Iterable[str]) -> None:
        """The replica has them: from now on its reports say what is left to compute."""
        for request_id in request_ids:
            placed = self._placed.get(request_id)
            if placed is not None and placed.under_way and placed.replica == replica:
                placed.under_way = False
                self._under_way[replica] -= placed.compute
        self._settle(replica)

    def prefilled(self, replica: int, request_ids: Iterable[str]) -> None:
        """The replica, which reports no backlog, has their first tokens."""
        if self._forgets_prefill:
            self.answered(replica, request_ids)

    def remove(self, request_id: str) -> None:
        """The request left, or never came; unknown ones are ignored."""
        placed = self._placed.pop(request_id, None)
        if placed is not None:
            replica = placed.replica
            self.loads.release(replica, placed.tokens)
            if placed.promised:
                self.index.withdraw(replica, placed.promised)
            if placed.under_way:
                self._under_way[replica] -= placed.compute
                self._settle(replica)

    def _settle(self, replica: int) -> None:
        self.loads.set_backlog(replica, self._reported[replica] + self._under_way[replica])

    # -- reports -----------------------------------------------------------------------------------

    def apply_cache_delta(self, replica: int, news: CacheDelta) -> None:
        """A replica's report. One that does not continue what is known changes nothing: the next is asked for again."""
        known = self.known[replica]
        if news.since >= 0 and not news.since <= known < news.number:
            return
        if news.since < 0:
            if known >= news.number:
                return
            self.index.cleared(replica)
            batches = news.batches
        else:
            batches = news.batches[known - news.since :]
        for batch in batches:
            self.apply_cache_changes(replica, batch)
        self.known[replica] = news.number
        self.report(replica, news.unfilled, news.number)

    def apply_cache_changes(self, replica: int, changes: Iterable[tuple[bool, bytes]]) -> None:
        """What a replica cached (True) or dropped, in order: the keys of pages, one after the other."""
        for stored, joined in changes:
            change = self.index.stored if stored else self.index.removed
            change(replica, split_keys(joined))

    def set_prefill_rate(self, replica: int, tokens: float) -> None:
        """A replica computes so many tokens of prompts in a second: what copies cost beside that."""
        if self.fetching is not None and self.fetching.prefills(replica, tokens) and isinstance(self._policy, Cost):
            self._policy.reprice(self.fetching.price)

    def report(self, replica: int, unfilled: int, number: int) -> None:
        """After its batch `number` a replica had so many tokens left to compute, of what it had answered."""
        if number >= self._told[replica]:
            self._reported[replica], self._told[replica] = unfilled, number
            self._settle(replica)

    def reports(self, seen: Sequence[int], unfilled: Sequence[int]) -> None:
        """report() of what a driver heard last of each replica."""
        for replica, (number, tokens) in enumerate(zip(seen[: len(self.known)], unfilled, strict=False)):
            self.report(replica, tokens, number)

    def stale_replicas(self, seen: Sequence[int]) -> list[int]:
        """Replicas of which a driver saw more than was reported here."""
        return [r for r, number in enumerate(seen[: len(self.known)]) if number > max(0, self.known[r])]

    def lost(self, replica: int) -> None:
        """The replica is gone with all that it held and all that was placed there: nothing is any more."""
        for request_id in [i for i, placed in self._placed.items() if placed.replica == replica]:
            del self._placed[request_id]
        self._under_way[replica] = self._reported[replica] = 0
        self.index.cleared(replica)
        if self.fetching is not None:
            self.fetching.left(replica)
        self.cordon(replica)
        self.loads.forget(replica)
        self._aside.discard(replica)
