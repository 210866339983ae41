"""The manager's backend on Ray: turns calls into messages, one per replica, and moves windows by the answers.

claim and alloc go through the scheduler; step, execute, runtime_inputs, release and ticks go straight to the
replicas. Tokens are sent once: later messages carry only new ones.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import Event, Thread
from typing import Any

import numpy as np
import torch

from rayk import messages as m
from rayk.actors.link import Answer, Link, Pending, Traffic, new_client_id
from rayk.actors.runtime import ActorGoneError, Runtime
from rayk.backend import Batches, Forward
from rayk.buffers import PageBuffers
from rayk.context import TextContext
from rayk.errors import (
    InsufficientBlocksError,
    NotClaimedError,
    RaykError,
    ReplicaLostError,
    SchedulerLostError,
    StaleContextError,
)
from rayk.inputs import BatchCharacteristics, BatchShape, ReplicaInputs, table_only
from rayk.metrics import KVCacheMetrics
from rayk.replica import Usage
from rayk.scheduler.cluster import Cluster
from rayk.ticks import Admission, HitCounts, Tick, TickResult
from rayk.views import Sender, apply_move

LEASE_SECONDS = 15.0  # a driver of a named session that is silent this long has its requests released


class RayBackend:
    """Talks to one running Cluster. `leased`: the cluster outlives this driver, so its claims have a lease."""

    def __init__(self, runtime: Runtime, cluster: Cluster, leased: bool) -> None:
        assert cluster.scheduler is not None
        client = new_client_id("driver")
        params = cluster.config.params
        self._runtime = runtime
        self._cluster = cluster
        self._params = params
        self._copies = params.enable_prefix_caching and params.enable_dp_cross_replica_prefix_copy
        self._copies = self._copies and len(cluster.replicas) > 1
        self._sender = Sender()
        self._placed: dict[str, int] = {}
        self._released: list[str] = []  # straight on replicas; the scheduler hears of it with the next message
        self._links = [
            Link(runtime, actor, f"replica {r}", cluster.epochs[r], client, partial(self._lost, r))
            for r, actor in enumerate(cluster.replicas)
        ]
        self._scheduler = Link(
            runtime, cluster.scheduler, "the scheduler", cluster.scheduler_epoch, client, SchedulerLostError
        )
        self._stopped = Event()
        if leased:
            self._scheduler.ask(m.Connect(LEASE_SECONDS))
            Thread(target=self._renew, args=(client,), name="rayk-lease", daemon=True).start()

    def _lost(self, replica: int, reason: str) -> RaykError:
        mine = [request_id for request_id, r in self._placed.items() if r == replica]
        return ReplicaLostError(replica, self._cluster.epochs[replica], mine, reason)

    def _renew(self, client: str) -> None:
        while not self._stopped.wait(LEASE_SECONDS / 3):
            try:
                self._runtime.get(self._scheduler.actor.call("renew", client, control=True), "the scheduler", 5)
            except (RaykError, ActorGoneError):
                continue  # the next call of the driver will say so

    # -- requests ----------------------------------------------------------------------------------

    def claim(self, request_id: str, replica: int, dummy: bool = False) -> None:
        self._scheduler.ask(m.ClaimOne(request_id, replica, dummy, self._take_released()))
        self._placed[request_id] = replica

    def _take_released(self) -> list[str]:
        released, self._released = self._released, []
        return released

    def contains(self, request_id: str, replica: int) -> bool:
        done: m.BlocksDone = self._links[replica].ask(m.Blocks(request_id))
        return done.claimed

    def blocks(self, request_id: str, replica: int) -> list[int]:
        done: m.BlocksDone = self._links[replica].ask(m.Blocks(request_id))
        return done.page_ids

    def release(self, request_id: str, replica: int) -> None:
        holder = self._placed.get(request_id, -1)
        if holder not in (-1, replica):
            raise NotClaimedError(request_id, replica, holder)
        self._links[replica].ask(m.Release([request_id]))
        self._gone(request_id)

    def _gone(self, request_id: str) -> None:
        self._sender.forget(request_id)
        self._placed.pop(request_id, None)
        self._released.append(request_id)

    def alloc(self, ctx: TextContext, replica: int) -> None:
        [admission] = self._place([ctx], [replica], claim=False, stop_on_error=True)
        if admission.error is not None:
            raise admission.error

    def alloc_many(self, batches: Batches) -> list[dict[str, InsufficientBlocksError]]:
        """Decode steps in one message per replica; contexts that may find cached pages one by one, like alloc()."""
        for r, batch in enumerate(batches):
            for ctx in batch:
                if self._placed.get(ctx.request_id, r) != r:
                    raise NotClaimedError(ctx.request_id, r, self._placed[ctx.request_id])
        refused: list[dict[str, InsufficientBlocksError]] = []
        steady: list[Tick] = []
        for r, batch in enumerate(batches):
            refused.append({})
            decoding = [ctx for ctx in batch if ctx.tokens.active_length == 1]
            steady.append(Tick(alloc=decoding))
            for ctx in batch if len(decoding) < len(batch) else ():
                try:
                    if ctx.tokens.active_length > 1:
                        self.alloc(ctx, r)
                except InsufficientBlocksError as error:
                    refused[r][ctx.request_id] = error
        for r, result in enumerate(self.tick(steady, None)):
            if result.error is not None:
                raise result.error
            refused[r].update(result.refused)
        return refused

    def try_admit(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, stop_on_error: bool
    ) -> list[Admission]:
        return self._place(ctxs, replicas, claim=True, stop_on_error=stop_on_error)

    def _place(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, claim: bool, stop_on_error: bool
    ) -> list[Admission]:
        if not ctxs:
            return []
        targets = list(replicas) if replicas is not None else [-1] * len(ctxs)

        def command() -> m.PlaceMany:
            places = [self._wish(ctx, r, claim) for ctx, r in zip(ctxs, targets, strict=True)]
            return m.PlaceMany(places, self._take_released(), stop_on_error)

        done: m.PlaceDone = self._scheduler.ask(command())
        errors = [m.to_error(a.failure) for a in done.admitted if a.failure is not None]
        if any(isinstance(error, StaleContextError) for error in errors) and not claim:
            self._sender.forget(ctxs[0].request_id)
            done = self._scheduler.ask(command())
        return [self._landed(ctx, r, a) for ctx, r, a in zip(ctxs, done.replicas, self._explain(done), strict=True)]

    @staticmethod
    def _explain(done: m.PlaceDone) -> list[m.Admitted]:
        """Requests that were not tried failed for the reason of the one before them."""
        first = next((a.failure for a in done.admitted if a.failure is not None), None)
        return [m.Admitted(failure=first) if a.moved is None and a.failure is None else a for a in done.admitted]

    def _wish(self, ctx: TextContext, replica: int, claim: bool) -> m.Place:
        window = ctx.tokens
        first = claim or ctx.request_id not in self._placed
        peers = self._copies and (first or window.processed == 0 or window.end - window.processed != 1)
        return m.Place(self._sender.view(ctx, replica, whole=claim or peers), window.length, replica, claim, peers)

    def _landed(self, ctx: TextContext, replica: int, admitted: m.Admitted) -> Admission:
        if admitted.moved is None:
            assert admitted.failure is not None
            return Admission(replica, m.to_error(admitted.failure))
        apply_move(ctx, admitted.moved)
        self._sender.arrived(ctx, replica)
        self._placed[ctx.request_id] = replica
        return Admission(
            replica,
            None,
            admitted.device_tokens,
            admitted.peer_tokens,
            admitted.claim_seconds,
            admitted.alloc_seconds,
        )

    # -- batches -----------------------------------------------------------------------------------

    def _views(self, ctxs: Sequence[TextContext], replica: int) -> list[m.ContextView]:
        return [self._sender.view(ctx, replica) for ctx in ctxs]

    def _each(self, batches: Batches, command: Callable[[int, Sequence[TextContext]], Any]) -> list[Any]:
        """One message to each replica whose command is not None, all sent before the first answer is read."""

        def send(r: int) -> Pending | None:
            message = command(r, batches[r])
            return self._links[r].send(message) if message is not None else None

        sent = [self._attempt(lambda r=r: send(r)) for r in range(len(batches))]  # type: ignore[misc]
        results: list[Any] = []
        first: RaykError | None = None
        for r, pending in enumerate(sent):
            try:
                results.append(self._read(pending, partial(send, r), batches[r]))
                self._arrived(batches[r], r)
            except RaykError as error:
                first = first or error
                results.append(None)
        if first is not None:
            raise first
        return results

    def _read(
        self, pending: Pending | RaykError | None, again: Callable[[], Pending | None], batch: Sequence[TextContext]
    ) -> Any:
        """The result; a replica that lacks earlier tokens has done nothing and gets its message again, whole."""
        if isinstance(pending, RaykError):
            raise pending
        if pending is None:
            return None
        try:
            return pending.wait().result
        except StaleContextError:
            for ctx in batch:
                self._sender.forget(ctx.request_id)
            repeated = again()
            return repeated.wait().result if repeated is not None else None

    @staticmethod
    def _attempt(send: Callable[[], Pending | None]) -> Pending | RaykError | None:
        try:
            return send()
        except RaykError as error:
            return error

    def _arrived(self, batch: Sequence[TextContext], replica: int) -> None:
        for ctx in batch:
            if self._placed.get(ctx.request_id) == replica:
                self._sender.arrived(ctx, replica)

    def step(self, batches: Batches) -> None:
        self._each(batches, lambda r, batch: m.Step(self._views(batch, r)) if batch else None)

    def execute(self, batches: Batches, fn: Forward) -> list[Any]:
        pickled = self._runtime.dumps(fn)
        values = self._each(batches, lambda r, batch: m.Execute(self._views(batch, r), pickled))
        return [pickle.loads(value.data) for value in values]

    def runtime_inputs(
        self, batches: Batches, max_cache_length: int | None, characteristics: BatchCharacteristics | None
    ) -> list[ReplicaInputs]:
        bounds = (
            (characteristics.batch_size, characteristics.max_prompt_length, characteristics.max_cache_valid_length)
            if characteristics is not None
            else None
        )
        done: list[m.InputsDone] = self._each(
            batches, lambda r, batch: m.Inputs(self._views(batch, r), max_cache_length, bounds)
        )
        shards = dict.fromkeys(self._params.leaves, self._params.tensor_parallel_degree)
        return [
            table_only(
                shards,
                np.frombuffer(bytearray(d.table), np.int32).reshape(d.rows, d.width),
                np.frombuffer(bytearray(d.lengths), np.int32),
                BatchShape(*d.shape),
            )
            for d in done
        ]

    def tick(self, ticks: Sequence[Tick], fn: Forward | None) -> list[TickResult]:
        pickled = self._runtime.dumps(fn) if fn is not None else b""
        contexts = [list({id(c): c for c in (*t.step, *t.alloc, *t.execute)}.values()) for t in ticks]

        def command(r: int, batch: Sequence[TextContext]) -> m.RunTick | None:
            tick = ticks[r]
            if tick.empty:
                return None
            at = {id(ctx): i for i, ctx in enumerate(batch)}
            return m.RunTick(
                self._views(batch, r),
                [at[id(c)] for c in tick.step],
                list(tick.release),
                [at[id(c)] for c in tick.alloc],
                [at[id(c)] for c in tick.execute],
                pickled if tick.execute else b"",
            )

        done = self._each(contexts, command)
        return [self._ticked(tick, d) for tick, d in zip(ticks, done, strict=True)]

    def _ticked(self, tick: Tick, done: m.TickDone | None) -> TickResult:
        if done is None:
            return TickResult()
        for ctx in tick.alloc:
            moved = done.moved.get(ctx.request_id)
            if moved is not None:
                apply_move(ctx, moved)
        for request_id in tick.release[: done.released]:
            self._gone(request_id)
        refused = {}
        for request_id, failed in done.refused.items():
            error = m.to_error(failed)
            assert isinstance(error, InsufficientBlocksError)
            refused[request_id] = error
        return TickResult(
            value=pickle.loads(done.value) if done.value else None,
            refused=refused,
            free_pages=done.free,
            used_pages=done.used,
            step_seconds=done.step_seconds,
            alloc_seconds=done.alloc_seconds,
            released=done.released,
            error=m.to_error(done.failure) if done.failure is not None else None,
        )

    # -- queries -------------------------------------------------------------------------------------

    def traffic(self) -> list[Traffic]:
        """What this driver has sent to each replica and to the scheduler, which comes last, and read from them."""
        return [link.traffic for link in (*self._links, self._scheduler)]

    def usage(self, replica: int) -> Usage:
        done: m.UsageDone = self._links[replica].ask(m.GetUsage())
        return Usage(done.total, done.free, done.cached)

    def used_fraction_after(self, ctx: TextContext, replica: int) -> float:
        done: m.Fraction = self._links[replica].ask(m.UsedFraction(self._sender.view(ctx, whole=True)))
        return done.value

    def hit_counts(self, ctx: TextContext) -> list[HitCounts]:
        done: m.Counts = self._scheduler.ask(m.HitCountsOf(self._sender.view(ctx, whole=True)))
        return [HitCounts(pages) for pages in done.counts]

    def metrics(self) -> KVCacheMetrics:
        done: m.MetricsDone = self._scheduler.ask(m.EveryReplica(m.GetMetrics()))
        return done.metrics

    def reset_metrics(self) -> None:
        self._scheduler.ask(m.EveryReplica(m.ResetMetrics()))

    def reset_prefix_cache(self) -> None:
        self._scheduler.ask(m.EveryReplica(m.ResetPrefixCache()))

    def node_names(self) -> list[str]:
        return [plan.host_name for plan in self._cluster.plan.replicas]

    def replica_pids(self) -> list[int]:
        """The process of each replica, on its node."""
        return [facts.pid for facts in self._cluster.facts]

    def check_integrity(self) -> None:
        self._scheduler.ask(m.EveryReplica(m.CheckIntegrity()))

    def buffers(self, replica: int) -> list[torch.Tensor]:
        shards = ["meta"] * self._params.tensor_parallel_degree
        return PageBuffers(self._params, self._cluster.pages[replica], shards).all_buffers

    def read_pages(self, page_ids: Sequence[int], replica: int) -> list[torch.Tensor]:
        link = self._links[replica]
        answer: Answer = link.send(m.ReadPages([int(p) for p in page_ids]), with_data=True).wait()
        data = link.fetch(answer.data)
        return [
            torch.from_numpy(np.array(raw)).view(buffer.dtype).view(len(page_ids), *buffer.shape[1:])
            for raw, buffer in zip(data, self.buffers(replica), strict=True)
        ]

    def close(self) -> None:
        self._stopped.set()
        self._cluster.stop(self._runtime)

    def leave(self) -> None:
        self._stopped.set()
        with suppress(SchedulerLostError):  # nothing is left to be released then
            self._scheduler.ask(m.Disconnect())
