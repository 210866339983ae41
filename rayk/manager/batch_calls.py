"""What a driver asks of replicas for batches of its requests: steps, forwards, their inputs and whole ticks.

Messages go straight to the replicas. Tokens are sent once: later messages carry only new ones.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayk import protocol as m
from rayk.actors.channel import Pending
from rayk.context import TextContext
from rayk.errors import (
    InsufficientBlocksError,
    LeaseLostError,
    NotClaimedError,
    RaykError,
    RuntimeInputsError,
    StaleContextError,
)
from rayk.kvcache.iteration import Batches, Forward
from rayk.kvcache.request import refuse_twice
from rayk.kvcache.runtime_inputs import BatchCharacteristics, BatchShape, ReplicaInputs, no_inputs, table_only
from rayk.kvcache.tick import Tick, TickResult
from rayk.manager.cluster_view import Script, current, result_of
from rayk.manager.placing_calls import PlacingCalls
from rayk.protocol.context_sync import apply_move

Command = Callable[[int, list[m.ContextView]], Any]


class BatchCalls(PlacingCalls):
    """Calls about one batch for each replica index."""

    @current
    def alloc_many(self, batches: Batches) -> Script[list[dict[str, InsufficientBlocksError]]]:
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
        results = yield from self.tick(steady, None)
        for r, result in enumerate(results):
            if result.error is not None:
                raise result.error
            refused[r].update(result.refused)
        return refused

    def _views(self, ctxs: Sequence[TextContext], replica: int, claims: Sequence[int]) -> list[m.ContextView]:
        view = self._sender.view
        return [view(ctx, replica, generation=claim) for ctx, claim in zip(ctxs, claims, strict=True)]

    def _refuse_twice(self, batches: Batches) -> None:
        for r, batch in enumerate(batches):
            if len(batch) > 1:
                refuse_twice([ctx.request_id for ctx in batch], r)

    def _each(self, batches: Batches, command: Command) -> Script[list[Any]]:
        """The result of each replica; the first error is raised when all have done theirs."""
        results, errors = yield from self._of_each(batches, command)
        if errors:
            raise errors[min(errors)]
        return results

    def _forward(self, batches: Batches, command: Command) -> Script[list[Any]]:
        """The same for what reads pages: a request that was handed over is one that is not claimed there."""
        try:
            return (yield from self._each(batches, command))
        except LeaseLostError as error:
            told = yield from self.explained(error)
            if isinstance(told, LeaseLostError):
                raise told from None
            why = f"request {error.request_id!r} is not claimed here; {told}"
            raise RuntimeInputsError(error.replica, why) from None

    def _of_each(self, batches: Batches, command: Command) -> Script[tuple[list[Any], dict[int, RaykError]]]:
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
                if not batches[r] and r not in self.allocators:
                    continue  # a hole, and nothing is to be done
                try:
                    message = command(r, self._views(batches[r], r, claims[r]))
                    if message is not None:
                        sent.append((r, self.link(r).send(message)))
                except RaykError as error:
                    errors[r] = error
            due = []
            answers = yield [pending for _, pending in sent]
            for (r, _), reply in zip(sent, answers, strict=True):
                try:
                    result = result_of(reply)
                    self._mark_sent(batches[r], r)
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

    def _mark_sent(self, batch: Sequence[TextContext], replica: int) -> None:
        for ctx in batch:
            if self._placed.get(ctx.request_id) == replica:
                self._sender.mark_sent(ctx, replica)

    @current
    def step(self, batches: Batches) -> Script[None]:
        yield from self._each(batches, lambda r, views: m.Step(views) if views else None)

    @current
    def execute(self, batches: Batches, fn: Forward) -> Script[list[Any]]:
        pickled = self._pickled(fn)
        values = yield from self._forward(batches, lambda r, views: m.Execute(views, pickled))
        return [pickle.loads(value.data) if value is not None else None for value in values]

    _by_reference: tuple[Forward | None, bytes] = (None, b"")
    """The last function that replicas import, and how that is said."""

    def _pickled(self, fn: Forward) -> bytes:
        known, pickled = self._by_reference
        if known is not fn:
            pickled = self._runtime.dumps(fn)
            if _is_imported(fn) and pickle.loads(pickled) is fn:
                self._by_reference = fn, pickled
        return pickled

    @current
    def runtime_inputs(
        self, batches: Batches, max_cache_length: int | None, characteristics: BatchCharacteristics | None
    ) -> Script[list[ReplicaInputs]]:
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
    def tick(self, ticks: Sequence[Tick], fn: Forward | None) -> Script[list[TickResult]]:
        pickled = self._pickled(fn) if fn is not None else b""
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


def _is_imported(fn: Forward) -> bool:
    """Whether it is a module's function. Any other, and one of a script, travels by value, which may change."""
    module = getattr(fn, "__module__", "__main__")
    return module != "__main__" and getattr(sys.modules.get(module), getattr(fn, "__qualname__", ""), None) is fn
