"""One driver of an overloaded cluster: offers requests at a rate, serves what is let in, and notes what became of each.

It runs in an actor of its own and attaches to a named cluster as any driver would. A forward is real but for its
arithmetic: it holds its replica, and all drivers that want it, for as long as a GPU would take for the tokens.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from rayk.bench.in_flight import Flight, Lane
from rayk.context import TextContext
from rayk.errors import OverloadedError, RaykError
from rayk.kvcache.tick import TickResult
from rayk.manager.async_manager import AsyncPagedKVCacheManager
from rayk.params import KVCacheParams, MHAKVCacheParams
from rayk.protocol.admission import AdmissionPolicy
from rayk.session import InferenceSession
from rayk.workloads.request import BenchRequest, TokenSpace

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


@dataclass(frozen=True)
class PacedForward:
    """A forward that takes its time: `base` seconds, and so many for each token."""

    base: float
    per_token: float

    def __call__(self, inputs: Any, batch: Sequence[TextContext]) -> None:
        time.sleep(self.base + self.per_token * sum(ctx.tokens.active_length for ctx in batch))


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
        self._load, self._tenant, self._random, self._manager = load, tenant, draw, manager
        self._numbers = 0
        self._space = TokenSpace(tenant)
        self._space.slots(zlib.crc32(tenant.encode()) >> 2)  # tenants share no prompts
        self._done: dict[str, asyncio.Future[None]] = {}

    async def run(self, phase: Phase) -> Outcome:
        """Serve one phase to its end."""
        self._lanes, self._stalled = [Lane(replica) for replica in range(self._load.replicas)], 0
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
        prompt, output = draw.randint(*load.prompt), draw.randint(*load.output)
        runs, first = np.array([[self._space.slots(prompt), prompt]]), self._space.generated(output)
        self._numbers += 1
        request = BenchRequest(
            self._numbers, f"{self._tenant}-{self._numbers}", arrived, None, prompt, output, runs, first
        )
        flight = Flight(request, arrived, {"tenant": self._tenant, "deadline": phase.deadline})
        outcome.offered += counts
        try:
            [admission] = await self._manager.try_admit([flight.context])
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
        flight.prefill = flight.context.tokens.active_length
        done = self._done[flight.request_id] = asyncio.get_running_loop().create_future()
        self._lanes[admission.replica].running.append(flight)
        self._work.set()
        await done
        if counts:
            outcome.waits.append(waited)
            outcome.latencies.append(flight.last_token_at - arrived)

    async def _serve(self) -> None:
        """Iterate while there is anything to do."""
        load, forward = self._load, PacedForward(self._load.base, self._load.per_token)
        while True:
            batches = [lane.next_batch(len(lane.running), load.budget) for lane in self._lanes]
            ticks = [lane.tick(batch) for lane, batch in zip(self._lanes, batches, strict=True)]
            if all(tick.empty for tick in ticks):
                self._work.clear()
                await self._work.wait()
                continue
            results = await self._manager.tick(ticks, forward)
            for lane, batch, result in zip(self._lanes, batches, results, strict=True):
                self._advance(lane, batch, result)

    def _advance(self, lane: Lane, batch: list[Flight], result: TickResult) -> None:
        """Windows move on; what is complete leaves with the next tick."""
        for flight in lane.finished:
            self._done.pop(flight.request_id).set_result(None)
        lane.finished, lane.growing = [], [f for f in lane.growing if f.request_id in result.refused]
        lane.executed = [flight for flight in batch if flight.request_id not in result.refused]
        for flight in lane.executed:
            lane.advance(flight, self._load.page_size)
        for flight in lane.finished:
            flight.last_token_at = time.monotonic()
            lane.running.remove(flight)
        self._stalled = 0 if lane.executed or not batch else self._stalled + 1
        assert self._stalled < STALLS, "every request needs a page that none of them gives back"
