"""One driver of an overloaded cluster: offers requests at a rate, serves what is let in, and notes what became of each.

It runs in an actor of its own and attaches to a named cluster as any driver would. A forward is real but for its
arithmetic: it holds its replica, and all drivers that want it, for as long as a GPU would take for the tokens.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from rayk.context import TextContext
from rayk.errors import OverloadedError, RaykError
from rayk.kvcache.tick import Tick, TickResult
from rayk.manager.async_manager import AsyncPagedKVCacheManager
from rayk.params import KVCacheParams, MHAKVCacheParams
from rayk.protocol.admission import AdmissionPolicy
from rayk.session import InferenceSession

VOCABULARY = 1 << 30
LAST_WORDS = 0.1  # seconds in which the scheduler hears of the last releases
STALLS = 200  # ticks in a row in which a replica refused all growth


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster, its pace, and what a request is: tokens are drawn between the two numbers."""

    name: str
    replicas: int = 2
    pages: int = 128
    page_size: int = 64
    rows: int = 4
    base: float = 0.05  # seconds of a forward, whatever is in it
    per_token: float = 0.0002
    budget: int = 512  # tokens of one forward
    prompt: tuple[int, int] = (100, 500)
    output: tuple[int, int] = (8, 24)
    policy: AdmissionPolicy = AdmissionPolicy()

    def params(self) -> KVCacheParams:
        """Small pages: memory is not what this is about."""
        return MHAKVCacheParams(
            dtype="float32",
            n_kv_heads=1,
            head_dim=2,
            num_layers=1,
            page_size=self.page_size,
            devices=["cpu"] * self.replicas,
            data_parallel_degree=self.replicas,
            enable_prefix_caching=True,
            enable_dp_cross_replica_prefix_copy=False,
        )

    def options(self) -> dict[str, Any]:
        """What every manager of the cluster is made with."""
        return {"max_batch_size": 4 * self.rows, "admission": self.policy}


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """`rate` requests a second arrive at random for `seconds`; or, with `in_flight`, that many are always under way.
    `deadline` in seconds from arrival; `skip`: what arrives in the first seconds is served and not counted."""

    seconds: float
    rate: float = 0.0
    in_flight: int = 0
    deadline: float | None = None
    skip: float = 0.0


class Outcome(msgspec.Struct):
    """What became of a driver's requests, of those that count. Seconds; `latencies` from arrival to the last token,
    `waits` from arrival until it was let in or turned away."""

    offered: int = 0
    latencies: list[float] = []
    waits: list[float] = []
    refused_after: list[float] = []
    retry_after: list[float] = []
    errors: list[str] = []

    @property
    def refused(self) -> int:
        """Turned away with a typed error."""
        return len(self.refused_after)


class PacedForward:
    """A forward that takes its time."""

    def __init__(self, base: float, per_token: float) -> None:
        self.base = base
        self.per_token = per_token

    def __call__(self, inputs: Any, batch: Sequence[TextContext]) -> None:
        time.sleep(self.base + self.per_token * sum(ctx.tokens.active_length for ctx in batch))


class _Flight:
    """A request that was let in."""

    __slots__ = ("ctx", "done", "finished_at", "left")

    def __init__(self, ctx: TextContext, left: int, done: asyncio.Future[None]) -> None:
        self.ctx = ctx
        self.left = left
        self.done = done
        self.finished_at = 0.0


class _Lane:
    """What one replica does for this driver."""

    def __init__(self) -> None:
        self.running: list[_Flight] = []
        self.executed: list[_Flight] = []
        self.finished: list[_Flight] = []
        self.stalled = 0

    def tick(self, load: Load) -> tuple[Tick, list[_Flight]]:
        """The next iteration, and what is in its forward: each decoding request, and prefill up to the budget."""
        batch, room = [], load.budget
        for flight in sorted(self.running, key=lambda each: each.ctx.tokens.active_length > 1):
            window = flight.ctx.tokens
            if room <= 0:
                break
            if window.active_length > room:
                window.chunk(room)
            room -= window.active_length
            batch.append(flight)
        grown = [f.ctx for f in batch if f.ctx.tokens.active_length == 1]
        return (
            Tick(
                step=[f.ctx for f in self.executed],
                release=[f.ctx.request_id for f in self.finished],
                alloc=grown,
                execute=[f.ctx for f in batch],
            ),
            batch,
        )

    def after(self, batch: list[_Flight], result: TickResult) -> None:
        """Windows move on; what is complete leaves with the next tick."""
        for flight in self.finished:
            if not flight.done.done():
                flight.done.set_result(None)
        self.finished, self.executed = [], []
        for flight in batch:
            if flight.ctx.request_id in result.refused:
                continue
            chunked = flight.ctx.tokens.end < flight.ctx.tokens.length
            flight.ctx.update(1)
            self.executed.append(flight)
            flight.left -= not chunked
            if not flight.left:
                flight.finished_at = time.monotonic()
                self.running.remove(flight)
                self.finished.append(flight)
        self.stalled = 0 if self.executed or not batch else self.stalled + 1
        assert self.stalled < STALLS, "every request needs a page that none of them gives back"


