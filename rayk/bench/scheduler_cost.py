"""`rayk bench scheduler`: what a batch of claims and allocs costs on its way through the scheduler actor.

Two ratios, each within one run. Batches against the same requests one by one, all through one scheduler actor; and
batches against what Ray alone takes for the same bytes along the same way: through an actor that only forwards
them, in four parts, to four actors that only echo them.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from rayk import protocol as m
from rayk.bench.flags import LEAST_OF_BARE, LEAST_SPEEDUP, SchedulerFlags
from rayk.cli.flags import Format
from rayk.cli.table import make_table
from rayk.context import TextContext
from rayk.manager.async_manager import AsyncPagedKVCacheManager
from rayk.params import MHAKVCacheParams
from rayk.protocol.context_sync import ContextSender
from rayk.session import InferenceSession

REPLICAS = 4
SINGLES = 150  # requests of a measurement one by one


class SchedulerRates(msgspec.Struct, frozen=True):
    """Medians over rounds; rates are requests per second, each of them claimed and allocated."""

    batched: float
    one_by_one: float
    bare: float
    speedup: float  # batched / one by one
    of_bare: float  # batched / bare, measured in turns
    rounds: list[dict[str, float]]


class Echo:
    """An actor that answers with what it was sent."""

    def handle(self, wire: bytes) -> bytes:
        """The same bytes."""
        return wire

    def ping(self) -> int:
        """That it runs."""
        return 0


class Forwarder(Echo):
    """An actor that sends a part of each message to each of its echoes, and returns their answers as one."""

    def __init__(self, echoes: Sequence[Any]) -> None:
        from rayk.actors.runtime import RayRuntime

        self._echoes = list(echoes)
        self._runtime = RayRuntime()

    def handle(self, wire: bytes) -> bytes:
        """All parts are sent before the first answer is read."""
        size = -(-len(wire) // len(self._echoes))
        sent = [echo.call("handle", wire[i * size : (i + 1) * size]) for i, echo in enumerate(self._echoes)]
        return b"".join(self._runtime.get(ref, "an echo", 60.0) for ref in sent)


class SchedulerCost:
    """Requests are claimed where the driver says, in batches as one by one; with a `router` it chooses for the batches.

    One session with a manager and, beside it, the bare actors.
    """

    def __init__(self, settings: SchedulerFlags) -> None:
        self.settings, self._made = settings, 0
        params = MHAKVCacheParams(
            dtype="int8",
            n_kv_heads=1,
            head_dim=1,
            num_layers=1,
            page_size=settings.page_size,
            devices=["cpu"] * REPLICAS,
            data_parallel_degree=REPLICAS,
            enable_prefix_caching=True,
            enable_dp_cross_replica_prefix_copy=False,
        )
        pages = 2 * (settings.prompt // settings.page_size + 1) * settings.batch * max(settings.batches, 4) // REPLICAS
        self.session = InferenceSession("ray", settings.address)
        self.manager = AsyncPagedKVCacheManager(
            params, self.session, pages, max_batch_size=256, router=settings.router or "round-robin"
        )
        from rayk.actors.interface import ActorSpec
        from rayk.actors.scheduler import LANES

        runtime = self.session.ray
        self._echoes = [runtime.start(ActorSpec(Echo, ())) for _ in range(REPLICAS)]
        self._forwarder = runtime.start(ActorSpec(Forwarder, (self._echoes,), threads=LANES))
        runtime.get(self._forwarder.call("ping", control=True), "the forwarder", 60.0)

    def batch(self) -> list[TextContext]:
        """A fresh batch, its prompts different from each other and from those of other batches."""
        settings, first = self.settings, self._made * self.settings.batch
        self._made += 1
        prompts = np.arange(settings.prompt, dtype=np.int32)
        limit = settings.prompt + 128
        return [TextContext(f"request-{first + i}", prompts + (first + i), limit) for i in range(settings.batch)]

    async def _in_flight(self, batches: Sequence[Any], work: Any) -> float:
        """Requests per second when `work` is done for each batch, for so many at once as the settings say."""
        due = iter(batches)

        async def lane() -> None:
            for batch in due:
                await work(batch)

        start = perf_counter()
        await asyncio.gather(*(lane() for _ in range(self.settings.in_flight)))
        return len(batches) * self.settings.batch / (perf_counter() - start)

    async def batched(self) -> float:
        """Requests per second in batches."""
        batches = [self.batch() for _ in range(self.settings.batches)]
        replicas = None if self.settings.router else [i % REPLICAS for i in range(self.settings.batch)]

        async def admit(batch: list[TextContext]) -> None:
            for admission in await self.manager.try_admit(batch, replicas):
                if admission.error is not None:
                    raise admission.error

        rate = await self._in_flight(batches, admit)
        await self._release(batches)
        return rate

    async def bare(self) -> float:
        """Requests per second when the same bytes are only forwarded and echoed."""
        sender, batches = ContextSender(), [self.batch() for _ in range(self.settings.batches)]
        placed = [m.PlaceMany(sender.pack(batch, whole=True)) for batch in batches]
        runtime = self.session.ray

        async def send(wire: bytes) -> None:
            await asyncio.wrap_future(runtime.future(self._forwarder.call("handle", wire)))

        return await self._in_flight([m.encode(m.SchedulerEnvelope("driver", 1, 1, each)) for each in placed], send)

    async def _release(self, batches: list[list[TextContext]]) -> None:
        request_ids = [ctx.request_id for batch in batches for ctx in batch]
        await self.manager._run(self.manager._calls.release_many(request_ids))

    async def one_by_one(self) -> float:
        """Requests per second by claim() and alloc()."""
        ctxs = self.batch()[:SINGLES]
        sync, start = self.manager.sync, perf_counter()
        for i, ctx in enumerate(ctxs):
            sync.claim(ctx.request_id, i % REPLICAS)
            sync.alloc(ctx, i % REPLICAS)
        seconds = perf_counter() - start
        await self._release([ctxs])
        return len(ctxs) / seconds

    async def measure(self) -> SchedulerRates:
        """All three in turns, after one round that nobody counts."""
        rounds: list[dict[str, float]] = []
        gc.collect()
        gc.freeze()
        for number in range(1 + self.settings.rounds):
            found = {"batched": await self.batched(), "bare": await self.bare(), "one_by_one": await self.one_by_one()}
            if number:
                rounds.append(found)
        for found in rounds:
            found["speedup"], found["of_bare"] = (found["batched"] / found[name] for name in ("one_by_one", "bare"))
        return SchedulerRates(**{name: median(found[name] for found in rounds) for name in rounds[0]}, rounds=rounds)


def scheduler(flags: SchedulerFlags) -> int:
    """Measure and print; 1 when a ratio is to be checked and too low."""
    cost = SchedulerCost(flags)
    try:
        result = asyncio.run(cost.measure())
    finally:
        cost.session.close()
    if flags.form is Format.json:
        print(msgspec.json.encode({"command": "bench scheduler", **msgspec.structs.asdict(result)}).decode())
    else:
        title = "claims + allocs through one scheduler actor, medians"
        speedup, of_bare = f"{result.speedup:.1f} x", f"{result.of_bare:.2f}"
        rows = [
            (f"batches, {flags.in_flight} in flight", f"{result.batched:,.0f}", "", ""),
            ("one by one", f"{result.one_by_one:,.0f}", speedup, f">= {LEAST_SPEEDUP:.0f} x"),
            ("bare Ray", f"{result.bare:,.0f}", of_bare, f">= {LEAST_OF_BARE}"),
        ]
        Console().print(make_table(title, ("", "requests/s", "ratio", "wanted"), rows, left=("",)))
    return int(flags.check and (result.speedup < LEAST_SPEEDUP or result.of_bare < LEAST_OF_BARE))
