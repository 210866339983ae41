"""A tick on one replica: the steps, releases, allocations and the forward of one iteration of a serving loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError
from rayk.kvcache import decode
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.request import refuse_twice
from rayk.kvcache.runtime_inputs import ReplicaInputs
from rayk.kvcache.tick import Tick, TickResult

Batches = Sequence[Sequence[TextContext]]


Forward = Callable[[ReplicaInputs, Sequence[TextContext]], Any]


def run_forward(core: ReplicaCore, batch: Sequence[TextContext], fn: Forward) -> Any:
    """`fn` on one replica's inputs and read-only copies of its contexts."""
    return fn(core.runtime_inputs(batch), [ctx.snapshot() for ctx in batch])


def run_tick(core: ReplicaCore, tick: Tick, fn: Forward | None) -> TickResult:
    """One replica's part of a tick, in the order that Tick promises.

    An error ends the tick and is in the result, with what was done before it. A tick that names a request which is
    not claimed does nothing.
    """
    done = _Progress()
    try:
        _check_claimed(core, tick)
        done.step(core, tick)
        done.alloc(core, tick)
        done.execute(core, tick, fn)
    except Exception as error:
        done.error = error
    usage = core.usage
    return TickResult(
        value=done.value,
        refused=done.refused,
        free_pages=usage.free,
        used_pages=usage.used,
        step_seconds=done.step_seconds,
        alloc_seconds=done.alloc_seconds,
        waiting=done.waiting,
        released=done.released,
        error=done.error,
    )


def _check_claimed(core: ReplicaCore, tick: Tick) -> None:
    for part in (tick.step, tick.alloc, tick.execute):
        if not (type(part) is ContextBatch and decode.ready(core, part)):
            core.claimed(part)
    if len(tick.release) > 1:
        refuse_twice(tick.release, core.replica)
    for request_id in tick.release:
        if request_id not in core.requests:
            raise core.not_claimed(request_id)


@dataclass
class _Progress:
    """What a tick has come to so far."""

    value: Any = None
    refused: dict[str, InsufficientBlocksError] = field(default_factory=dict)
    step_seconds: float = 0.0
    alloc_seconds: float = 0.0
    released: int = 0
    waiting: frozenset[str] = frozenset()
    error: Exception | None = None

    def step(self, core: ReplicaCore, tick: Tick) -> None:
        start = perf_counter()
        core.step(tick.step)
        self.step_seconds = perf_counter() - start
        for request_id in tick.release:
            core.release(request_id)
            self.released += 1

    def alloc(self, core: ReplicaCore, tick: Tick) -> None:
        start = perf_counter()
        self.refused = core.alloc_many(tick.alloc)
        self.alloc_seconds = perf_counter() - start

    def execute(self, core: ReplicaCore, tick: Tick, fn: Forward | None) -> None:
        batch = tick.execute
        if self.refused:
            batch = [ctx for ctx in batch if ctx.request_id not in self.refused]
        if batch and core.loads_under_way:
            late = frozenset(ctx.request_id for ctx in batch if core.loading(ctx))
            if len(late) < len(batch):  # else the forward waits for them
                self.waiting = late
                batch = [ctx for ctx in batch if ctx.request_id not in late]
        if batch and fn is not None:
            self.value = run_forward(core, batch, fn)
