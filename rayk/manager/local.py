"""The calls of a manager that has everything in this process.

They have the names and arguments of those on Ray (rayk.manager.calls), which are scripts; these give their results.
Arguments were checked: replica indices are in range, and there is one batch per replica.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from socket import gethostname
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rayk.context import TextContext
from rayk.errors import (
    AlreadyClaimedError,
    InsufficientBlocksError,
    NoReplicaError,
    RaykError,
    cannot_be_sent,
)
from rayk.kvcache import decode
from rayk.kvcache.connector import TierCount
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.iteration import Batches, Forward, run_forward, run_tick
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_pins import PageExport
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.request import Reused, Usage
from rayk.kvcache.runtime_inputs import BatchCharacteristics, ReplicaInputs, no_inputs
from rayk.kvcache.tick import Admission, HitCounts, Settled, Tick, TickResult, placed
from rayk.manager.local_replicas import InlineReplicas
from rayk.protocol.contexts import Traits
from rayk.scheduler.transfers.copy_cost import copy_spans, profitable_spans
from rayk.values import checked_request_id

if TYPE_CHECKING:
    from rayk.scheduler.admission.controller import AdmissionController
    from rayk.scheduler.router.policy import RouteRequest

_ME = ""  # the one driver of the inline runtime
Work = TypeVar("Work", bound=Sequence[Any])


class LocalCalls(InlineReplicas):
    """All replicas in this process; no copy of a context or a token is made on the way."""

    # -- requests ----------------------------------------------------------------------------

    def claim(self, request_id: str, replica: int, dummy: bool = False) -> None:
        core = self.cores[replica]
        assert core is not None
        if type(request_id) is not str or not request_id or not request_id.isascii():
            request_id = checked_request_id(request_id)
        if not self._router.loads.ready[replica]:
            self._lifecycle.members.check_takes(replica)
        self._placements.add(request_id, replica)
        core.claim(request_id, dummy, _ME, next(self._generations))

    def contains(self, request_id: str, replica: int) -> bool:
        return checked_request_id(request_id) in self.core(replica).requests

    def release(self, request_id: str, replica: int, force: bool = False) -> None:
        if type(request_id) is not str:
            request_id = checked_request_id(request_id)
        self.core(replica).release(request_id)
        self._gone(request_id)

    def release_many(self, request_ids: Sequence[str]) -> dict[str, RaykError]:
        """Release requests that are placed; why those were not that were not."""
        for request_id in request_ids:
            self.release(request_id, self._holder(request_id))
        return {}

    def give_back(self, request_ids: Sequence[str]) -> None:
        """Release what was placed for a caller that does not want it any more; what is gone already stays so."""
        for request_id in request_ids:
            if (replica := self._holder(request_id)) >= 0:
                self.release(request_id, replica)

    def blocks(self, request_id: str, replica: int) -> list[int]:
        return self.core(replica).blocks(checked_request_id(request_id))

    def _allocator(self, core: ReplicaCore) -> Callable[[TextContext], Reused]:
        return partial(self._alloc_with_copies, core) if self._copies else core.alloc

    def alloc(self, ctx: TextContext, replica: int) -> None:
        self.allocators[replica](ctx)

    def alloc_many(self, batches: Batches) -> list[dict[str, InsufficientBlocksError]]:
        pairs = self._pairs(batches)
        for core, batch in pairs:
            if core is not None and not (type(batch) is ContextBatch and decode.ready(core, batch)):
                core.claimed(batch)
        alloc_many = self._alloc_each if self._copies else ReplicaCore.alloc_many
        return [alloc_many(core, batch) if core is not None else {} for core, batch in pairs]

    def _pairs(self, batches: Sequence[Work]) -> list[tuple[ReplicaCore | None, Work]]:
        """Each replica with its batch; ReplicaRemovedError, before anything is done, for work for nobody."""
        if len(self.allocators) < len(self.cores):
            self._check_holes(batches)
        return list(zip(self.cores, batches, strict=False))

    def _alloc_each(self, core: ReplicaCore, batch: Sequence[TextContext]) -> dict[str, InsufficientBlocksError]:
        """alloc_many() of a replica that may copy from the others."""
        if type(batch) is ContextBatch and batch.decoding:
            return core.alloc_many(batch)
        refused = {}
        for ctx in batch:
            try:
                self._alloc_with_copies(core, ctx)
            except InsufficientBlocksError as error:
                refused[ctx.request_id] = error
        return refused

    def _alloc_with_copies(self, core: ReplicaCore, ctx: TextContext) -> Reused:
        """alloc() that first fetches from the other replicas what this one misses, pinned there meanwhile."""
        return self._with_copies(core, ctx, core.alloc)

    def _receive(self, core: ReplicaCore, ctx: TextContext) -> Reused:
        return self._with_copies(core, ctx, core.accept_handover) if self._copies else core.accept_handover(ctx)

    def _with_copies(self, core: ReplicaCore, ctx: TextContext, alloc: Callable[..., Reused]) -> Reused:
        stop = core.may_reuse(ctx)
        have, host, disk = core.tier_hits(ctx) if stop else (0, 0, 0)
        if have + host + disk >= stop:
            return alloc(ctx)
        resident = [c.cached_pages(ctx) if c is not None and c is not core else 0 for c in self.cores]
        if max(resident) <= have + host + disk:  # what the others have is in this node's tiers
            return alloc(ctx)
        page_bytes, exports = core.params.bytes_per_page, list[tuple[ReplicaCore, PageExport]]()
        spans = profitable_spans(
            copy_spans(have, resident, stop),
            lambda span: self._copy_rate.seconds((span.stop - span.start) * page_bytes),
            core.page_size,
            self.prefill_rate,
        )
        began = perf_counter()
        try:
            for span in spans:
                source = self.core(span.replica)
                exports.append((source, source.exports.export(ctx, span.start, span.stop, 0)))
            reused = alloc(ctx, [source.exports.direct(export, core.buffers) for source, export in exports])
            self._copy_rate.seen(reused.peer_tokens // core.page_size * page_bytes, perf_counter() - began)
            return reused
        finally:
            for source, export in exports:
                source.exports.acknowledge(export.export_id)

    # -- batches -------------------------------------------------------------------------------

    def try_admit(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, stop_on_error: bool
    ) -> list[Admission]:
        admissions: list[Admission] = []
        try:
            for i, ctx in enumerate(ctxs):
                try:
                    wish = self._wish(ctx)
                except (TypeError, ValueError, OverflowError) as error:
                    admissions.append(Admission(-1, cannot_be_sent(ctx.request_id, error)))
                else:
                    replica = replicas[i] if replicas is not None else self._route(ctx.request_id, wish)
                    admissions.append(self._admit(ctx, wish, replica))
                if stop_on_error and admissions[-1].error is not None:
                    break
        except BaseException:  # interrupted: its caller would not know of what was placed
            self.give_back(placed(ctxs, admissions))
            raise
        return admissions

    def enter(self, ctxs: Sequence[TextContext], given_up: Sequence[str]) -> Settled:
        from rayk.scheduler.admission.controller import QueuedRequest

        hall, offered = self._hall, self._offered
        assert hall is not None, "the manager has a policy"
        became: Settled = []
        self._look()
        hall.give_up(_ME, given_up)
        for ctx in ctxs:
            waits, holder = ctx.request_id in offered, self._holder(ctx.request_id)
            if waits or holder >= 0:
                became.append((ctx, Admission(holder, AlreadyClaimedError(ctx.request_id, -1 if waits else holder))))
            else:
                self._let_in(hall)
                offered[ctx.request_id] = ctx
                traits = Traits(tenant=ctx.tenant, priority=ctx.priority, deadline=ctx.deadline)
                length = ctx.tokens.length
                visitor = QueuedRequest(_ME, partial(self._wish, ctx), ctx)
                hall.offer(visitor, ctx.request_id, length, ctx.max_length - length, traits)
        hall.expire()
        self._let_in(hall)
        fates, _ = hall.settled(_ME)
        return became + [(offered.pop(f.request_id), f.outcome or Admission(f.replica, f.error)) for f in fates]

    def _let_in(self, hall: AdmissionController) -> None:
        while (entering := hall.next()) is not None:
            admission = self._admit(entering.visitor.what, entering.wish, entering.replica)
            error = admission.error
            hall.answered(entering)
            self._look()
            if error is None:
                hall.placed(entering, admission)
            elif isinstance(error, InsufficientBlocksError) and error.needed <= error.total:
                hall.refused(entering, error)
                return
            else:
                hall.failed(entering, error)

    def _look(self) -> None:
        """Tell the hall how the replicas are."""
        assert self._hall is not None
        self._report()
        self._turn += 1
        for core in self._there:
            self._hall.gate.report(core.replica, self._turn, core.usage.used)

    def _route(self, request_id: str, wish: RouteRequest) -> int:
        self._report()
        return self._router.choose(request_id, wish)

    def _wish(self, ctx: TextContext) -> RouteRequest:
        from rayk.scheduler.router.policy import RouteRequest

        window = ctx.tokens
        keys: Sequence[int] = ()
        if self._router.keys is not None:
            keys = self._router.keys.of(window.data[: window.length].tobytes(), ctx.root_key, ctx.pending_future_count)
        return RouteRequest(window.length, keys, ctx.session_id)

    def _report(self) -> None:
        """Tell the router what the replicas still have to prefill; contexts say themselves how far they are."""
        waiting = [0] * len(self.cores)
        for request_id, (ctx, replica) in list(self._filling.items()):
            left = ctx.tokens.length - ctx.tokens.processed
            if left > 1:
                waiting[replica] += left
            else:
                del self._filling[request_id]
        for core in self._there:
            core.publish()
            self._router.report(core.replica, waiting[core.replica], 0)

    def _admit(self, ctx: TextContext, wish: RouteRequest, replica: int) -> Admission:
        start = perf_counter()
        try:
            if replica < 0:
                raise NoReplicaError(ctx.request_id)
            self._lifecycle.members.check_takes(replica)
            core = self.core(replica)
            self._placements.add(ctx.request_id, replica, ctx.tokens.length)
        except RaykError as error:
            return Admission(replica, error)
        self._router.place(ctx.request_id, replica, wish)
        core.claim(ctx.request_id, False, _ME, next(self._generations))
        claimed = perf_counter()
        try:
            reused: Reused = self.allocators[replica](ctx)
        except BaseException as error:
            core.release(ctx.request_id)
            self._forget(ctx.request_id)
            if not isinstance(error, RaykError):
                raise
            return Admission(replica, error)
        self._router.answered(replica, (ctx.request_id,))
        self._filling[ctx.request_id] = (ctx, replica)
        return Admission(replica, None, *reused, claim_seconds=claimed - start, alloc_seconds=perf_counter() - claimed)

    def tick(self, ticks: Sequence[Tick], fn: Forward | None) -> list[TickResult]:
        if len(self.allocators) < len(self.cores):
            self._check_holes([not tick.empty for tick in ticks])
        results = []
        for core, tick in zip(self.cores, ticks, strict=False):
            results.append(run_tick(core, tick, fn) if core is not None else TickResult())
            for request_id in tick.release[: results[-1].released]:
                self._gone(request_id)
        return results

    def runtime_inputs(
        self, batches: Batches, max_cache_length: int | None, characteristics: BatchCharacteristics | None
    ) -> list[ReplicaInputs]:
        return [
            core.runtime_inputs(batch, max_cache_length, characteristics)
            if core is not None
            else no_inputs(self._params)
            for core, batch in self._pairs(batches)
        ]

    def execute(self, batches: Batches, fn: Forward) -> list[Any]:
        return self._each(lambda core, batch: run_forward(core, batch, fn), batches)

    def step(self, batches: Batches) -> None:
        if self._only is not None:
            self._only.step(batches[0])
        else:
            self._each(ReplicaCore.step, batches)

    def _each(self, work: Callable[[ReplicaCore, Sequence[TextContext]], Any], batches: Batches) -> list[Any]:
        """Every replica does its part, as it would in a process of its own; then the first error is raised."""
        results, first = [], None
        for core, batch in self._pairs(batches):
            try:
                results.append(work(core, batch) if core is not None else None)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first
        return results

    # -- queries ---------------------------------------------------------------------------------

    def usage(self, replica: int) -> Usage:
        return self.core(replica).usage

    def used_fraction_after(self, ctx: TextContext, replica: int) -> float:
        return self.core(replica).used_fraction_after(ctx)

    def hit_counts(self, ctx: TextContext) -> list[HitCounts]:
        return [HitCounts(*core.tier_hits(ctx)) if core is not None else HitCounts(0) for core in self.cores]

    def metrics(self) -> KVCacheMetrics:
        return sum((core.metrics for core in self._there), self._left)

    def reset_metrics(self) -> None:
        self._left = KVCacheMetrics()
        for core in self._there:
            core.reset_metrics()

    def reset_prefix_cache(self, token: bytes | None) -> dict[int, int]:
        self._reset = token or self._reset
        return {core.replica: core.reset_prefix_cache(token) for core in self._there}

    def buffers(self, replica: int) -> list[torch.Tensor]:
        return self.core(replica).buffers.all_buffers

    def read_pages(self, page_ids: Sequence[int], replica: int) -> list[torch.Tensor]:
        return self.core(replica).read_pages(page_ids)

    def tier_count(self, replica: int) -> TierCount:
        connector = self.core(replica).connector
        return connector.count() if connector is not None else TierCount()

    def poll_transfers(self) -> None:
        for core in self._there:
            core.poll_transfers()

    def drain(self) -> None:
        for core in self._there:
            core.drain()

    def node_names(self) -> list[str]:
        return [gethostname() if core is not None else "" for core in self.cores]

    def check_integrity(self) -> list[int]:
        for core in self._there:
            core.check_integrity()
        return []
