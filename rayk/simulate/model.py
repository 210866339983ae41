"""The simulation: requests arrive, a router places them, replicas prefill them first come first served.

A replica prefills the tokens that its cache lacks at a fixed rate, one request after the other; the time to first
token is the wait for those before it plus that. Since a replica serves in the order of arrival, its cache can be
brought up to date when the request arrives: what a request finds is what it would find when its turn comes. Answers
take no time, but their pages are kept, as replicas keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from rayk.errors import ConfigError
from rayk.simulate.caches import BeladyCache, Cache, Changed, LruCache, next_uses
from rayk.simulate.paths import build_paths
from rayk.workloads.arrivals import arrivals
from rayk.workloads.request import Workload

if TYPE_CHECKING:  # the scheduler is above this package: imported where it is needed
    from rayk.scheduler.router.cost import Weights

POLICIES = ("lru", "belady")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What one row is about: `capacity` is tokens per replica, `policy` the cache's, `router` the scheduler's."""

    replicas: int
    capacity: int
    policy: str
    router: str


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from a request's arrival to its first token, over all requests."""

    mean: float
    p50: float
    p90: float
    p99: float


class Row(Case, frozen=True, kw_only=True):
    """The outcome of a case. Rates are of prompt tokens, 0..1.

    `pooled` is the hit rate of one cache as large as all replicas' together under the same policy, `infinite` that of
    one without a limit. `imbalance` is the largest replica's computed tokens over the mean. `utilization` is the part
    of the time between first and last arrival that the replicas' work takes; above 1 it could not be done in that time.
    `prefill_rate` is tokens a second of one replica.
    """

    hit_rate: float
    pooled: float
    infinite: float
    imbalance: float
    utilization: float
    ttft: FirstToken
    prefill_rate: float


class Simulator:
    """One workload in pages of `page_size` tokens, its arrivals jittered by `seed`. Keeps what rows share."""

    def __init__(self, workload: Workload, page_size: int, seed: int = 0) -> None:
        self.page_size = page_size
        self.paths = build_paths(workload.requests, page_size)
        order, times = arrivals(workload, seed)
        self.order: list[int] = order.tolist()
        self.times: list[float] = times.tolist()
        self.tokens = [request.prompt_length for request in workload.requests]
        self.sessions = [request.session_id for request in workload.requests]
        self.prompt = sum(self.tokens)
        self._next_uses = cache(self._compute_next_uses)
        self.pooled: Callable[[str, int | None], float] = cache(self._pooled)
        """Hit rate of one cache of so many pages (None: no limit) under the policy of that name."""
        self.round_robin_rate: Callable[[int, int, str], float] = cache(self._round_robin_rate)
        """Tokens a second at which round robin keeps the replicas busy all the time, neither more nor less."""

    @property
    def span(self) -> float:
        """Seconds between the first and the last arrival."""
        return self.times[-1]

    def pages(self, capacity: int) -> int:
        """Whole pages in `capacity` tokens; ConfigError when that is none."""
        if capacity < self.page_size:
            raise ConfigError(
                f"--capacity {capacity} tokens is less than a page of {self.page_size}; give more, or a smaller "
                "--page-size"
            )
        return capacity // self.page_size

    def rate(self, case: Case, utilization: float) -> float:
        """The prefill rate at which round robin would keep the case's replicas busy that part of the time."""
        return self.round_robin_rate(case.replicas, self.pages(case.capacity), case.policy) / utilization

    def run(self, case: Case, rate: float, weights: Weights | None = None) -> Row:
        """Serve the workload, each replica prefilling `rate` tokens a second. `weights` are for the cost router."""
        from rayk.scheduler.router.cost import Cost
        from rayk.scheduler.router.policies import make_policy, wants_keys
        from rayk.scheduler.router.policy import RouteRequest
        from rayk.scheduler.router.prefix_index import PrefixIndex
        from rayk.scheduler.router.replica_loads import ReplicaLoads

        pages = self.pages(case.capacity)
        index, loads = PrefixIndex(case.replicas), ReplicaLoads(case.replicas, rate, pages * self.page_size)
        router = Cost(index, self.page_size, weights) if weights else make_policy(case.router, index, self.page_size)
        keyed = wants_keys(case.router)

        def hears(change: Callable[..., None], replica: int) -> Changed:
            return lambda first, count: change(replica, range(first, first + count))

        groups = case.replicas if case.router == "round-robin" else 1
        caches = [
            self._cache(case.policy, pages, groups, *(hears(index.stored, r), hears(index.removed, r)) if keyed else ())
            for r in range(case.replicas)
        ]
        hits = 0
        waits = np.empty(len(self.order))
        for place, (request, now) in enumerate(zip(self.order, self.times, strict=True)):
            loads.advance(now)
            tokens = self.tokens[request]
            wish = RouteRequest(tokens, self.paths.keys(request) if keyed else (), self.sessions[request])
            replica = router.choose(wish, loads).replica
            found = caches[replica].serve(request) * self.page_size
            loads.place(replica, tokens - found, tokens)
            loads.release(replica, tokens)  # what waits holds no pages, and answers take no time
            waits[place] = loads.prefill_backlog[replica] / rate
            hits += found
        computed = loads.computed
        return Row(
            replicas=case.replicas,
            capacity=case.capacity,
            policy=case.policy,
            router=case.router,
            hit_rate=hits / self.prompt,
            pooled=self.pooled(case.policy, pages * case.replicas),
            infinite=self.pooled("lru", None),
            imbalance=float(computed.max() / computed.mean()),
            utilization=float(computed.sum() / (rate * case.replicas * self.span)) if self.span else 0.0,
            ttft=FirstToken(
                mean=float(waits.mean()),
                **{f"p{q}": float(np.quantile(waits, q / 100)) for q in (50, 90, 99)},
            ),
            prefill_rate=rate,
        )

    def _cache(self, policy: str, pages: int | None, groups: int, *hears: Changed) -> Cache:
        if policy == "lru":
            return LruCache(self.paths, pages, *hears)
        return BeladyCache(self.paths, pages, self._next_uses(groups), *hears)

    def _compute_next_uses(self, groups: int) -> list[list[int]]:
        """Next uses where request k of the order goes to cache k mod `groups`."""
        return next_uses(self.paths, self.order, [place % groups for place in range(len(self.order))])

    def _pooled(self, policy: str, pages: int | None) -> float:
        one = self._cache(policy, pages, 1)
        hits: int = sum(one.serve(request) for request in self.order)
        return hits * self.page_size / self.prompt

    def _round_robin_rate(self, replicas: int, pages: int, policy: str) -> float:
        if not self.span:
            raise ConfigError("all requests arrive at once, so no rate gives a --utilization; give a --prefill-rate")
        caches = [self._cache(policy, pages, replicas) for _ in range(replicas)]
        found = sum(caches[place % replicas].serve(request) for place, request in enumerate(self.order))
        computed: int = self.prompt - found * self.page_size
        return computed / (replicas * self.span)
