"""The calls of a manager that has everything in this process.

They have the names and arguments of those on Ray (rayk.manager.calls), which are scripts; these give their results.
Arguments were checked: replica indices are in range, and there is one batch per replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from socket import gethostname
from typing import Any, TypeVar

import torch

from rayk import protocol as m
from rayk.context import TextContext
from rayk.errors import (
    AlreadyClaimedError,
    InsufficientBlocksError,
    OverloadedError,
    RaykError,
    cannot_be_sent,
)
from rayk.kvcache import decode
from rayk.kvcache.connector import TierCount
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.iteration import Batches, Forward, run_forward, run_tick
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.request import Reused, Usage
from rayk.kvcache.runtime_inputs import BatchCharacteristics, ReplicaInputs, no_inputs
from rayk.kvcache.tick import Admission, HitCounts, Settled, Tick, TickResult, placed
from rayk.manager.local_replicas import ME, InlineReplicas
from rayk.protocol.columns import AdmitResults, LocalRows, local_contexts
from rayk.scheduler.placer import Owner
from rayk.scheduler.router.policy import RouteRequest
from rayk.values import LONGEST_NAME, checked_request_id

Work = TypeVar("Work", bound=Sequence[Any])


class LocalCalls(InlineReplicas):
    """All replicas in this process; no copy of a context or a token is made on the way."""

    # -- requests ----------------------------------------------------------------------------

    def claim(self, request_id: str, replica: int, dummy: bool = False) -> None:
        core = self.cores[replica]
        assert core is not None
        if type(request_id) is not str or not request_id.isascii() or not 0 < len(request_id) <= LONGEST_NAME:
            request_id = checked_request_id(request_id)
        if not self._router.loads.ready[replica]:
            self.scheduler.members.check_takes(replica)
        self._placer.put(request_id, replica)
        core.claim(request_id, dummy, ME, next(self._generations))

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
        found = self._held_elsewhere(core, ctx)
        if not found:
            return core.alloc(ctx)
        request = core.requests.get(ctx.request_id)
        if request is None:
            raise core.not_claimed(ctx.request_id)
        owner = (request.client, request.generation)
        done = self._admit_with_copies(ctx, core.replica, owner, found, claim=False)
        if done.error is not None:
            raise done.error
        return Reused(done.device_tokens, done.peer_tokens, done.host_tokens, done.disk_tokens)

    def _held_elsewhere(self, core: ReplicaCore, ctx: TextContext) -> dict[int, m.Found]:
        """What each replica has of what the request may reuse; nothing if no other one has more of it."""
        stop = core.may_reuse(ctx)
        have = core.cached_pages(ctx) if stop else 0
        if have >= stop:
            return {}
        held = {other.replica: other.cached_pages(ctx) for other in self._there if other is not core}
        if max(held.values()) <= have:
            return {}
        tiers = ([tier] for tier in core.tier_hits(ctx)[1:]) if core.loads is not None else ()
        return {r: m.Found([pages], [stop]) for r, pages in held.items()} | {
            core.replica: m.Found([have], [stop], *tiers)
        }

    def _admit_with_copies(
        self, ctx: TextContext, replica: int, owner: Owner, found: Mapping[int, m.Found], claim: bool
    ) -> Admission:
        """Claim, unless it is claimed already, and allocate a request that is placed, with pages of other replicas."""
        batch, outcomes = LocalRows(local_contexts([ctx])), AdmitResults(1)
        command = m.PlaceMany(batch.contexts, claim=claim, peers=True, prefill_rate=self.prefill_rate)
        self._run(self._placer.carry_out(batch, command, [owner], {replica: [0]}, set(), outcomes, found))
        return outcomes.admissions([replica])[0]

    # -- batches -------------------------------------------------------------------------------

    def try_admit(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, stop_on_error: bool
    ) -> list[Admission]:
        # One after the other: each finds what those before it left cached, and behind an error nothing is touched.
        admissions: list[Admission] = []
        try:
            for ctx, replica in zip(ctxs, repeat(None) if replicas is None else replicas, strict=False):
                admissions.append(self._admit_one(ctx, replica))
                if stop_on_error and admissions[-1].error is not None:
                    break
        except BaseException:  # interrupted: its caller would not know of what was placed
            self.give_back(placed(ctxs, admissions))
            raise
        return admissions

    def _admit_one(self, ctx: TextContext, named: int | None) -> Admission:
        """What Placer.place_many() does of one request, without its rounds where no page is copied."""
        placer, owner = self._placer, self._placer.owner(ME)
        if named is None:
            self._report()
        try:
            window, make, pending = ctx.tokens, self._router.keys, 0 if ctx.plain else ctx.pending_future_count
            tokens = window.data[: window.length].tobytes() if make is not None else b""
            keys = make.of(tokens, ctx.root_key, pending) if make is not None else ()
            wish = RouteRequest(window.length, keys, ctx.session_id)
        except (TypeError, ValueError, OverflowError) as error:
            return Admission(-1, cannot_be_sent(ctx.request_id, error))
        replica = -1 if named is None else named
        try:
            if named is None:
                replica = placer.choose(ctx.request_id, wish)
            self.scheduler.members.check_takes(replica)
            placer.add(owner, ctx.request_id, replica, wish)
            local = self.local(replica)
            if self._copies and (found := self._held_elsewhere(local.core, ctx)):
                admission = self._admit_with_copies(ctx, replica, owner, found, claim=True)
            else:
                reused, claiming, allocating = local.admit(ctx, *owner)
                self._router.answered(replica, (ctx.request_id,))
                admission = Admission(replica, None, *reused, claiming, allocating)
        except RaykError as error:
            placer.forget_of(owner, (ctx.request_id,))
            return Admission(replica, error)
        except BaseException:
            self._run(placer.take_back({ctx.request_id: owner}))
            raise
        if admission.error is not None:
            placer.forget_of(owner, (ctx.request_id,))
        else:
            self._filling[ctx.request_id] = (ctx, replica)
        return admission

    def enter(self, ctxs: Sequence[TextContext], given_up: Sequence[str]) -> Settled:
        offers: dict[str, TextContext] = {}
        became, self._became = self._became, []
        for ctx in ctxs:
            if ctx.request_id in self._offered or offers.setdefault(ctx.request_id, ctx) is not ctx:
                became.append((ctx, Admission(-1, AlreadyClaimedError(ctx.request_id, -1))))
        self._offered.update(offers)
        contexts = local_contexts(list(offers.values()))
        try:
            done: m.EnterDone = self._ask(
                m.Enter(contexts, self._copies, given_up=list(given_up), prefill_rate=self.prefill_rate)
            )
        except BaseException:  # interrupted: what the queue had not taken up by then is given up
            for request_id in offers if self._controller is None else self._controller.unknown(ME, offers):
                given_up_here = Admission(-1, OverloadedError(request_id, "its offer was interrupted", 0.0))
                became.append((self._offered.pop(request_id), given_up_here))
            self._became += became
            raise
        outcomes = AdmitResults.received(done.numbers, done.seconds, done.failures, len(done.ids))
        for request_id, admission in zip(done.ids, outcomes.admissions(done.replicas), strict=True):
            ctx = self._offered.pop(request_id)
            if admission.error is None:
                self._filling[request_id] = (ctx, admission.replica)
            became.append((ctx, admission))
        return became

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
        done: m.MetricsDone = self._ask(m.EveryReplica(m.GetMetrics()))
        return done.metrics

    def reset_metrics(self) -> None:
        self._ask(m.EveryReplica(m.ResetMetrics()))

    def reset_prefix_cache(self, token: bytes | None) -> dict[int, int]:
        done: m.ResetDone = self._ask(m.EveryReplica(m.ResetPrefixCache(token)))
        return done.by_replica

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
        self._ask(m.EveryReplica(m.Drain()))

    def node_names(self) -> list[str]:
        return [gethostname() if core is not None else "" for core in self.cores]

    def check_integrity(self) -> list[int]:
        done: m.Unasked = self._ask(m.EveryReplica(m.CheckIntegrity()))
        return done.replicas
