"""The replicas of a manager in this process: who is there, and how they come and go."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from socket import gethostname
from time import monotonic
from typing import TYPE_CHECKING, Any

from rayk.actors.interface import LaneState
from rayk.context import TextContext
from rayk.errors import DrainError, NoReplicaError, RaykError, ReplicaRemovedError
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.replica import ReplicaCore
from rayk.manager.local_evacuation import offer_here
from rayk.params import KVCacheParams
from rayk.planning.node_plan import measure_node, plan_replica
from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad
from rayk.scheduler.transfers.copy_cost import LinkEstimate
from rayk.tiers.identity import find_seed, named
from rayk.tiers.opening import open_connector

if TYPE_CHECKING:
    from rayk.scheduler.router.policy import RouteRequest

DIRECT_LATENCY, DIRECT_BANDWIDTH = 50e-6, 4e9  # of copies within this process, until some were made


class InlineReplicas(ABC):
    """`cores[r]` is replica r, None where nobody is any more. `allocators[r]` is the alloc() of those that are there;
    the object stays the same. The scheduler's pure parts are the same as on Ray."""

    def __init__(
        self,
        params: KVCacheParams,
        num_pages: int,
        max_batch_size: int,
        runtime_checks: bool,
        router: str,
        host_pages: int = 0,
        admission: AdmissionPolicy | None = None,
    ) -> None:
        from rayk.scheduler.admission.controller import AdmissionController
        from rayk.scheduler.lifecycle import ReplicaLifecycle
        from rayk.scheduler.membership import Membership
        from rayk.scheduler.placements import Placements
        from rayk.scheduler.router.router import RouterSettings

        replicas = params.data_parallel_degree
        params = named(params)
        if params.kv_hash_seed is None:
            params = replace(params, kv_hash_seed=find_seed(params))
        self._params = params
        self._num_pages = num_pages
        self._max_batch_size = max_batch_size
        self._runtime_checks = runtime_checks
        self._host_pages = host_pages
        self._tiers = f"inline-{os.getpid()}-{os.urandom(8).hex()}"
        self._placements = Placements()
        self._generations = count(1)  # of claims
        self._filling: dict[str, tuple[TextContext, int]] = {}  # requests that may still have tokens to prefill
        self.prefill_rate: float | None = None
        self._copy_rate = LinkEstimate(DIRECT_LATENCY, DIRECT_BANDWIDTH)
        self._reset: bytes | None = None  # token of the last reset that replicas which join later must know of
        self._left = KVCacheMetrics()  # what removed replicas had counted
        self.allocators: dict[int, Callable[[TextContext], Any]] = {}
        self.cores: list[ReplicaCore | None] = []
        try:
            for r in range(replicas):
                self.cores.append(self._make(r))
        except BaseException:
            self.close()
            raise
        settings = RouterSettings(
            router,
            (num_pages,) * replicas,
            params.page_size,
            params.page_hash_algo,
            params.kv_hash_seed or b"",
            params.enable_prefix_caching,
        )
        self._router = settings.make(monotonic)
        self._hall = (
            AdmissionController(admission, self._router, params.page_size, monotonic) if admission is not None else None
        )
        self._turn = 0  # looks at the replicas
        self._offered: dict[str, TextContext] = {}  # requests that wait
        self._lifecycle = ReplicaLifecycle(
            Membership([1] * replicas), self._router, self._placements.on, self._forget_all, settings
        )
        if self._hall is not None:
            self._lifecycle.on_replica_gone = self._hall.lost
        for core in self._there if self._router.keyed else ():
            self._follow(core)
        self._seat()

    def _make(self, replica: int) -> ReplicaCore:
        params, pages = self._params, self._num_pages
        core = ReplicaCore(params, replica, pages, self._max_batch_size, None, self._runtime_checks, self._holder)
        if params.kv_connector != "null":
            core.connect(open_connector(params, core.buffers.all_bytes, self._host_pages, self._tiers))
        if self._reset is not None:
            core.join_after_reset(self._reset)
        return core

    def _follow(self, core: ReplicaCore) -> None:
        """Have the index told of what the replica caches."""
        from rayk.scheduler.router.router import IndexFeed

        core.listen(IndexFeed(self._router.index, core.replica))

    def _seat(self) -> None:
        """Derive what depends on who is there."""
        there = self._there
        params = self._params
        self._copies = params.copies_prefixes and len(there) > 1
        self._only = there[0] if len(self.cores) == 1 and there else None
        self.allocators.clear()
        self.allocators.update((core.replica, self._allocator(core)) for core in there)

    @abstractmethod
    def _allocator(self, core: ReplicaCore) -> Callable[[TextContext], Any]:
        """alloc() of that replica."""

    @abstractmethod
    def _receive(self, core: ReplicaCore, ctx: TextContext) -> Any:
        """core.accept_handover() with copies from the others."""

    @abstractmethod
    def _wish(self, ctx: TextContext) -> RouteRequest:
        """What the router goes by."""

    @property
    def _there(self) -> list[ReplicaCore]:
        return [core for core in self.cores if core is not None]

    @property
    def indices(self) -> int:
        """Indices at which somebody is or was."""
        return len(self.cores)

    def core(self, replica: int) -> ReplicaCore:
        """That replica; ReplicaRemovedError when nobody is there."""
        core = self.cores[replica]
        if core is None:
            raise ReplicaRemovedError(replica, len(self.cores))
        return core

    def _check_holes(self, batches: Sequence[Any]) -> None:
        """ReplicaRemovedError when a batch is for nobody."""
        for core, batch in zip(self.cores, batches, strict=False):
            if core is None and batch:
                self.core(self.cores.index(core))

    # -- requests --------------------------------------------------------------------------------

    def holder(self, request_id: str) -> int | None:
        """The replica that has the request, or None."""
        return self._placements.holder(request_id)

    def _holder(self, request_id: str) -> int:
        holder = self._placements.holder(request_id)
        return -1 if holder is None else holder

    def _gone(self, request_id: str) -> None:
        self._forget(request_id)
        if self._hall is not None:
            self._hall.left((request_id,))

    def _forget(self, request_id: str) -> None:
        self._placements.remove(request_id)
        self._router.remove(request_id)
        self._filling.pop(request_id, None)

    def _forget_all(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._gone(request_id)

    # -- who is there --------------------------------------------------------------------------------

    def look(self) -> None:  # noqa: B027  # nobody else changes who is there: there is nothing to see
        """Take note of who came and left by other drivers."""

    def add_replicas(self, count: int, timeout: float) -> list[int]:
        """See PagedKVCacheManager.add_replicas(); PlanError when this machine has no room for their pages."""
        plan_replica(measure_node(host_name=gethostname()), self._params, self._num_pages, count)
        lifecycle = self._lifecycle
        replicas = lifecycle.enlist(count)
        made: list[ReplicaCore] = []
        try:
            for r in replicas:
                lifecycle.start(r)
                made.append(self._make(r))
        except BaseException:
            for core in made:
                core.shutdown()
            for r in replicas:
                lifecycle.give_up(r)
            raise
        for r, core in zip(replicas, made, strict=True):
            self.cores += [None] * (r + 1 - len(self.cores))
            self.cores[r] = core
            for other in lifecycle.join(r, lifecycle.members.version, self._num_pages):
                self._follow(self.core(other))
            if self._router.keyed:
                self._follow(core)
        self._seat()
        return replicas

    def drain_replica(self, replica: int, deadline: float | None, handover: bool) -> Drained:
        """See PagedKVCacheManager.drain_replica(). Nobody else could release a request meanwhile, so it never waits."""
        self._lifecycle.drain(replica)
        moved, left = dict[str, int](), dict.fromkeys(self._placements.on(replica), "it still runs")
        if deadline is not None and handover:
            for request_id in list(left):
                try:
                    moved[request_id] = self._hand_over(self.core(replica), request_id)
                    del left[request_id]
                except RaykError as error:
                    left[request_id] = str(error)
        if left and deadline is not None:
            raise DrainError(replica, left)
        return Drained(sorted(left), moved)

    def _hand_over(self, source: ReplicaCore, request_id: str) -> int:
        """Have another replica take a request over, with what is cached of it; which one. It stays if none has room."""
        request, router = source.requests[request_id], self._router
        source.publish()
        ctx = request.ctx.snapshot() if request.ctx is not None and request.pages else None
        from rayk.scheduler.router.policy import RouteRequest

        wish, tried = self._wish(ctx) if ctx is not None else RouteRequest(0), list[int]()
        failed: RaykError = NoReplicaError(request_id)
        while len(tried) < len(self._there) - 1:
            open_ = router.loads.ready.copy()
            open_[tried] = False
            if not open_.any():
                break
            target = router.choose(request_id, wish, open_)
            core = self.core(target)
            tried.append(target)
            core.claim(request_id, request.dummy, request.client, request.generation)
            try:
                if ctx is not None:
                    self._receive(core, ctx)
            except RaykError as error:
                core.release(request_id)
                failed = error
                continue
            source.release(request_id)
            self._placements.remove(request_id)
            self._placements.add(request_id, target, wish.tokens)
            router.remove(request_id)
            router.place(request_id, target, wish)
            router.answered(target, (request_id,))
            if request_id in self._filling:
                self._filling[request_id] = (self._filling[request_id][0], target)
            return target
        raise failed

    def resume_replica(self, replica: int) -> None:
        """See PagedKVCacheManager.resume_replica()."""
        self._lifecycle.resume(replica)

    def remove_replica(self, replica: int) -> Removed:
        """See PagedKVCacheManager.remove_replica()."""
        removed = Removed()
        if self._lifecycle.begin_removal(replica) and self._params.offers_pages:
            removed = offer_here(self._there, replica, self._lifecycle.members)
        self._lifecycle.remove(replica)
        core, self.cores[replica] = self.core(replica), None
        self._left += core.metrics
        core.shutdown()
        self._seat()
        return removed

    def lane_states(self) -> list[LaneState]:
        """See PagedKVCacheManager.lane_states()."""
        return [LaneState(r, "off", "in this process") for r, core in enumerate(self.cores) if core is not None]

    def replica_loads(self) -> list[ReplicaLoad]:
        """See PagedKVCacheManager.replica_loads()."""
        placed, loads, states = (
            self._placements.loads(len(self.cores)),
            self._router.loads,
            self._lifecycle.members.states,
        )
        return [
            ReplicaLoad(
                r,
                str(state),
                placed[r].requests,
                int(loads.prefill_backlog[r]),
                int(loads.held[r]),
                int(loads.capacity[r]),
            )
            for r, state in enumerate(states)
        ]

    def check_owned(self) -> None:  # noqa: B027  # there is one driver: nobody else can have started it
        """Nobody else uses what is here."""

    def close(self) -> None:
        """Let go of everything."""
        for core in self._there:
            core.shutdown()
        self.cores.clear()

    def leave(self) -> None:
        """Nobody else uses what is here."""
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # a manager that was dropped: its tiers' threads and shared memory must go, too
            self.close()
