"""An overload on a clock that only waiting moves: the real queue, watermarks, router and drivers, and replicas that do
nothing but take their time. A minute of each of several seeds."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from rayk.bench import overload_driver
from rayk.bench.overload import FLOOD, POLITE, OverloadSettings, arrivals, make_load
from rayk.bench.overload_driver import Load, Outcome, PacedForward, Phase, _Server
from rayk.context import TextContext
from rayk.kvcache.tick import Admission, Tick, TickResult
from rayk.protocol.contexts import Traits
from rayk.scheduler.admission.controller import AdmissionController, QueuedRequest
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import Router, RouterSettings

MESSAGE = 0.002  # seconds
LOOK = 0.03
SHORT, LONG = 12, 20  # tokens of answers


class Loop(asyncio.SelectorEventLoop):
    """Its time passes when it waits, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        look = selector.select

        def select(timeout: float | None = None) -> Any:
            assert timeout is not None, "everybody waits for somebody else"
            self.now += timeout
            return look(0)

        selector.select = select

    def time(self) -> float:
        return self.now


class Replica:
    """Serves one message after the other."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.unfilled: dict[str, int] = {}
        self.pages: dict[str, int] = {}
        self.turn = 0


class House:
    """What a scheduler and its replicas are to drivers that want to be let in."""

    def __init__(self, load: Load, clock: Callable[[], float]) -> None:
        settings = RouterSettings("cost", (load.pages,) * load.replicas, load.page_size, caching=False)
        self.router = Router(settings, clock)
        self.controller = AdmissionController(load.policy, self.router, load.page_size, clock)
        self.replicas = [Replica() for _ in range(load.replicas)]
        self.waiting: dict[str, asyncio.Future[Admission]] = {}

    async def look(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            self.let_in()

    def let_in(self) -> None:
        self.controller.expire()
        while (admitted := self.controller.next()) is not None:
            request_id, replica = admitted.ticket.request_id, self.replicas[admitted.replica]
            self.router.place(request_id, admitted.replica, admitted.wish)
            replica.unfilled[request_id] = admitted.wish.tokens
            replica.pages[request_id] = admitted.ticket.pages
            self.controller.answered(admitted)
            self.report(admitted.replica, [request_id])
            self.controller.placed(admitted, None)
        for tenant in (POLITE, FLOOD):
            for fate in self.controller.settled(tenant)[0]:
                self.waiting.pop(fate.request_id).set_result(Admission(fate.replica, fate.error))

    def report(self, number: int, answered: Sequence[str] = ()) -> None:
        replica = self.replicas[number]
        replica.turn += 1
        self.router.report(number, sum(replica.unfilled.values()), replica.turn)
        self.router.answered(number, answered)
        self.controller.watermarks.report(number, replica.turn, sum(replica.pages.values()))


class Guest:
    """The manager of one driver, as far as a driver of an overload uses it."""

    def __init__(self, house: House, tenant: str) -> None:
        self.house, self.tenant = house, tenant
        self.told: list[tuple[int, bool]] = []  # tokens of the answer, and whether it was let in

    async def try_admit(self, ctxs: Sequence[TextContext]) -> list[Admission]:
        [ctx] = ctxs
        await asyncio.sleep(MESSAGE)
        house, length = self.house, ctx.tokens.length
        future = house.waiting[ctx.request_id] = asyncio.get_running_loop().create_future()
        queued = QueuedRequest(self.tenant, lambda: RouteRequest(length), ctx)
        traits = Traits(tenant=ctx.tenant, deadline=ctx.deadline)
        house.controller.offer(queued, ctx.request_id, length, ctx.max_length - length, traits)
        house.let_in()
        admission = await future
        self.told.append((ctx.max_length - length, admission.error is None))
        return [admission]

    async def tick(self, ticks: Sequence[Tick], forward: PacedForward) -> list[TickResult]:
        await asyncio.gather(*(self._tick(r, tick, forward) for r, tick in enumerate(ticks)))
        for number, tick in enumerate(ticks):
            for request_id in tick.release:
                self.house.router.remove(request_id)
                self.house.controller.on_release([request_id])
            self.house.report(number)
        self.house.let_in()
        return [TickResult() for _ in ticks]

    async def _tick(self, number: int, tick: Tick, forward: PacedForward) -> None:
        replica = self.house.replicas[number]
        async with replica.lock:
            for request_id in tick.release:
                replica.unfilled.pop(request_id), replica.pages.pop(request_id)
            for ctx in tick.step:
                left = ctx.tokens.length - ctx.tokens.processed_length
                replica.unfilled[ctx.request_id] = left if left > 1 else 0
            if tick.execute:
                tokens = sum(ctx.tokens.active_length for ctx in tick.execute)
                await asyncio.sleep(MESSAGE + forward.base + forward.per_token * tokens)


class Seen(NamedTuple):
    """Of a minute at five times the capacity: of those let in, and of the polite tenant's, the part that was in time;
    those in time over the same at 1x; how often long requests of the flood are let in, over short ones."""

    in_time: float
    polite: float
    goodput: float
    long_over_short: float


def serve(loop: Loop, seed: int) -> Seen:
    load = make_load("", OverloadSettings())

    async def main() -> Seen:
        house = House(load, loop.time)
        looking = asyncio.ensure_future(house.look())
        guests = {tenant: Guest(house, tenant) for tenant in (POLITE, FLOOD)}
        servers = {
            tenant: _Server(load, tenant, random.Random(2 * seed + i), guest)  # type: ignore[arg-type]
            for i, (tenant, guest) in enumerate(guests.items())
        }

        async def phase(**phases: Phase) -> dict[str, Outcome]:
            return dict(
                zip(phases, await asyncio.gather(*(servers[t].run(each) for t, each in phases.items())), strict=True)
            )

        def in_time(outcome: Outcome) -> int:
            return sum(latency <= deadline for latency in outcome.latencies)

        alone = (await phase(polite=Phase(seconds=40, in_flight=1)))[POLITE]
        deadline = 5 * statistics.median(alone.latencies)
        crowd = Phase(seconds=20, in_flight=2 * load.rows * load.replicas, skip=5)
        capacity = sum(len(o.latencies) for o in (await phase(polite=crowd, flood=crowd)).values()) / 15
        once = sum(map(in_time, (await phase(**arrivals(capacity, 1.0, 30, deadline))).values())) / 30
        guests[FLOOD].told.clear()
        over = await phase(**arrivals(capacity, 5.0, 60, deadline))
        looking.cancel()
        house.controller.check_integrity()
        assert house.controller.queue.held == 0 and not house.waiting
        told = guests[FLOOD].told
        long, short = ([ok for n, ok in told if which(n)] for which in (lambda n: n >= LONG, lambda n: n <= SHORT))
        return Seen(
            sum(map(in_time, over.values())) / sum(len(o.latencies) for o in over.values()),
            in_time(over[POLITE]) / over[POLITE].offered,
            sum(map(in_time, over.values())) / 60 / once,
            statistics.mean(long) / statistics.mean(short),
        )

    return loop.run_until_complete(main())


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    made = Loop()
    asyncio.set_event_loop(made)
    monkeypatch.setattr(overload_driver, "time", SimpleNamespace(monotonic=made.time))
    yield made
    asyncio.set_event_loop(None)
    made.close()


@pytest.mark.parametrize("seed", range(4))
def test_five_times_too_much_for_a_minute(loop: Loop, seed: int) -> None:
    seen = serve(loop, seed)
    assert seen.in_time >= 0.99 and seen.goodput >= 0.9
    assert seen.polite >= 0.9, "a flood of others does not keep it out"
    assert 0.3 <= seen.long_over_short <= 3, "nor do short requests keep long ones out"
