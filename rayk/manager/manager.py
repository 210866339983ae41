"""PagedKVCacheManager: the paged KV cache of all data-parallel replicas, behind one object.

The same calls work in both runtimes. Arguments are checked here; the work is done by a backend: cores in
this process, or replica and scheduler actors on Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch

from rayk.actors.interface import LaneState
from rayk.context import TextContext
from rayk.errors import (
    BatchError,
    ClosedError,
    ConfigError,
    InsufficientBlocksError,
    LeafError,
    NotClaimedError,
    NotOwnerError,
    RaykError,
    ReplicaIndexError,
    ReplicaRemovedError,
    RuntimeInputsError,
)
from rayk.kvcache.iteration import Batches, Forward
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_hash import Mask
from rayk.kvcache.runtime_inputs import BatchCharacteristics, RuntimeInputs
from rayk.kvcache.tick import Admission, HitCounts, PrefixCacheReset, Tick, TickResult
from rayk.manager.local import Backend, InlineBackend
from rayk.manager.waiting import BlockingAdmission
from rayk.params import KVCacheParams, require, require_at_least
from rayk.planning.budget import compute_num_host_blocks
from rayk.planning.node_plan import plan_here
from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad
from rayk.session import InferenceSession

MOST_IN_CALL = 1 << 18  # requests that one call may place


@dataclass(frozen=True)
class DeviceBuffer:
    """A replica's KV tensors: per leaf its TP shards' values, then their scales. Under Ray they are meta tensors."""

    all_buffers: list[torch.Tensor]


class Wanted(NamedTuple):
    """What a manager was asked for beside its parameters."""

    pages: int | None
    max_batch_size: int
    runtime_checks: bool
    router: str
    uniform: bool
    utilization: float | None
    host_pages: int = 0
    admission: AdmissionPolicy | None = None


class PagedKVCacheManager:
    """Claims, pages and block tables of requests on `params.data_parallel_degree` replicas, and those added later.

    `replica_idx` is 0 .. num_replicas - 1 (ReplicaIndexError otherwise, ReplicaRemovedError where nobody is any more).
    Contexts belong to the caller; alloc() moves their windows. Calls are not thread-safe. `total_num_pages` is per
    replica, the null page not counted; None takes what the planner finds room for: on nodes that differ each replica
    gets what its node can give, or with `uniform` all get the smallest number. `memory_utilization` is the part of the
    free memory that may be planned with (0 < u <= 1; None: .9 of a GPU's, .5 of a host's). `prefill_rate`: see the
    property. After shutdown() every call raises ClosedError.

    Several drivers may share the cluster of a named session. A claim is its driver's as long as that renews its lease.
    What a driver says about a request whose lease has ended, or of which another driver has the claim, is refused with
    LeaseLostError, before anything is done.

    With an `admission` policy, which all drivers of a cluster share, requests that no replica is named for wait for
    room and for their turn (tenant, priority and deadline of the context count, see rayk.scheduler.admission.queue), or
    are turned away with OverloadedError: admit() and try_admit() return when that is settled, enter() at once.

    `fast_lane=True` is for steady decode loops on Ray: tick(), step() and execute() go to replicas of this node
    through shared memory in place of a Ray call, as soon as the first of them has opened the way. It pays with few
    requests on each replica, and less and less from 64 on; with more replicas than cores it may lose, and a lane that
    was used in the last seconds takes a core (docs/measurements/fast-lane.md). Results and errors are the same. When a
    lane fails, or there can be none (a replica on another node, a named session), one warning says so and calls are
    used; see lane_states(). Inline and AsyncPagedKVCacheManager do without.
    """

    def __init__(
        self,
        params: KVCacheParams,
        session: InferenceSession,
        total_num_pages: int | None,
        total_num_host_pages: int = 0,
        enable_runtime_checks: bool = False,
        *,
        max_batch_size: int,
        router: str = "cost",
        uniform: bool = False,
        memory_utilization: float | None = None,
        admission: AdmissionPolicy | None = None,
        prefill_rate: float | None = None,
        fast_lane: bool = False,
    ) -> None:
        require_at_least(1, max_batch_size=max_batch_size)
        require_at_least(0, total_num_host_pages=total_num_host_pages)
        if total_num_pages is not None:
            require_at_least(1, total_num_pages=total_num_pages)
        require(
            total_num_host_pages == 0 or params.kv_connector != "null",
            f"{total_num_host_pages} host pages need kv_connector 'local' or 'tiered'",
        )
        if params.kv_connector in ("local", "tiered") and not total_num_host_pages:
            require(
                params.host_kvcache_swap_space_gb is not None,
                f"kv_connector {params.kv_connector!r} needs total_num_host_pages or host_kvcache_swap_space_gb",
            )
            total_num_host_pages = compute_num_host_blocks(params)
        session.check_open()
        self.params = params
        self._open = True
        self._session = session
        wanted = Wanted(
            total_num_pages,
            max_batch_size,
            enable_runtime_checks,
            router,
            uniform,
            memory_utilization,
            total_num_host_pages,
            admission,
        )
        self._fast_lane = fast_lane
        self._line = BlockingAdmission(self._enter, self.release) if admission is not None else None
        self._backend = self._start(session, wanted)
        if prefill_rate is not None:
            self.prefill_rate = prefill_rate
        self._alloc = self._backend.allocators  # alloc() of each replica that is there; empty after the end
        session.adopt(self)

    @property
    def prefill_rate(self) -> float | None:
        """Tokens a second that a replica prefills, as far as known; may be set at any time.

        None: a prefix that another replica has is always copied. Otherwise only where that is quicker than computing
        it, by what copies between the two took so far. It holds for what this driver places.
        """
        return self._backend.prefill_rate

    @prefill_rate.setter
    def prefill_rate(self, rate: float | None) -> None:
        require(rate is None or (rate > 0 and math.isfinite(rate)), f"prefill_rate must be above 0 or None, got {rate}")
        self._backend.prefill_rate = rate

    def _start(self, session: InferenceSession, wanted: Wanted) -> Backend:
        """The backend of the session's runtime; on Ray this plans, places and starts the actors."""
        if session.runtime == "inline":
            pages = plan_here(self.params, wanted.pages, wanted.utilization)
            return InlineBackend(
                self.params,
                pages,
                wanted.max_batch_size,
                wanted.runtime_checks,
                wanted.router,
                wanted.host_pages,
                wanted.admission,
            )
        from rayk.actors.launch import DeploymentConfig, start_cluster
        from rayk.manager.ray_backend import RayBackend

        name = f"{session.name}/{session.managers_made}" if session.name is not None else None
        config = DeploymentConfig(self.params, *wanted)
        return RayBackend(session.ray, start_cluster(session.ray, config, name), name, self._fast_lane)

    # -- checks ----------------------------------------------------------------------------------

    def _at(self, replica_idx: int) -> Backend:
        if replica_idx not in self._alloc:
            self._look_for(replica_idx)
        return self._backend

    def _look_for(self, replica_idx: int) -> None:
        """Another driver may have added it; else ReplicaIndexError, or ReplicaRemovedError for a hole."""
        backend = self._all()
        backend.look()
        if replica_idx not in self._alloc:
            known = 0 <= replica_idx < backend.indices
            raise (ReplicaRemovedError if known else ReplicaIndexError)(replica_idx, backend.indices)

    def _all(self) -> Backend:
        if not self._open:
            raise ClosedError("this PagedKVCacheManager")
        return self._backend

    def _for(self, batches: Sequence[Any]) -> Backend:
        if len(batches) != self._backend.indices or not self._open:
            self._check_count(len(batches), BatchError)
        return self._backend

    def _check_count(self, batches: int, error: Callable[[str], RaykError]) -> None:
        """One list for each index: at least for the replicas of the start, those of later ones may be left out."""
        backend, least = self._all(), self.params.data_parallel_degree
        if batches > backend.indices:
            backend.look()
        if not least <= batches <= backend.indices:
            wanted = f"{backend.indices} replica(s)" if least == backend.indices else f"{least} to {backend.indices}"
            raise error(f"got {batches} batch(es) for {wanted}; pass one list per replica, maybe empty")

    # -- the life of a request ---------------------------------------------------------------------

    def claim(self, request_id: str, replica_idx: int) -> None:
        """Reserve a place for a request; takes no page. AlreadyClaimedError if it is claimed on any replica."""
        self._at(replica_idx).claim(request_id, replica_idx)

    def contains(self, request_id: str, replica_idx: int) -> bool:
        """Whether the request is claimed on that replica."""
        return self._at(replica_idx).contains(request_id, replica_idx)

    def alloc(self, data: TextContext, replica_idx: int) -> None:
        """Give a claimed request the pages that its tokens need; reused ones move its window forward.

        NotClaimedError unless claimed there. InsufficientBlocksError leaves no trace.
        """
        try:
            alloc = self._alloc[replica_idx]
        except KeyError:
            self._at(replica_idx)
            alloc = self._alloc[replica_idx]
        alloc(data)

    def alloc_many(self, replica_batches: Batches) -> list[dict[str, InsufficientBlocksError]]:
        """alloc() for every context of one batch per replica: per replica the refusals, by request id.

        A refused request keeps what it had; the others have their pages. A ContextBatch whose contexts all decode is
        handled as a whole. NotClaimedError, before anything is done, unless all are claimed where they are named.
        """
        return self._for(replica_batches).alloc_many(replica_batches)

    def alloc_dummy(self, request_id: str, replica_idx: int) -> None:
        """Claim a request whose only page is the null page: padding for a batch."""
        self._at(replica_idx).claim(request_id, replica_idx, dummy=True)

    def get_req_blocks(self, request_id: str, replica_idx: int) -> list[int]:
        """Page ids in sequence order, empty for an unknown request. step() may change them (equal pages collapse)."""
        return self._at(replica_idx).blocks(request_id, replica_idx)

    def release(self, request_id: str, replica_idx: int, force: bool = False) -> None:
        """Give the request's pages back; committed ones stay cached until their place is needed, deepest first.

        LeaseLostError, and nothing is done, for a request that another driver has claimed, or this driver's own
        whose lease has ended. `force=True` releases whoever's it is.
        """
        self._at(replica_idx).release(request_id, replica_idx, force)

    @contextmanager
    def reserve(self, replica_batches: Batches) -> Iterator[None]:
        """Claim and allocate contexts for the length of a `with` block, then release them; windows stay advanced."""
        backend = self._for(replica_batches)
        held: list[tuple[str, int]] = []
        try:
            for replica, batch in enumerate(replica_batches):
                admissions = backend.try_admit(batch, [replica] * len(batch), True)
                held += [(c.request_id, replica) for c, a in zip(batch, admissions, strict=False) if a.error is None]
                for admission in admissions:
                    if admission.error is not None:
                        raise admission.error
            yield
        finally:
            for request_id, replica in held:
                with suppress(NotClaimedError, ClosedError):  # the body may have released it, or shut everything down
                    self.release(request_id, replica)

    # -- batches ---------------------------------------------------------------------------------------

    def admit(self, ctxs: Sequence[TextContext]) -> list[int]:
        """Route, claim and allocate a batch: the replica of each, or an error and none of them claimed."""
        check_size(ctxs)
        before = [(c.tokens.processed, c.tokens.end, c.cached_prefix_length) for c in ctxs]
        backend = self._all()
        admissions = backend.try_admit(ctxs, None, True) if self._line is None else self._line.wait(ctxs)
        failed = next((a.error for a in admissions if a.error is not None), None)
        if failed is None:
            return [a.replica for a in admissions]
        for ctx, admission, (processed, end, cached) in zip(ctxs, admissions, before, strict=False):
            if admission.error is None:
                with suppress(RaykError):  # where that fails, it is gone, too
                    self._backend.release(ctx.request_id, admission.replica)
                ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length = processed, end, cached
        raise failed

    def try_admit(self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None = None) -> list[Admission]:
        """Claim and allocate each context, on replicas[i] or where the router says; one round, one result each.

        With an admission policy and no replicas it returns when each is placed or turned away.
        """
        backend = self._all()
        check_size(ctxs)
        if replicas is not None:
            self._check_targets(ctxs, replicas)
        elif self._line is not None:
            return self._line.wait(ctxs)
        return backend.try_admit(ctxs, replicas, False)

    def _check_targets(self, ctxs: Sequence[TextContext], replicas: Sequence[int]) -> None:
        for replica in set(replicas):
            self._at(replica)
        if len(replicas) != len(ctxs):
            raise BatchError(f"got {len(replicas)} replica indices for {len(ctxs)} requests")

    def enter(
        self, ctxs: Sequence[TextContext] = (), give_up: Sequence[str] = ()
    ) -> list[tuple[TextContext, Admission]]:
        """Offer requests and do not wait: what became, by now, of these and of those that were offered before.

        For loops that do something else meanwhile; they call it again. Each context is returned once, placed or with
        an error. `give_up` are ids that are not wanted any more: those that still waited come back with an
        OverloadedError, the others as placed. ConfigError without an admission policy.
        """
        if self._line is None:
            raise ConfigError(
                "requests cannot wait without a policy; make the manager with admission=AdmissionPolicy()"
            )
        check_size(ctxs)
        return self._line.look(ctxs, give_up)

    def _enter(self, ctxs: Sequence[TextContext], give_up: Sequence[str]) -> list[tuple[TextContext, Admission]]:
        return self._at(0).enter(ctxs, give_up)

    def tick(self, ticks: Sequence[Tick], fn: Forward | None = None, *, raise_errors: bool = True) -> list[TickResult]:
        """One iteration on every replica at once, one message each; see Tick for the order of its parts.

        An error of one replica (fn raised, a request is not claimed) is raised after all have done theirs, or left in
        its result: for loops that go on with the others when a replica is lost.
        """
        results = self._for(ticks).tick(ticks, fn)
        for result in results:
            if result.error is not None and raise_errors:
                raise result.error
        return results

    def runtime_inputs(
        self,
        batches: Batches,
        *,
        max_cache_length: int | None = None,
        batch_characteristics: BatchCharacteristics | None = None,
    ) -> RuntimeInputs:
        """Inputs of a forward, one entry per replica; see rayk.kvcache.runtime_inputs for shapes and dtypes.

        RuntimeInputsError when a request has too few pages or a bound does not hold. Allocates nothing and moves
        no window. Views: the next call overwrites them (inline).
        """
        backend = self._all()
        if len(batches) != backend.indices:
            self._check_count(len(batches), partial(RuntimeInputsError, -1))
        return RuntimeInputs(backend.runtime_inputs(batches, max_cache_length, batch_characteristics))

    def runtime_inputs_for_leaf(
        self,
        batches: Batches,
        *,
        max_cache_length: int | None = None,
        batch_characteristics: BatchCharacteristics | None = None,
    ) -> RuntimeInputs:
        """runtime_inputs() for single-cache parameters; LeafError (an AssertionError) for several caches."""
        leaves = list(self.params.leaves)
        if leaves != [""]:
            raise LeafError(f"these parameters have the caches {', '.join(leaves)}; use runtime_inputs()")
        return self.runtime_inputs(
            batches, max_cache_length=max_cache_length, batch_characteristics=batch_characteristics
        )

    def execute(self, batches: Batches, fn: Forward) -> list[Any]:
        """Run `fn(inputs, batch)` beside the cache on every replica, also with an empty batch; its results.

        `inputs` is runtime_inputs(batches)[r] with tensors, `batch` read-only copies of that replica's contexts.
        Under Ray fn is pickled by cloudpickle; a module-level function travels as its name.
        """
        return self._for(batches).execute(batches, fn)

    def step(self, batches: Batches) -> None:
        """Cache the full, processed pages of each request for reuse. One batch per replica, else BatchError."""
        self._for(batches).step(batches)

    # -- replicas that come and go ---------------------------------------------------------------------------

    @property
    def num_replicas(self) -> int:
        """Replica indices in use or used before, holes of removed ones included: lists per replica have so many."""
        return self._all().indices

    def add_replicas(self, n: int = 1, timeout: float = 60.0) -> list[int]:
        """Start `n` more replicas while requests run, and return their indices; the router uses them from then on.

        Lost ones are replaced first, at their index, empty; others get the next indices. On Ray, nodes are measured and
        planned as at the start, and each new replica asks for a placement group of its own, for which an autoscaler
        may start a node within `timeout` seconds. PlanError says what is missing; then nothing is left behind.
        """
        require_at_least(1, n=n)
        return self._all().add_replicas(n, timeout)

    def drain_replica(self, replica_idx: int, deadline: float | None = None, handover: bool = True) -> Drained:
        """Give a replica no new requests. Those that it has go on; without a `deadline` they are named in the result.

        With one, it waits so many seconds for their release (0: not at all), then moves those that are left to other
        replicas, with what is cached of them. holder() says where a request is; calls that name its old replica raise
        NotClaimedError with the new one in `holder`. Its next alloc() there moves its window back to what was copied.
        DrainError names what could not be moved and why; the replica drains on. ReplicaStateError for a lost one.
        """
        return self._at(replica_idx).drain_replica(replica_idx, deadline, handover)

    def resume_replica(self, replica_idx: int) -> None:
        """Let a draining replica take requests again."""
        self._at(replica_idx).resume_replica(replica_idx)

    def remove_replica(self, replica_idx: int) -> Removed:
        """End a replica on which no request is claimed, or a lost one, and give its place back. Its index stays a hole.

        DrainError, and nothing changes, while it has requests. Before it goes, the others are offered what it has
        cached, what was used last first; they take what fits into empty pages, for half a minute at most, and go on
        serving. The result says how much that was. Where there are tiers, these have its pages.
        """
        return self._at(replica_idx).remove_replica(replica_idx)

    def replica_loads(self) -> list[ReplicaLoad]:
        """How each replica index stands and what it carries; what rayk.desired_replicas() goes by."""
        return self._all().replica_loads()

    def replica_states(self) -> list[str]:
        """How each replica index stands: planned, starting, ready, draining, lost or removed."""
        return [load.state for load in self.replica_loads()]

    def lane_states(self) -> list[LaneState]:
        """Whether fast lanes are used, to which replicas, and why not. One for each replica that is there."""
        return self._all().lane_states()

    def holder(self, request_id: str) -> int | None:
        """The replica that has this driver's request, as far as it knows; None when it has no claim of it."""
        return self._all().holder(request_id)

    # -- counters ----------------------------------------------------------------------------------------

    def num_free_blocks(self, replica_idx: int = 0) -> int:
        """Pages that can be handed out: empty ones and cached ones that nobody holds."""
        return self._at(replica_idx).usage(replica_idx).free

    def total_num_blocks(self, replica_idx: int = 0) -> int:
        """Pages of the replica, the null page not counted."""
        return self._at(replica_idx).usage(replica_idx).total

    def get_num_pages(self, replica_idx: int) -> int:
        """The same as total_num_blocks()."""
        return self.total_num_blocks(replica_idx)

    def get_num_used_pages(self, replica_idx: int) -> int:
        """Pages that a request or a transfer holds; shared ones count once."""
        return self._at(replica_idx).usage(replica_idx).used

    def get_num_host_pages(self, replica_idx: int) -> int:
        """Pages of the host tier on the replica's node, which all replicas there share; 0 without one."""
        return self._at(replica_idx).tier_count(replica_idx).host_total

    def get_num_used_host_pages(self, replica_idx: int) -> int:
        """Of these, pages in use."""
        return self._at(replica_idx).tier_count(replica_idx).host_used

    def get_num_disk_pages(self, replica_idx: int) -> int:
        """Pages that the disk budget of the replica's node is for, shared likewise; 0 without a disk tier."""
        return self._at(replica_idx).tier_count(replica_idx).disk_total

    def get_num_used_disk_pages(self, replica_idx: int) -> int:
        """Of these, pages in use."""
        return self._at(replica_idx).tier_count(replica_idx).disk_used

    def get_pct_used_blocks_after_allocation(self, ctx: TextContext, replica_idx: int) -> float:
        """Fraction (0..1) of the replica's pages in use if alloc(ctx) were called now. Changes nothing."""
        return self._at(replica_idx).used_fraction_after(ctx, replica_idx)

    def get_prefix_cache_hit_counts(self, ctx: TextContext) -> list[HitCounts]:
        """Per replica, the leading pages of the request that are cached there; 0 where a replica is lost or silent.
        Changes nothing."""
        return self._all().hit_counts(ctx)

    def get_metrics_aggregated(self) -> KVCacheMetrics:
        """Counters of all replicas since reset_metrics(); of those that are lost or silent nothing is counted."""
        return self._all().metrics()

    def reset_metrics(self) -> None:
        """Counters of all replicas to zero, those of a silent one before anything else that is asked of it."""
        self._all().reset_metrics()

    def reset_prefix_cache(self, *, weights_changed: bool = False) -> PrefixCacheReset:
        """Forget cached pages that nobody holds, on all replicas and in the tiers; the answer says what is still held.

        As in MAX, what running requests hold can still be hit, which is wrong once the weights are others. After
        `weights_changed=True` no request that starts later reads what was computed before the call, or is computed by
        a request that has pages now, wherever it is: those requests go on with their own pages, which go when they end.

        CallTimeoutError names replicas that did not answer, when the others have done it. They do it when they answer
        again, before anything else that the scheduler asks of them.
        """
        token = Mask.new() if weights_changed else None
        return PrefixCacheReset(self._all().reset_prefix_cache(token), hits=not weights_changed)

    # -- contents and the end --------------------------------------------------------------------------------

    def get_device_buffer(self, replica_idx: int) -> DeviceBuffer:
        """The replica's KV tensors `[pages + 1, kv_dim, layers, page_size, heads per device, head_dim]`."""
        return DeviceBuffer(self._at(replica_idx).buffers(replica_idx))

    def read_pages(self, page_ids: Sequence[int], replica_idx: int) -> list[torch.Tensor]:
        """Host copies of those pages, one tensor `[len(page_ids), ...]` per buffer of get_device_buffer()."""
        return self._at(replica_idx).read_pages(page_numbers(page_ids), replica_idx)

    def poll_transfers(self) -> None:
        """Take note of finished transfers, so that what has landed can be reused. Never waits for one."""
        self._all().poll_transfers()

    def drain(self) -> None:
        """Return when no host or disk transfer is pending; afterwards no page is held by one. CallTimeoutError names
        replicas that did not answer, when that is so for the others."""
        self._all().drain()

    def get_node_names(self) -> list[str]:
        """The host name of each replica's node."""
        return self._all().node_names()

    def check_integrity(self) -> list[int]:
        """IntegrityError if any replica's bookkeeping contradicts itself (a bug in rayk). The replicas that could not
        be asked, because they are lost or do not answer."""
        return self._all().check_integrity()

    def shutdown(self, force: bool = False) -> None:
        """Give everything back: pages, actors, placement. Safe to call twice.

        A named cluster belongs to the driver that started it, until that leaves or its lease ends. NotOwnerError, and
        nothing is done, for others, unless `force`. The end of a `with` block leaves what it may not shut down.
        """
        if self._open:
            if not force:
                self.check_owned()
            self._open, self._alloc = False, {}
            self._session.dismiss(self)
            self._backend.close()

    def check_owned(self) -> None:
        """NotOwnerError when another driver started the cluster and still uses it, so that shutdown() needs force."""
        if self._open:
            self._backend.check_owned()

    def leave(self) -> None:
        """Release what this driver has claimed and go; the actors of a named session stay for other drivers."""
        if self._open:
            self._open, self._alloc = False, {}
            self._session.dismiss(self)
            self._backend.leave()

    def __enter__(self) -> PagedKVCacheManager:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.shutdown()
        except NotOwnerError:
            self.leave()


def check_size(ctxs: Sequence[TextContext]) -> None:
    """BatchError for more requests than one call may place; the messages that fewer take let others in between."""
    if len(ctxs) > MOST_IN_CALL:
        raise BatchError(f"got {len(ctxs)} requests in one call, at most {MOST_IN_CALL} may be: send them in parts")


def page_numbers(page_ids: Sequence[int]) -> list[int]:
    """Page ids as ints; ConfigError for what is no sequence of whole numbers. Their range is checked by the replica."""
    try:
        ids = list(page_ids)
        if any(isinstance(page, bool | np.bool_) for page in ids):
            raise TypeError("a truth value is no page")
        if any(not -(1 << 31) <= index(page) < 1 << 31 for page in ids):
            raise TypeError("no page has such a number")
        return [index(page) for page in ids]
    except TypeError as error:
        raise ConfigError(f"page ids must be a sequence of whole numbers, got {page_ids!r:.80}: {error}") from None
