"""PagedKVCacheManager: the paged KV cache of all data-parallel replicas, behind one object.

The same calls work in both runtimes. Arguments are checked here; the work is done by calls of the same names: on
cores in this process (LocalCalls), or as scripts of messages to replica and scheduler actors on Ray (Calls).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
from rayk.kvcache.runtime_inputs import BatchCharacteristics, RuntimeInputs
from rayk.kvcache.tick import Admission, Settled, Tick, TickResult, first_error, placed, rewind, unless_failed, windows
from rayk.manager.local import LocalCalls
from rayk.manager.queries import ManagerQueries
from rayk.manager.waiting import BlockingAdmission
from rayk.params import KVCacheParams, require, require_at_least
from rayk.planning.budget import compute_num_host_blocks
from rayk.planning.node_plan import plan_here
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.kv_events import KVEventsConfig
from rayk.replica.kv_event_publisher import checked
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.manager.calls import Calls
    from rayk.manager.cluster_view import Script

T = TypeVar("T")
R = TypeVar("R")

MOST_IN_CALL = 1 << 18  # requests that one call may place


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
    kv_events: KVEventsConfig | None = None
    replace: bool = True


class PagedKVCacheManager(ManagerQueries):
    """Claims, pages and block tables of requests on `params.data_parallel_degree` replicas, and those added later.

    `replica_idx` is 0 .. num_replicas - 1 (ReplicaIndexError otherwise, ReplicaRemovedError for a removed one).
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

    `kv_events="tcp://127.0.0.1:5557"`, or a KVEventsConfig, has replica r publish at port 5557 + r what it caches and
    drops, for routers that listen to vLLM (docs/kv-events.md).

    On Ray a replica that is lost, hangs or is unfit (rayk.kvcache.poison) is replaced by itself, empty, at its index:
    one of the drivers starts it. What was claimed there is lost, and said to be with ReplicaLostError. One that cannot
    be started, or dies at once, is tried again later and later, and given up in the end: replacements() says how that
    stands, and add_replicas() begins anew. `replace=False`: lost ones stay lost.
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
        kv_events: str | KVEventsConfig | None = None,
        replace: bool = True,
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
            checked(kv_events, params.enable_prefix_caching, params.data_parallel_degree),
            replace,
        )
        self._wait: Callable[[Script[Any]], Any] | None = None  # of calls that are scripts
        self._calls: Calls | LocalCalls = self._start(session, wanted)
        self._admission = BlockingAdmission(self._enter, self._give_back) if admission is not None else None
        if prefill_rate is not None:
            self.prefill_rate = prefill_rate
        self._alloc = self._calls.allocators  # alloc() of each replica that runs; empty after the end
        session.adopt(self)

    @property
    def prefill_rate(self) -> float | None:
        """Tokens a second that a replica prefills, as far as known; may be set at any time.

        None: a prefix that another replica has is always copied. Otherwise only where that is quicker than computing
        it, by what copies between the two took so far. It holds for what this driver places.
        """
        return self._calls.prefill_rate

    @prefill_rate.setter
    def prefill_rate(self, rate: float | None) -> None:
        require(rate is None or (rate > 0 and math.isfinite(rate)), f"prefill_rate must be above 0 or None, got {rate}")
        self._calls.prefill_rate = rate

    def _start(self, session: InferenceSession, wanted: Wanted) -> Calls | LocalCalls:
        """The calls of the session's runtime; on Ray this plans, places and starts the actors."""
        if session.runtime == "inline":
            pages = plan_here(self.params, wanted.pages, wanted.utilization)
            return LocalCalls(
                self.params,
                pages,
                wanted.max_batch_size,
                wanted.runtime_checks,
                wanted.router,
                wanted.host_pages,
                wanted.admission,
                wanted.kv_events,
            )
        from rayk.actors.deployment import DeploymentConfig
        from rayk.actors.startup import start_deployment
        from rayk.manager.calls import Calls

        name = f"{session.name}/{session.managers_made}" if session.name is not None else None
        config = DeploymentConfig(self.params, *wanted)
        calls = Calls(session.ray, start_deployment(session.ray, config, name), name)
        self._wait = calls.run
        return calls

    # -- checks and results ------------------------------------------------------------------------

    def _at(self, replica_idx: int) -> Calls | LocalCalls:
        if replica_idx not in self._alloc:
            self._look_for(replica_idx)
        return self._calls

    def _look_for(self, replica_idx: int) -> None:
        """Another driver may have added it; else ReplicaIndexError, or ReplicaRemovedError for a hole."""
        calls = self._all()
        calls.look()
        if replica_idx not in self._alloc:
            known = 0 <= replica_idx < calls.indices
            raise (ReplicaRemovedError if known else ReplicaIndexError)(replica_idx, calls.indices)

    def _all(self) -> Calls | LocalCalls:
        if not self._open:
            raise ClosedError("this PagedKVCacheManager")
        return self._calls

    def _for(self, batches: Sequence[Any]) -> Calls | LocalCalls:
        if len(batches) != self._calls.indices or not self._open:
            self._check_count(len(batches), BatchError)
        return self._calls

    def _check_count(self, batches: int, error: Callable[[str], RaykError]) -> None:
        """One list for each index: at least for the replicas of the start, those of later ones may be left out."""
        calls, least = self._all(), self.params.data_parallel_degree
        if batches > calls.indices:
            calls.look()
        if not least <= batches <= calls.indices:
            wanted = f"{calls.indices} replica(s)" if least == calls.indices else f"{least} to {calls.indices}"
            raise error(f"got {batches} batch(es) for {wanted}; pass one list per replica, maybe empty")

    def _finish(self, script: Script[None]) -> None:
        """_run() of a call that local calls have carried out: these are many, and are spared a frame."""
        assert self._wait is not None
        self._wait(script)

    def _run(self, call: Script[T] | T) -> T:
        return call if self._wait is None else self._wait(call)  # type: ignore[arg-type,return-value]

    def _then(self, call: Script[T] | T, then: Callable[[T], R]) -> R:
        return then(call if self._wait is None else self._wait(call))  # type: ignore[arg-type]  # as in _run()

    # -- the life of a request ---------------------------------------------------------------------

    def claim(self, request_id: str, replica_idx: int) -> None:
        """Reserve a place for a request; takes no page. AlreadyClaimedError if it is claimed on any replica."""
        script = self._at(replica_idx).claim(request_id, replica_idx)
        if script is not None:
            self._finish(script)

    def contains(self, request_id: str, replica_idx: int) -> bool:
        """Whether the request is claimed on that replica."""
        return self._run(self._at(replica_idx).contains(request_id, replica_idx))

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
        return self._run(self._for(replica_batches).alloc_many(replica_batches))

    def alloc_dummy(self, request_id: str, replica_idx: int) -> None:
        """Claim a request whose only page is the null page: padding for a batch."""
        self._run(self._at(replica_idx).claim(request_id, replica_idx, dummy=True))

    def get_req_blocks(self, request_id: str, replica_idx: int) -> list[int]:
        """Page ids in sequence order, empty for an unknown request. step() may change them (equal pages collapse)."""
        return self._run(self._at(replica_idx).blocks(request_id, replica_idx))

    def release(self, request_id: str, replica_idx: int, force: bool = False) -> None:
        """Give the request's pages back; committed ones stay cached until their place is needed, deepest first.

        LeaseLostError, and nothing is done, for a request that another driver has claimed, or this driver's own
        whose lease has ended. `force=True` releases whoever's it is.
        """
        script = self._at(replica_idx).release(request_id, replica_idx, force)
        if script is not None:
            self._finish(script)

    @contextmanager
    def reserve(self, replica_batches: Batches) -> Iterator[None]:
        """Claim and allocate contexts for the length of a `with` block, then release them; windows stay advanced."""
        calls = self._for(replica_batches)
        held: list[tuple[str, int]] = []
        try:
            for replica, batch in enumerate(replica_batches):
                admissions = self._run(calls.try_admit(batch, [replica] * len(batch), True))
                held += [(request_id, replica) for request_id in placed(batch, admissions)]
                if (failed := first_error(admissions)) is not None:
                    raise failed
            yield
        finally:
            for request_id, replica in held:
                with suppress(NotClaimedError, ClosedError):  # the body may have released it, or shut everything down
                    self.release(request_id, replica)

    # -- batches ---------------------------------------------------------------------------------------

    def admit(self, ctxs: Sequence[TextContext]) -> list[int]:
        """Route, claim and allocate a batch: the replica of each, or an error and none of them claimed."""
        check_size(ctxs)
        before, calls = windows(ctxs), self._all()
        if self._admission is not None:
            admissions = self._admission.wait(ctxs)
        else:
            admissions = self._run(calls.try_admit(ctxs, None, True))
        failed = first_error(admissions)
        if failed is None:
            return [a.replica for a in admissions]
        self._give_back(placed(ctxs, admissions))
        rewind(ctxs, admissions, before)
        raise failed

    def _give_back(self, request_ids: Sequence[str]) -> None:
        self._run(self._calls.give_back(request_ids))

    def try_admit(self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None = None) -> list[Admission]:
        """Claim and allocate each context, on replicas[i] or where the router says; one round, one result each.

        With an admission policy and no replicas it returns when each is placed or turned away.
        """
        calls = self._all()
        check_size(ctxs)
        if replicas is not None:
            self._check_targets(ctxs, replicas)
        elif self._admission is not None:
            return self._admission.wait(ctxs)
        return self._run(calls.try_admit(ctxs, replicas, False))

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
        if self._admission is None:
            raise ConfigError(
                "requests cannot wait without a policy; make the manager with admission=AdmissionPolicy()"
            )
        check_size(ctxs)
        return self._admission.poll(ctxs, give_up)

    def _enter(self, ctxs: Sequence[TextContext], give_up: Sequence[str]) -> Settled:
        return self._run(self._at(0).enter(ctxs, give_up))

    def tick(self, ticks: Sequence[Tick], fn: Forward | None = None, *, raise_errors: bool = True) -> list[TickResult]:
        """One iteration on every replica at once, one message each; see Tick for the order of its parts.

        An error of one replica (fn raised, a request is not claimed) is raised after all have done theirs, or left in
        its result: for loops that go on with the others when a replica is lost.
        """
        results = self._run(self._for(ticks).tick(ticks, fn))
        return unless_failed(results) if raise_errors else results

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
        calls = self._all()
        if len(batches) != calls.indices:
            self._check_count(len(batches), partial(RuntimeInputsError, -1))
        return self._then(calls.runtime_inputs(batches, max_cache_length, batch_characteristics), RuntimeInputs)

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
        return self._run(self._for(batches).execute(batches, fn))

    def step(self, batches: Batches) -> None:
        """Cache the full, processed pages of each request for reuse. One batch per replica, else BatchError."""
        script = self._for(batches).step(batches)
        if script is not None:
            self._finish(script)

    # -- the end ------------------------------------------------------------------------------------------

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
            self._calls.close()

    def check_owned(self) -> None:
        """NotOwnerError when another driver started the cluster and still uses it, so that shutdown() needs force."""
        if self._open:
            self._calls.check_owned()

    def leave(self) -> None:
        """Release what this driver has claimed and go; the actors of a named session stay for other drivers."""
        if self._open:
            self._open, self._alloc = False, {}
            self._session.dismiss(self)
            self._calls.leave()

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
