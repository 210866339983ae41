"""What a driver says to its cluster: each call as a script of rounds, so that it can be waited for or awaited.

A script sends a round of messages, one per replica, yields them, and is sent their answers; its result is the
call's. claim and alloc go through the scheduler; step, execute, runtime_inputs, release and ticks go straight to the
replicas. Tokens are sent once: later messages carry only new ones. Several scripts may be under way at once.

Who is there may change (rayk.manager.cluster_view): a script begins with the latest roster that was heard of, and ends
with it, so that what its result names can be called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from rayk import protocol as m
from rayk.actors.channel import Answer, Pending, Traffic
from rayk.actors.interface import Runtime
from rayk.actors.launch import Deployment, desk_settings
from rayk.context import TextContext
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    InsufficientBlocksError,
    LeaseLostError,
    NotClaimedError,
    OverloadedError,
    RaykError,
    RuntimeInputsError,
    StaleContextError,
    TokenError,
    UnsendableError,
    cannot_be_sent,
)
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.connector import TierCount
from rayk.kvcache.iteration import Batches, Forward
from rayk.kvcache.request import Usage, refuse_twice
from rayk.kvcache.runtime_inputs import BatchCharacteristics, BatchShape, no_inputs, table_only
from rayk.kvcache.tick import Admission, HitCounts, Tick, TickResult
from rayk.manager.cluster_view import Call, current, result_of
from rayk.manager.scaling_calls import ScalingCalls
from rayk.protocol.columns import AdmitResults
from rayk.protocol.context_sync import apply_move
from rayk.scheduler.admission.queue import SOONEST
from rayk.values import checked_request_id

UNSENT = (TokenError, UnsendableError)  # of rayk's errors, those of what cannot be written as a message
FORGOTTEN = "its driver was silent for longer than its lease"
MOST_TOGETHER = 1024  # requests of one message: about 30 ms of the scheduler's time, which others wait for
TOKENS_TOGETHER = 4 << 20  # tokens of one message, unless one request has more


class _Abandoned(NamedTuple):
    """A message that places requests and whose answer nobody waited for: the call was interrupted, or timed out."""

    pending: Pending
    request_ids: list[str]
    replica: int = -1  # of a claim


class Calls(ScalingCalls):
    """The messages of one driver to one running Cluster; `name` is that of its detached actors, if they are that."""

    def __init__(self, runtime: Runtime, cluster: Deployment, name: str | None = None) -> None:
        super().__init__(runtime, cluster, name)
        params = cluster.config.params
        self._params = params
        self._copies = params.copies_prefixes
        self.prefill_rate: float | None = None  # tokens a second of a replica; what is quicker to compute is not copied
        settings = desk_settings(cluster.config, cluster.pages)
        self._keys = settings.keys() if settings.wants_keys else None
        self._waiting: dict[str, TextContext] = {}  # offered, and not known yet what became of it
        self._note: Pending | None = None  # tells the scheduler what was released; nobody waited for the answer yet
        self._abandoned: list[_Abandoned] = []
        self._became: list[tuple[TextContext, Admission]] = []  # settled by an answer that nobody waited for

    # -- requests ----------------------------------------------------------------------------------

    @current
    def claim(self, request_id: str, replica: int, dummy: bool = False) -> Call:
        request_id = checked_request_id(request_id)
        yield from self._noted()
        command = m.ClaimOne(request_id, replica, dummy, self._take_released())
        done: m.Claimed = yield from self._ask_placing(command, [request_id], replica)
        self._sender.forget(request_id)
        self._claimed(request_id, replica, done.generation)

    def _ask_placing(self, command: Any, request_ids: list[str], replica: int = -1) -> Call:
        """One message that places requests. A caller that is interrupted, or waits for too long, leaves nothing
        placed: that is given back at once, or before this driver places anything else."""
        abandoned = _Abandoned(self.scheduler.send(command), request_ids, replica)
        try:
            [heard] = yield [abandoned.pending]
        except GeneratorExit:
            raise
        except BaseException:
            self._abandoned.append(abandoned)
            yield from self._give_back(abandoned)
            raise
        if isinstance(heard, CallTimeoutError):
            self._abandoned.append(abandoned)
        return result_of(heard)

    @current
    def contains(self, request_id: str, replica: int) -> Call:
        request_id = checked_request_id(request_id)
        done: m.BlocksDone = yield from self._ask(self.link(replica), m.Blocks(request_id))
        return done.claimed

    @current
    def blocks(self, request_id: str, replica: int) -> Call:
        request_id = checked_request_id(request_id)
        done: m.BlocksDone = yield from self._ask(self.link(replica), m.Blocks(request_id))
        mine = self._claims.get(request_id, done.generation)
        if done.generation not in (0, mine):
            raise LeaseLostError(request_id, replica, replica, self.client, mine, done.client, done.generation)
        return done.page_ids

    @current
    def release(self, request_id: str, replica: int, force: bool = False) -> Call:
        request_id = checked_request_id(request_id)
        holder, generation = self._placed.get(request_id, -1), self._claims.get(request_id, 0)
        if holder not in (-1, replica) and not force:
            raise NotClaimedError(request_id, replica, holder)
        done = yield from self._ask(self.link(replica), m.Release([request_id], False, [generation], force))
        if not force or done.generations == [generation]:
            self._gone(request_id)
        else:  # another driver's, or this driver's that it does not know of
            self._released[request_id] = done.generations[0]

    @current
    def release_many(self, request_ids: Sequence[str]) -> Call:
        """Release requests that this driver placed, one message per replica; why those were not that are not there."""
        by_replica: dict[int, dict[str, int]] = {}
        for request_id in request_ids:
            by_replica.setdefault(self._placed[request_id], {})[request_id] = self._claims.get(request_id, 0)
        sent: list[tuple[int, Pending]] = []
        errors: list[RaykError] = []
        for replica, claims in by_replica.items():
            try:
                release = m.Release(list(claims), True, list(claims.values()))
                sent.append((replica, self.link(replica).send(release)))
            except RaykError as error:
                errors.append(error)
        answers = yield [pending for _, pending in sent]
        lost: dict[str, RaykError] = {}
        for (replica, _), heard in zip(sent, answers, strict=True):
            if isinstance(heard, RaykError):
                errors.append(heard)
                continue
            claims, missing = by_replica[replica], heard.result
            if isinstance(missing, m.Missing):
                for request_id, owner, now in zip(*missing.columns, strict=True):
                    holder = replica if now else -1
                    whose = (self.client, claims.pop(request_id), owner, now)
                    lost[request_id] = LeaseLostError(request_id, replica, holder, *whose)
            for request_id, claim in claims.items():
                if self._claims.get(request_id, 0) == claim:
                    self._gone(request_id)
        for request_id, reason in lost.items():
            lost[request_id] = yield from self.explained(reason)
        if errors:
            raise errors[0]
        for heard in answers:
            result_of(heard)
        return lost

    def _gone(self, request_id: str) -> None:
        self._sender.forget(request_id)
        self._placed.pop(request_id, None)
        self._released[request_id] = self._claims.pop(request_id, 0)

    @current
    def alloc(self, ctx: TextContext, replica: int) -> Call:
        [admission] = yield from self._place([ctx], [replica], claim=False, stop_on_error=True)
        if admission.error is not None:
            raise admission.error

    @current
    def alloc_many(self, batches: Batches) -> Call:
        """Decode steps in one message per replica; contexts that may find cached pages one by one, like alloc()."""
        self._refuse_twice(batches)
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
                        yield from self.alloc(ctx, r)
                except InsufficientBlocksError as error:
                    refused[r][ctx.request_id] = error
        results: list[TickResult] = yield from self.tick(steady, None)
        for r, result in enumerate(results):
            if result.error is not None:
                raise result.error
            refused[r].update(result.refused)
        return refused

    @current
    def try_admit(self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, stop_on_error: bool) -> Call:
        """In messages of a bounded size, one after the other: other drivers' come in between."""
        admissions: list[Admission] = []
        try:
            for part in parts(ctxs):
                targets = None if replicas is None else replicas[part.start : part.stop]
                admissions += yield from self._place(ctxs[part], targets, claim=True, stop_on_error=stop_on_error)
                if stop_on_error and admissions[-1].error is not None:
                    return admissions + [Admission(-1, admissions[-1].error)] * (len(ctxs) - len(admissions))
        except GeneratorExit:
            raise
        except BaseException:
            held = [c.request_id for c, a in zip(ctxs, admissions, strict=False) if a.error is None]
            with suppress(RaykError):  # where that fails, they are gone, too
                yield from self.release_many(held)
            raise
        return admissions

    def _place(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, claim: bool, stop_on_error: bool
    ) -> Call:
        if not ctxs:
            return []
        peers = self._copies and len(self.replicas) > 1 and (claim or any(map(self._may_copy, ctxs)))

        yield from self._noted()
        generations = [] if claim else [self._generation(ctx) for ctx in ctxs]

        def command() -> m.PlaceMany:
            at = replicas[0] if replicas is not None and not claim else -1
            contexts = self._sender.pack(ctxs, at, whole=claim or peers)
            targets = list(replicas) if replicas is not None else []
            seen, unfilled = self.heard("seen"), self.heard("unfilled")
            keys = self._page_keys(ctxs) if claim or peers else b""
            how = (stop_on_error, seen, unfilled, self.cluster.joined, False, self.prefill_rate, keys, generations)
            return m.PlaceMany(contexts, targets, claim, peers, self._take_released(), *how)

        ids, released = [ctx.request_id for ctx in ctxs] if claim else [], self._released
        try:
            done: m.PlaceDone = yield from self._ask_placing(command(), ids)
        except (TypeError, ValueError, OverflowError) as error:  # it could not be written as a message
            if isinstance(error, RaykError) and not isinstance(error, UNSENT):
                raise
            self._released = released
            return (yield from self._place_apart(ctxs, replicas, claim, stop_on_error, error))
        stale = any(isinstance(m.to_error(failure), StaleContextError) for failure in done.failures.values())
        if stale and not claim:
            self._sender.forget(ctxs[0].request_id)
            done = yield from self._ask(self.scheduler, command())
        return self._landed(ctxs, done)

    def _place_apart(
        self,
        ctxs: Sequence[TextContext],
        replicas: Sequence[int] | None,
        claim: bool,
        stop_on_error: bool,
        error: Exception,
    ) -> Call:
        """_place() of requests of which one cannot be sent, by halves: it fails, and the others do not."""
        if len(ctxs) == 1:
            return [Admission(-1 if replicas is None else replicas[0], cannot_be_sent(ctxs[0].request_id, error))]
        admissions: list[Admission] = []
        for half in (slice(0, len(ctxs) // 2), slice(len(ctxs) // 2, len(ctxs))):
            if not (stop_on_error and admissions and admissions[-1].error is not None):
                targets = None if replicas is None else replicas[half]
                admissions += yield from self._place(ctxs[half], targets, claim, stop_on_error)
        return admissions + [admissions[-1]] * (len(ctxs) - len(admissions))

    @current
    def enter(self, ctxs: Sequence[TextContext], given_up: Sequence[str]) -> Call:
        """Offer requests, and hear what became of those and of earlier ones: context and Admission of each."""
        yield from self._noted()
        fresh: dict[str, TextContext] = {}
        again: list[TextContext] = []
        for ctx in ctxs:
            if ctx.request_id in self._waiting or fresh.setdefault(ctx.request_id, ctx) is not ctx:
                again.append(ctx)
        offers = list(fresh.values())
        due = [offers[part] for part in parts(offers)] or [[]]
        while due:
            offers, released = due.pop(0), self._released
            self._waiting.update((ctx.request_id, ctx) for ctx in offers)
            try:
                done: m.EnterDone = yield from self._ask_placing(self._entering(offers, given_up, True), [])
            except (RaykError, TypeError, ValueError, OverflowError) as error:
                if isinstance(error, CallTimeoutError):
                    raise  # they may wait there
                for ctx in offers:
                    del self._waiting[ctx.request_id]
                if isinstance(error, RaykError) and not isinstance(error, UNSENT):
                    raise
                self._released = released  # nothing was sent
                if len(offers) > 1:
                    due[:0] = [offers[: len(offers) // 2], offers[len(offers) // 2 :]]
                else:
                    self._became += [(c, Admission(-1, cannot_be_sent(c.request_id, error))) for c in offers]
            else:
                self._became += self._entered(done)
                given_up = ()
        became, self._became = self._became, []
        return became + [(c, Admission(-1, AlreadyClaimedError(c.request_id, -1))) for c in again]

    def _entered(self, done: m.EnterDone) -> list[tuple[TextContext, Admission]]:
        """Who is settled, and what became of each."""
        known = self._waiting
        settled = [known.pop(request_id) for request_id in done.ids]
        became = list(zip(settled, self._landed(settled, done), strict=True))
        if len(known) > done.open:  # those were forgotten there
            for ctx in list(known.values()):
                became.append((ctx, Admission(-1, OverloadedError(ctx.request_id, FORGOTTEN, SOONEST))))
            known.clear()
        return became

    def _entering(self, ctxs: Sequence[TextContext], given_up: Sequence[str], hear: bool) -> m.Enter:
        return m.Enter(
            self._sender.pack(ctxs, whole=True),
            self._copies,
            self._take_released(),
            list(given_up),
            self.heard("seen"),
            self.heard("unfilled"),
            self.heard("turn"),
            self.heard("used"),
            hear,
            self.cluster.joined,
            self._page_keys(ctxs),
            self.prefill_rate,
        )

    def note_released(self) -> None:
        """Tell the scheduler at once what was released, for those who wait there; do not wait for its answer."""
        if self._released and self._note is None:
            with suppress(RaykError):  # the next call of the driver will say so
                self._note = self.scheduler.send(self._entering([], [], hear=False))

    def _noted(self) -> Call:
        """Wait for the answer to a note, lest it arrives after an id in it was claimed again."""
        note, self._note = self._note, None
        if note is not None:
            [heard] = yield [note]
            result_of(heard)
        while self._abandoned:
            yield from self._give_back(self._abandoned[0])

    def _give_back(self, abandoned: _Abandoned) -> Call:
        """Release what a message placed whose answer nobody waited for; of an offer, keep what became of it."""
        [heard] = yield [abandoned.pending]
        if isinstance(heard, CallTimeoutError):
            raise heard
        self._abandoned.remove(abandoned)
        if isinstance(heard, RaykError) or isinstance(heard.result, m.Failure):
            return  # nothing was placed, or it is lost
        done, ids, where = heard.result, abandoned.request_ids, dict[str, int]()
        made: dict[str, int] = {}
        if isinstance(done, m.EnterDone):
            self._became += self._entered(done)
        elif isinstance(done, m.PlaceDone):
            refused = set(AdmitResults.received(done.numbers, done.seconds, done.failures, len(ids)).refused)
            where = {i: r for at, (i, r) in enumerate(zip(ids, done.replicas, strict=True)) if at not in refused}
            made = dict(zip(ids, done.generations, strict=True))
        else:
            where, made = dict.fromkeys(ids, abandoned.replica), dict.fromkeys(ids, done.generation)
        for request_id, replica in where.items():
            self._claimed(request_id, replica, made[request_id])
        with suppress(RaykError):  # where that fails, they are gone, too
            yield from self.release_many(list(where))

    def _page_keys(self, ctxs: Sequence[TextContext]) -> bytes:
        """The keys that a router goes by, made here and not by the scheduler, of which there is one for all drivers."""
        keys = self._keys
        if keys is None or self.indices < 2:  # else there is no choice
            return b""
        size, joined = self._params.page_size, []
        for ctx in ctxs:
            pages = keys.pages(ctx.tokens.length, 0 if ctx.plain else ctx.pending_future_count)
            if pages:
                joined.append(keys.joined(ctx.tokens.data[: pages * size].tobytes(), ctx.root_key))
        return b"".join(joined)

    def _may_copy(self, ctx: TextContext) -> bool:
        """Whether the next alloc of a claimed request looks for a cached prefix."""
        window = ctx.tokens
        first = ctx.request_id not in self._placed
        return first or window.processed == 0 or window.end - window.processed != 1

    def _landed(self, ctxs: Sequence[TextContext], done: m.PlaceDone | m.EnterDone) -> list[Admission]:
        """Move windows to where the replicas' alloc left them, and remember who has what."""
        outcomes = AdmitResults.received(done.numbers, done.seconds, done.failures, len(ctxs))
        admissions: list[Admission] = []
        arrived = self._sender.arrived
        generations = done.generations or [0] * len(ctxs)
        for ctx, replica, row, (claim, alloc), generation in zip(
            ctxs, done.replicas, outcomes.rows, outcomes.seconds.tolist(), generations, strict=True
        ):
            processed, end, cached, device, peer, host, disk = row
            if processed < 0:
                # Requests that were not tried failed for the reason of the first that was refused.
                at = len(admissions) if len(admissions) in done.failures else min(done.failures)
                admissions.append(Admission(replica, m.to_error(done.failures[at])))
                continue
            window = ctx.tokens
            window.processed, window.end = processed, end
            ctx.cached_prefix_length = None if cached < 0 else cached
            arrived(ctx, replica)
            if generation:
                self._claimed(ctx.request_id, replica, generation)
            ctx.generation = self._claims.get(ctx.request_id, 0)
            admissions.append(Admission(replica, None, device, peer, host, disk, claim, alloc))
        return admissions

    # -- batches -----------------------------------------------------------------------------------

    def _generation(self, ctx: TextContext) -> int:
        """The claim that a call with this context means: this driver's present one, unless that goes on with another
        context and this one is of an earlier claim."""
        generation = self._claims.get(ctx.request_id, 0)
        if ctx.generation not in (generation, 0) and self._sender.knows_another(ctx):
            return ctx.generation
        return generation

    def _views(self, ctxs: Sequence[TextContext], replica: int, claims: Sequence[int]) -> list[m.ContextView]:
        view = self._sender.view
        return [view(ctx, replica, generation=claim) for ctx, claim in zip(ctxs, claims, strict=True)]

    def _refuse_twice(self, batches: Batches) -> None:
        for r, batch in enumerate(batches):
            if len(batch) > 1:
                refuse_twice([ctx.request_id for ctx in batch], r)

    def _each(self, batches: Batches, command: Callable[[int, list[m.ContextView]], Any]) -> Call:
        """The result of each replica; the first error is raised when all have done theirs."""
        results, errors = yield from self._of_each(batches, command)
        if errors:
            raise errors[min(errors)]
        return results

    def _forward(self, batches: Batches, command: Callable[[int, list[m.ContextView]], Any]) -> Call:
        """The same for what reads pages: a request that was handed over is one that is not claimed there."""
        try:
            return (yield from self._each(batches, command))
        except LeaseLostError as error:
            told: RaykError = yield from self.explained(error)
            if isinstance(told, LeaseLostError):
                raise told from None
            why = f"request {error.request_id!r} is not claimed here; {told}"
            raise RuntimeInputsError(error.replica, why) from None

    def _of_each(self, batches: Batches, command: Callable[[int, list[m.ContextView]], Any]) -> Call:
        """One message to each replica whose command is not None: results, and errors by replica.

        A replica that lacks earlier tokens has done nothing and gets its message again, whole. So does one whose loads
        from a tier failed, with the windows moved back to what it has.
        """
        results: list[Any] = [None] * len(batches)
        # Whatever is sent again is about the same claims: an id may be claimed anew meanwhile.
        claims = [[self._generation(ctx) for ctx in batch] for batch in batches]
        errors: dict[int, RaykError] = {}
        due = list(range(len(batches)))
        whole: set[int] = set()  # replicas that lacked tokens
        while due:
            sent: list[tuple[int, Pending]] = []
            for r in due:
                if not batches[r] and r not in self.replicas:
                    continue  # nobody is there, and nothing is to be done
                try:
                    message = command(r, self._views(batches[r], r, claims[r]))
                    if message is not None:
                        sent.append((r, self.link(r).send(message)))
                except RaykError as error:
                    errors[r] = error
            due = []
            answers = yield [pending for _, pending in sent]
            for (r, _), heard in zip(sent, answers, strict=True):
                try:
                    result = result_of(heard)
                    self._arrived(batches[r], r)
                    if isinstance(result, m.MovedBack):
                        self._move_back(batches[r], result)
                        due.append(r)
                    else:
                        results[r] = result
                except StaleContextError as error:
                    for ctx in batches[r]:
                        self._sender.forget(ctx.request_id)
                    if r in whole:
                        errors[r] = error
                    else:
                        whole.add(r)
                        due.append(r)
                except RaykError as error:
                    errors[r] = error
        return results, errors

    @staticmethod
    def _move_back(batch: Sequence[TextContext], back: m.MovedBack) -> None:
        for ctx in batch:
            if ctx.request_id in back.moved:
                apply_move(ctx, back.moved[ctx.request_id])

    def _arrived(self, batch: Sequence[TextContext], replica: int) -> None:
        for ctx in batch:
            if self._placed.get(ctx.request_id) == replica:
                self._sender.arrived(ctx, replica)

    @current
    def step(self, batches: Batches) -> Call:
        yield from self._each(batches, lambda r, views: m.Step(views) if views else None)

    @current
    def execute(self, batches: Batches, fn: Forward) -> Call:
        pickled = self._runtime.dumps(fn)
        values = yield from self._forward(batches, lambda r, views: m.Execute(views, pickled))
        return [pickle.loads(value.data) if value is not None else None for value in values]

    @current
    def runtime_inputs(
        self, batches: Batches, max_cache_length: int | None, characteristics: BatchCharacteristics | None
    ) -> Call:
        bounds = (
            (characteristics.batch_size, characteristics.max_prompt_length, characteristics.max_cache_valid_length)
            if characteristics is not None
            else None
        )
        done: list[m.InputsDone | None] = yield from self._forward(
            batches, lambda r, views: m.Inputs(views, max_cache_length, bounds)
        )
        shards = dict.fromkeys(self._params.leaves, self._params.tensor_parallel_degree)
        return [
            table_only(
                shards,
                np.frombuffer(bytearray(d.table), np.int32).reshape(d.rows, d.width),
                np.frombuffer(bytearray(d.lengths), np.int32),
                BatchShape(*d.shape),
            )
            if d is not None
            else no_inputs(self._params)
            for d in done
        ]

    @current
    def tick(self, ticks: Sequence[Tick], fn: Forward | None) -> Call:
        pickled = self._runtime.dumps(fn) if fn is not None else b""
        contexts = [list({id(c): c for c in (*t.step, *t.alloc, *t.execute)}.values()) for t in ticks]
        leaving = [[self._claims.get(request_id, 0) for request_id in t.release] for t in ticks]

        def command(r: int, views: list[m.ContextView]) -> m.RunTick | None:
            tick = ticks[r]
            if tick.empty:
                return None
            at = {id(ctx): i for i, ctx in enumerate(contexts[r])}
            return m.RunTick(
                views,
                [at[id(c)] for c in tick.step],
                list(tick.release),
                [at[id(c)] for c in tick.alloc],
                [at[id(c)] for c in tick.execute],
                pickled if tick.execute else b"",
                leaving[r],
            )

        done, errors = yield from self._of_each(contexts, command)
        results = [self._ticked(tick, d) for tick, d in zip(ticks, done, strict=True)]
        for r, error in errors.items():
            results[r] = TickResult(error=error)
        for r, result in enumerate(results):
            if isinstance(result.error, RaykError):
                results[r] = replace(result, error=(yield from self.explained(result.error)))
        return results

    def _ticked(self, tick: Tick, done: m.TickDone | None) -> TickResult:
        if done is None:
            return TickResult()
        for ctx in (*tick.alloc, *tick.execute) if done.moved else ():
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
            waiting=frozenset(done.waiting),
            released=done.released,
            error=m.to_error(done.failure) if done.failure is not None else None,
        )

    def traffic(self) -> list[Traffic]:
        """What this driver has sent to each replica and to the scheduler, which comes last, and read from them."""
        return [link.traffic if link is not None else Traffic() for link in (*self._links, self.scheduler)]

    # -- queries -------------------------------------------------------------------------------------

    @current
    def usage(self, replica: int) -> Call:
        done: m.UsageDone = yield from self._ask(self.link(replica), m.GetUsage())
        return Usage(done.total, done.free, done.cached)

    @current
    def used_fraction_after(self, ctx: TextContext, replica: int) -> Call:
        view = self._sender.view(ctx, whole=True)
        done: m.Fraction = yield from self._ask(self.link(replica), m.UsedFraction(view))
        return done.value

    @current
    def hit_counts(self, ctx: TextContext) -> Call:
        view = self._sender.view(ctx, whole=True)
        done: m.Counts = yield from self._ask(self.scheduler, m.HitCountsOf(view))
        if not done.host:
            return [HitCounts(pages) for pages in done.counts]
        return [HitCounts(*pages) for pages in zip(done.counts, done.host, done.disk, strict=True)]

    @current
    def metrics(self) -> Call:
        done: m.MetricsDone = yield from self._ask(self.scheduler, m.EveryReplica(m.GetMetrics()))
        return done.metrics

    @current
    def reset_metrics(self) -> Call:
        yield from self._ask(self.scheduler, m.EveryReplica(m.ResetMetrics()))

    @current
    def reset_prefix_cache(self, token: bytes | None) -> Call:
        done: m.ResetDone = yield from self._ask(self.scheduler, m.EveryReplica(m.ResetPrefixCache(token)))
        return done.by_replica

    @current
    def tier_count(self, replica: int) -> Call:
        done: m.TiersDone = yield from self._ask(self.link(replica), m.GetTiers())
        return TierCount(done.host_total, done.host_used, done.disk_total, done.disk_used, done.trouble)

    @current
    def poll_transfers(self) -> Call:
        yield from self._ask(self.scheduler, m.EveryReplica(m.PollTransfers()))

    @current
    def drain(self) -> Call:
        yield from self._ask(self.scheduler, m.EveryReplica(m.Drain()))

    @current
    def check_integrity(self) -> Call:
        done: m.Unasked = yield from self._ask(self.scheduler, m.EveryReplica(m.CheckIntegrity()))
        return done.replicas

    def buffers(self, replica: int) -> list[torch.Tensor]:
        shards = ["meta"] * self._params.tensor_parallel_degree
        return PageBuffers(self._params, self.cluster.pages[replica], shards).all_buffers

    @current
    def read_pages(self, page_ids: Sequence[int], replica: int) -> Call:
        link = self.link(replica)
        if not page_ids:  # no bytes have no stride that another dtype could be read by
            return [torch.empty((0, *buffer.shape[1:]), dtype=buffer.dtype) for buffer in self.buffers(replica)]
        [heard] = yield [link.send(m.ReadPages(list(page_ids)), with_data=True)]
        result_of(heard)
        assert isinstance(heard, Answer)
        data = link.fetch(heard.data)
        return [
            torch.from_numpy(np.array(raw)).view(buffer.dtype).view(len(page_ids), *buffer.shape[1:])
            for raw, buffer in zip(data, self.buffers(replica), strict=True)
        ]


def parts(ctxs: Sequence[TextContext]) -> Iterator[slice]:
    """Cut a batch so that a message has at most MOST_TOGETHER requests and TOKENS_TOGETHER tokens, or one request."""
    start = tokens = 0
    for at, ctx in enumerate(ctxs):
        tokens += ctx.tokens.length
        if at > start and (at - start == MOST_TOGETHER or tokens > TOKENS_TOGETHER):
            yield slice(start, at)
            start, tokens = at, ctx.tokens.length
    if ctxs:
        yield slice(start, len(ctxs))
