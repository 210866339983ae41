"""A named Cluster without processes: its drivers, its scheduler and its engines are the real ones, the network between
them, the clock and the deaths of processes are this file's.

    driver --posts--> scheduler    NamedDispatcher, SchedulerLink | ServingActor, ServingCore
           <--news---
    driver, scheduler --commands--> engine --reports--> both      EngineThread, Engine, Outbox, ReplicaCore

What one sends to another arrives in order; all else in any. Tokens count up from the prompt's last one, so that a
token that is lost, doubled or out of order is seen at once.
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayk.actors import engine, engine_lines, serving, serving_link
from rayk.actors.interface import ActorGoneError, Bundle, Placement
from rayk.actors.mailbox import Mailbox
from rayk.actors.named_engines import NamedReplicas
from rayk.actors.serving import ServingActor
from rayk.actors.serving_link import SchedulerLink
from rayk.actors.serving_roster import EngineHandle, ServedModel, ServingRoster
from rayk.dispatch.named import NamedDispatcher
from rayk.dispatch.output import Handle
from rayk.engine.engine_thread import EngineThread
from rayk.engine.replicas import ModelSource, ReplicaFacts, ServeSettings
from rayk.protocol.engine import decode_command, decode_report, encode
from rayk.protocol.lines import Post, decode_line, encode_line
from rayk.protocol.serving import decode_scheduler_news
from rayk.sampling import SamplingParams
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.serving.recovery import KeptServing

from ..unit.engine.fake import Bench  # noqa: TID252  # tests/ is no package that has an absolute name
from .explore import Event

VOCABULARY, PAGES, PAGE = 128, 8, 4
SCHEDULER = 0  # as a sender and a reader; drivers are their numbers
KEY = "x/cluster/serving"


class Playing:
    """The world of which an event is done now."""

    world: ClusterWorld


class NoThread:
    """Events do what a thread would."""

    def __init__(self, **given: Any) -> None:
        pass

    def start(self) -> None:
        pass


@contextmanager
def without_processes() -> Iterator[None]:
    """Schedulers have neither threads nor a clock of their own, and say nothing."""
    with pytest.MonkeyPatch.context() as context:
        for module in (serving, engine_lines):
            context.setattr(module, "Thread", NoThread)
        for module in (engine_lines, serving_link, engine):
            context.setattr(module, "PostLine", Line)
        context.setattr(serving, "monotonic", lambda: Playing.world.now)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class Line:
    """Stands for a PostLine: posts are numbered and go into the network; streams are read by events."""

    def __init__(self, runtime: Any, actor: Any, target: str, lane: str) -> None:
        self.actor, self.numbers = actor, count(1)
        actor.world.lines += 1
        self.sender = f"line-{actor.world.lines}"

    def post(self, body: bytes, driver: int = 0) -> None:
        self.actor.arrives(encode_line(Post(self.sender, next(self.numbers), driver, body)))

    def close(self) -> None:
        pass


class Counting:
    """The next token is the last one and one."""

    vocab_size, max_length, tokenizer, eos_token_ids = VOCABULARY, 1000, None, ()

    def logits(self, inputs: Any, tokens: torch.Tensor, counts: Any, **more: Any) -> torch.Tensor:
        last = tokens[np.cumsum(counts) - 1]
        return torch.nn.functional.one_hot((last + 1) % VOCABULARY, VOCABULARY).float()


def wrong(error: Exception) -> None:
    raise error


@dataclass(frozen=True)
class Shape:
    """How small the world is, and how often what may go wrong. `asks`: requests of each driver, by tokens."""

    asks: tuple[tuple[int, ...], ...] = ((2, 1), (1,))
    engines: int = 2
    crashes: int = 0  # of engines
    scheduler_crashes: int = 0
    driver_crashes: int = 0
    duplicates: int = 0  # of drivers' posts
    cut: int = 0  # streams of news that break with what is on its way
    cancels: int = 0
    limit: int = 2  # requests of a replica


@dataclass(eq=False)
class EngineProcess:
    """An engine in its process. Picklable as what stands for it: the scheduler keeps its handle."""

    world: ClusterWorld
    replica: int
    start: int
    dead: bool = False
    inboxes: dict[int, deque[bytes]] = field(default_factory=dict)  # by sender
    streams: dict[int, Iterator[Any]] = field(default_factory=dict)  # by reader
    heard: dict[int, int] = field(default_factory=dict)
    socket: None = None

    def __post_init__(self) -> None:
        self.bench = Bench(PAGES, PAGE, rows=2, chunk_size=8, model=Counting(), report_pages=False)  # type: ignore[arg-type]
        self.thread = EngineThread([self.bench.engine], heartbeat=0.0, shared=True)
        self.mailbox = Mailbox(lambda driver, body: self.thread.post(0, decode_command(body)), iter, wrong)  # type: ignore[arg-type]

    def arrives(self, wire: bytes) -> None:
        if not self.dead:
            self.inboxes.setdefault(self.world.acting, deque()).append(wire)

    def listen(self, reader: int) -> None:
        self.streams[reader], self.heard[reader] = self.thread.reports(0, reader), 0
        self.read(reader)  # the stream begins

    def read(self, reader: int) -> Any:
        self.heard[reader] += 1
        return decode_report(encode(next(self.streams[reader])))

    def turn(self) -> None:
        """What has arrived is done, then a step."""
        arrived, self.thread._inbox = list(self.thread._inbox), deque()
        self.thread._take(arrived)
        if self.bench.engine.busy:
            self.thread._report(0, self.bench.engine.step())
        assert not self.thread._failures, self.thread._failures
        self.bench.core.check_integrity()


class DriverProcess:
    """A driver and what it asks for."""

    def __init__(self, world: ClusterWorld, asks: tuple[int, ...]) -> None:
        self.world, self.asks, self.dead = world, list(asks), False
        self.handles: list[Handle] = []
        runtime: Any = SimpleNamespace(get=lambda ref, *rest: ref, secret=None, dumps=pickle.dumps, sockets=False)
        self.link = SchedulerLink(runtime, self)  # type: ignore[arg-type]  # it is called as an actor is
        roster = self.link.connect(False)
        self.number = self.link.number
        self.replicas = NamedReplicas.of(runtime, roster)
        self.dispatcher = NamedDispatcher(self.link, self.replicas, roster, False)
        self.dispatcher._follow = self.follow
        self.news: Iterator[bytes] | None = None
        self.listen()
        for replica in self.dispatcher.live:
            self.follow(replica)

    socket = None

    def arrives(self, wire: bytes) -> None:
        """A post to the scheduler, unless it is away."""
        if self.world.scheduler is not None:
            self.world.posts[self.number].append(wire)

    def call(self, method: str, *args: Any, control: bool = False) -> Any:
        """To the scheduler."""
        world = self.world
        if world.scheduler is None:
            raise ActorGoneError("it is away")
        with world.acts(SCHEDULER):
            return getattr(world.scheduler, method)(*args)

    def listen(self) -> None:
        assert self.world.scheduler is not None
        self.news = self.world.scheduler._answers(self.number)

    def follow(self, replica: int) -> None:
        process: Any = self.replicas.handles[replica].actor
        if process.dead:  # which is heard soon
            process.streams[self.number] = iter(())
        else:
            process.listen(self.number)

    def submit(self) -> None:
        at = len(self.handles)
        first = 10 * self.number + 20 * at
        sampling = SamplingParams(max_new_tokens=self.asks.pop(0))
        handle = Handle(at, at, f"r{at}", np.array([first], np.int32), sampling)
        self.handles.append(handle)
        self.dispatcher.submit([handle])

    def check(self) -> None:
        for handle in self.handles:
            first = int(handle.prompt[0]) + 1
            wanted = list(range(first, first + handle.sampling.max_new_tokens))
            assert handle.tokens == wanted[: len(handle.tokens)], f"{self.number}/{handle.id}: {handle.tokens}"
            if handle.done:
                output = handle.result()
                assert output.finish_reason == "cancelled" or output.tokens == wanted, output


class ClusterWorld:
    """See the module."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.left = shape, {k: getattr(shape, k) for k in
            ("crashes", "scheduler_crashes", "driver_crashes", "duplicates", "cut", "cancels")}  # fmt: skip
        self.acting, self.starts = SCHEDULER, 0
        self.now, self.lines = 100.0, 0
        Playing.world = self
        self.posts: dict[int, deque[bytes]] = {}
        self.kept: Any = None
        self.engines: list[EngineProcess] = []  # all that ever began
        for replica in range(shape.engines):
            self.begin(replica)
        self.scheduler: ServingActor | None = None
        routing = RouterSettings(
            "round-robin", (PAGES,) * shape.engines, PAGE, limit=shape.limit, reports_backlog=False
        )
        handles = tuple(self.handle(each) for each in self.engines)
        served = ServedModel(ModelSource(), ServeSettings(replaced=True, shared=True), 9, None, None, {}, "")
        roster = ServingRoster("x/cluster", pickle.dumps(served), "a model", routing, False, True, handles)
        self.kept = KeptServing(roster, [each.start for each in handles], ["ready"] * shape.engines)
        self.start_scheduler()
        self.drivers = [DriverProcess(self, asks) for asks in shape.asks]
        self.posts = {driver.number: deque() for driver in self.drivers}
        for d in range(len(self.drivers)):
            for event in (("news", d), *[("submit", d)] * len(shape.asks[d])):
                self.do(event)

    @contextmanager
    def acts(self, who: int) -> Iterator[None]:
        """What is sent now is sent by that one."""
        before, self.acting = self.acting, who
        try:
            yield
        finally:
            self.acting = before

    def begin(self, replica: int) -> EngineProcess:
        self.starts += 1
        self.engines.append(EngineProcess(self, replica, self.starts))
        return self.engines[-1]

    def handle(self, process: EngineProcess) -> EngineHandle:
        facts = ReplicaFacts(process.replica, "n", "cpu", "", PAGES, 1, 1000, VOCABULARY, False)
        place = Bundle(Placement(None, ("n",)))
        return EngineHandle(process, place, process.start, PAGES, 0, None, pickle.dumps(facts))  # type: ignore[arg-type]

    # -- the runtime that the scheduler sees

    def stop(self, actors: list[Any], placement: Any) -> None:
        for actor in actors:
            actor.dead = True

    def keep(self, key: str, value: Any) -> None:
        self.kept = value

    def start_scheduler(self) -> None:
        runtime: Any = SimpleNamespace(kept=lambda key: self.kept, keep=self.keep, stop=self.stop)
        with self.acts(SCHEDULER):
            self.scheduler = ServingActor(KEY, runtime)
            for replica in self.scheduler._core.members.here:
                process: Any = self.scheduler._roster.running[replica].actor
                if not process.dead:
                    process.listen(SCHEDULER)

    # -- events ------------------------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        Playing.world = self
        found: list[Event] = []
        up, left = self.scheduler is not None, self.left
        for d, driver in enumerate(self.drivers):
            if driver.dead:
                continue
            if driver.asks and driver.link.lost is None:
                found.append(("submit", d))
            if driver.news is None and up:
                found.append(("resume", d))
            if up and self.posts[driver.number]:
                found.append(("post", d))
                if left["duplicates"]:
                    found.append(("duplicate", d))
            if up and driver.news is not None and self.has_news(driver):
                found.append(("news", d))
                if left["cut"]:
                    found.append(("cut", d))
            if left["cancels"] and any(not handle.done for handle in driver.handles):
                found.append(("cancel", d))
            if left["driver_crashes"] and driver.handles and up:
                found.append(("driver-crash", d))
            for e, process in self.heard_by(driver):
                if process.dead:
                    found.append(("lost", e, d))
                elif process.thread._outboxes[0].events.get(driver.number):
                    found.append(("report", e, d))
        for e, process in enumerate(self.engines):
            if process.dead:
                if up and self.knows(process):
                    found.append(("lost", e, "scheduler"))
                continue
            found += [("command", e, sender) for sender, inbox in process.inboxes.items() if inbox]
            if process.thread._inbox or process.bench.engine.busy:
                found.append(("turn", e))
            if up and SCHEDULER in process.streams and process.thread._outboxes[0].events.get(SCHEDULER):
                found.append(("report", e, "scheduler"))
            if left["crashes"] and process.bench.engine.numbers:
                found.append(("crash", e))
        if up and left["scheduler_crashes"] and any(driver.handles for driver in self.drivers):
            found.append(("scheduler-crash",))
        if not up:
            found.append(("scheduler-start",))
        elif self.scheduler is not None and self.scheduler._core.supervisor.due() and self.living:
            found.append(("replace",))
        return found

    @property
    def living(self) -> list[DriverProcess]:
        return [driver for driver in self.drivers if not driver.dead]

    def has_news(self, driver: DriverProcess) -> bool:
        assert self.scheduler is not None
        known = self.scheduler._drivers.get(driver.number)
        return known is not None and self.scheduler._has_news(known)

    def heard_by(self, driver: DriverProcess) -> list[tuple[int, EngineProcess]]:
        return [(e, process) for e, process in enumerate(self.engines) if driver.number in process.streams]

    def knows(self, process: EngineProcess) -> bool:
        assert self.scheduler is not None
        here = process.replica in self.scheduler._core.members.here
        return here and self.scheduler._roster.running[process.replica].actor is process

    def do(self, event: Event) -> None:
        Playing.world = self
        match event:
            case (("submit" | "resume" | "news" | "cut" | "cancel" | "driver-crash") as what, int(d)):
                driver = self.drivers[d]
                with self.acts(driver.number):
                    self._of_driver(str(what), driver)
            case ("post", int(d)):
                driver = self.drivers[d]
                self.deliver(driver, self.posts[driver.number].popleft())
            case ("duplicate", int(d)):
                self.left["duplicates"] -= 1
                self.deliver(self.drivers[d], self.posts[self.drivers[d].number][0])
            case ("lost", int(e), "scheduler"):
                self._lose(self.engines[e])
            case ("lost", int(e), int(d)):
                driver, process = self.drivers[d], self.engines[e]
                with self.acts(driver.number):
                    del process.streams[driver.number]
                    driver.dispatcher.lose(process.replica, "it died", (driver.number, process.start))
            case ("report", int(e), "scheduler"):
                process = self.engines[e]
                with self.acts(SCHEDULER):
                    report, handle = process.read(SCHEDULER), self.scheduler._roster.running[process.replica]  # type: ignore[union-attr]
                    self.scheduler._hear_engine(process.replica, handle, report, process.heard[SCHEDULER])  # type: ignore[union-attr]
            case ("report", int(e), int(d)):
                driver, process = self.drivers[d], self.engines[e]
                with self.acts(driver.number):
                    driver.dispatcher.on_report(process.replica, process.read(driver.number))
            case ("command", int(e), int(sender)):
                process = self.engines[e]
                process.mailbox._take(decode_line(process.inboxes[sender].popleft()))  # type: ignore[arg-type]  # a post
            case ("turn", int(e)):
                self.engines[e].turn()
            case ("crash", int(e)):
                self.left["crashes"] -= 1
                self.engines[e].dead = True
            case ("scheduler-crash",):
                self.left["scheduler_crashes"] -= 1
                self.scheduler = None
                for driver in self.drivers:
                    driver.news = None
                    self.posts[driver.number].clear()
                for process in self.engines:  # the commands that it sent before arrive still
                    process.streams.pop(SCHEDULER, None)
            case ("scheduler-start",):
                self.start_scheduler()
            case ("replace",):
                self._replace()
            case _:
                raise AssertionError(event)

    def _of_driver(self, what: str, driver: DriverProcess) -> None:
        if what == "submit":
            driver.submit()
        elif what == "resume":
            assert driver.dispatcher._resume(False)
            driver.listen()
        elif what == "news":
            assert driver.news is not None
            driver.dispatcher._hear(decode_scheduler_news(next(driver.news)))
        elif what == "cut":
            self.left["cut"] -= 1
            assert driver.news is not None
            next(driver.news)
            driver.news = None
        elif what == "cancel":
            self.left["cancels"] -= 1
            driver.dispatcher.cancel(next(handle for handle in driver.handles if not handle.done))
        else:  # its lease ends as soon as the scheduler looks
            self.left["driver_crashes"] -= 1
            driver.dead = True
            self.posts[driver.number].clear()
            with self.acts(SCHEDULER):
                assert self.scheduler is not None
                self.scheduler.leave(driver.number)

    def deliver(self, driver: DriverProcess, wire: bytes) -> None:
        assert self.scheduler is not None
        with self.acts(SCHEDULER):
            self.scheduler._mailbox._take(decode_line(wire))  # type: ignore[arg-type]  # a post

    def _lose(self, process: EngineProcess) -> None:
        assert self.scheduler is not None
        with self.acts(SCHEDULER):
            self.scheduler._lose(process.replica, self.scheduler._roster.running[process.replica], "it died")

    def _replace(self) -> None:
        driver = self.living[0]
        with self.acts(driver.number):
            for replica in driver.dispatcher.take_due():
                process = self.begin(replica)
                handle = self.handle(process)
                driver.replicas._let_go(replica)
                driver.replicas.handles[replica] = driver.replicas._placed[replica] = handle
                with self.acts(SCHEDULER):
                    process.listen(SCHEDULER)
                driver.dispatcher.join(replica, PAGES, 0, None)
                driver.follow(replica)

    # -- what must be so ---------------------------------------------------------------------------------------

    def check(self) -> None:
        for driver in self.living:
            driver.check()
        if self.scheduler is not None:
            core = self.scheduler._core
            core.members.check_integrity()
            core.supervisor.check_integrity()
            assert self.acting == SCHEDULER

    def settle(self) -> None:
        """Without more faults all comes to its end, and nothing is left anywhere."""
        self.left = dict.fromkeys(self.left, 0)
        for _ in range(400):
            events = [event for event in self.events() if event[0] != "submit"] or self.events()
            if not events:
                if self.scheduler is not None and self.scheduler._return._wants:
                    self.tick()
                    continue
                break
            for event in events:
                if event in self.events():
                    self.do(event)
                    self.check()
            self.tick()
        assert not self.events(), f"it does not come to its end: {self.events()}"
        for driver in self.living:
            for handle in driver.handles:
                assert handle.done, f"{driver.number}/{handle.id} waits for ever, at {handle.replica}"
            assert not driver.dispatcher._handles and not driver.dispatcher._ids
        core = self.scheduler._core  # type: ignore[union-attr]  # it is up
        assert not core.tickets, f"the scheduler keeps {core.tickets}"
        assert not core.waiting and not core.router._placed, core.router._placed
        assert not core.router.loads.requests.any() and len(core.members.ready) == self.shape.engines
        for process in self.engines:
            if not process.dead:
                assert not process.bench.engine.numbers and process.bench.core.usage.used == 0

    def tick(self) -> None:
        """Time goes by, as the scheduler's timer sees it, and engines say that they live."""
        self.now += 3.0
        for e, process in enumerate(self.engines):
            if not process.dead and SCHEDULER in process.streams and self.knows(process):
                self.do(("report", e, "scheduler"))
        if self.scheduler is not None:
            with self.acts(SCHEDULER), self.scheduler._changed:
                self.scheduler._place_held()
                self.scheduler._flush()

    def state(self) -> Hashable:
        drivers = tuple(
            (
                d.dead, d.news is None, len(d.asks), tuple(sorted(d.link._standing)),
                tuple((h.ticket, h.replica, len(h.tokens), h.done, h.unwanted, h.prefilling) for h in d.handles),
                tuple(self.posts[d.number]), tuple(d.dispatcher._unheard), d.dispatcher._version, d.link._told,
            )
            for d in self.drivers
        )  # fmt: skip
        scheduler: Hashable = None
        if (s := self.scheduler) is not None:
            core = s._core
            scheduler = (
                tuple((each.ticket, each.replica) for each in core.requests),
                tuple(each.ticket for each in core.waiting.requests),
                tuple(core.members.states), tuple(core.members.epochs), core.members.version,
                tuple((n, repr(d.placed), repr(d.refused), d.roster, d.deaf) for n, d in s._drivers.items()),
                tuple(s._return._away), tuple(s._return._wants),
            )  # fmt: skip
        engines = tuple(
            (
                e.start, e.dead, tuple(sorted(e.streams)),
                tuple((n, e.bench.engine._table.get(n).generated) for n in e.bench.engine.numbers),  # type: ignore[union-attr]
                tuple((sender, tuple(inbox)) for sender, inbox in sorted(e.inboxes.items()) if inbox),
                repr(list(e.thread._inbox)), repr(sorted(e.thread._outboxes[0].events.items())),
                tuple(sorted(e.thread._outboxes[0].gone)), bool(e.bench.engine._events),
            )
            for e in self.engines
        )  # fmt: skip
        return drivers, scheduler, engines, tuple(self.left.values())