class OverloadDriver:
    """The actor: attaches to the cluster `load.name` as `tenant`. Ray must not take it for one with an event loop, so
    what awaits is in a class of its own."""

    def __init__(self, load: Load, tenant: str, seed: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._session = InferenceSession(runtime="ray", name=load.name)
        manager = AsyncPagedKVCacheManager(load.params(), self._session, load.pages, **load.options())
        self._server = _Server(load, tenant, random.Random(seed), manager)

    def ping(self) -> int:
        """The process."""
        return os.getpid()

    def run(self, phase: Phase) -> Outcome:
        """Serve one phase to its end."""
        return self._loop.run_until_complete(self._server.run(phase))


class _Server:
    """Offers and serves, in one event loop."""

    def __init__(self, load: Load, tenant: str, draw: random.Random, manager: AsyncPagedKVCacheManager) -> None:
        self._load = load
        self._tenant = tenant
        self._random = draw
        self._manager = manager
        self._numbers = 0

    async def run(self, phase: Phase) -> Outcome:
        """Serve one phase to its end."""
        self._lanes = [_Lane() for _ in range(self._load.replicas)]
        self._work = asyncio.Event()
        outcome, start = Outcome(), time.monotonic()
        loop = asyncio.get_running_loop()
        serving = loop.create_task(self._serve())
        tasks: set[asyncio.Task[None]] = set()
        due = start

        def begin(at: float) -> None:
            task = loop.create_task(self._one(phase, outcome, at, at - start >= phase.skip))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        while (now := time.monotonic()) < start + phase.seconds:
            if phase.in_flight:
                while len(tasks) < phase.in_flight:
                    begin(time.monotonic())
                await asyncio.wait({serving, *tasks}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            else:
                while due <= now:
                    begin(due)
                    due += self._random.expovariate(phase.rate)
                await asyncio.wait({serving}, timeout=max(0.0, min(due, start + phase.seconds) - time.monotonic()))
            if serving.done():
                serving.result()
        while tasks:
            await asyncio.wait({serving, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        await asyncio.sleep(LAST_WORDS)
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        return outcome

    async def _one(self, phase: Phase, outcome: Outcome, arrived: float, counts: bool) -> None:
        load, draw = self._load, self._random
        self._numbers += 1
        tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randint(*load.prompt))]
        output = draw.randint(*load.output)
        ctx = TextContext(
            f"{self._tenant}-{self._numbers}",
            tokens,
            len(tokens) + output,
            tenant=self._tenant,
            deadline=phase.deadline,
        )
        outcome.offered += counts
        try:
            [admission] = await self._manager.try_admit([ctx])
            waited = time.monotonic() - arrived
            if admission.error is not None:
                raise admission.error
        except OverloadedError as error:
            if counts:
                outcome.refused_after.append(time.monotonic() - arrived)
                outcome.retry_after.append(error.retry_after)
            return
        except RaykError as error:
            outcome.errors.append(f"{type(error).__name__}: {error}")
            return
        flight = _Flight(ctx, output, asyncio.get_running_loop().create_future())
        self._lanes[admission.replica].running.append(flight)
        self._work.set()
        await flight.done
        if counts:
            outcome.waits.append(waited)
            outcome.latencies.append(flight.finished_at - arrived)

    async def _serve(self) -> None:
        """Iterate while there is anything to do."""
        load, forward = self._load, PacedForward(self._load.base, self._load.per_token)
        while True:
            made = [lane.tick(load) for lane in self._lanes]
            if all(tick.empty for tick, _ in made):
                self._work.clear()
                await self._work.wait()
                continue
            results = await self._manager.tick([tick for tick, _ in made], forward)
            for lane, (_, batch), result in zip(self._lanes, made, results, strict=True):
                lane.after(batch, result)
