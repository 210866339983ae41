"""The scheduler of a Cluster that several drivers share: an actor around ServingCore. It only translates.

    drivers  --DriverNews-->  <--SchedulerNews--    requests that want places, and where they go
    engines  <--commands--  --Report-->             what is of no driver: pages, use, who began and who ended

Prompts and tokens go between drivers and engines. The engines have EngineLines, drivers have a Mailbox. A
driver that leaves, or is silent for longer than its lease, has its requests ended everywhere. When this process dies,
Ray starts another one, which goes on with what was kept (rayk.scheduler.serving.recovery), what engines have and what
drivers say.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Condition, Thread
from time import monotonic, sleep, time_ns
from typing import Any

import numpy as np

from rayk import protocol as m
from rayk.actors.engine import SILENT_SECONDS, SOON_SECONDS
from rayk.actors.engine_lines import EngineLines
from rayk.actors.interface import Runtime, SocketAddress
from rayk.actors.mailbox import Mailbox
from rayk.actors.process import own_runtime, spare_from_kernel
from rayk.actors.removal import end_strays
from rayk.actors.report import start_reporting
from rayk.actors.secret import Authenticator, Challenge, Proof
from rayk.actors.serving_roster import EngineHandle, ServingRoster, ServingState
from rayk.errors import ClosedError, ConfigError, MessageError, RaykError
from rayk.metrics.reading import Labels, Reading
from rayk.protocol.engine import Command, Forget, Report
from rayk.protocol.serving import (
    DriverNews,
    LineNews,
    Placed,
    Refused,
    SchedulerNews,
    decode_driver_news,
    driver_of,
    encode_news,
)
from rayk.scheduler.leases import TICK_SECONDS, Leases
from rayk.scheduler.readings import read_serving
from rayk.scheduler.recovery import born_after
from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.core import ServingCore
from rayk.scheduler.serving.recovery import KeptServing, Return, keep
from rayk.scheduler.supervisor import Replacement
from rayk.scheduler.transfers.indexed_copies import CopyPlanner
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers

log = logging.getLogger("rayk.scheduler")

ANSWERS_LANE = "answers"  # of the scheduler: a thread for each driver
DRIVERS = 32  # that may use one Cluster at a time
AWAY = -1  # of a driver that has not said yet that it goes on
HEARTBEAT = 1.0  # seconds between answers when there is nothing to say


class _Driver:
    """Who it is, and what it has to be told."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.deaf = 0  # until it says so, it is told of no request
        self.stream = 0  # how often its answers() began; the latest goes on
        self.placed: list[Placed] = []
        self.refused: list[Refused] = []
        self.roster = 0  # the version that it was told last


class ServingActor:
    """Started by rayk.actors.serving_startup. What it begins with lies in Ray's store under `key`, so that Ray can
    start it again whoever is there."""

    def __init__(self, key: str, runtime: Runtime | None = None) -> None:
        self._runtime = runtime or own_runtime(key)
        self._key = key
        kept: KeptServing | None = self._runtime.kept(key)
        if kept is None:
            raise RuntimeError(f"nothing is kept of the Cluster {key!r}: it was shut down")
        born = born_after(kept.roster.life, time_ns() // 1_000)
        self._roster: ServingRoster = replace(kept.roster, life=born)
        self._authenticator = Authenticator(self._roster.name, self._roster.lock)
        self._changed = Condition()
        self._drivers = {number: _Driver(client) for number, client in kept.drivers.items()}
        self._last = kept.last
        self._owner = kept.owner
        self._leases = Leases(monotonic)
        silence = SOON_SECONDS if self._roster.replaced else SILENT_SECONDS
        self._lines = EngineLines(self._runtime, silence, self._hear_engine, self._lose)
        self._unfinished = False  # a driver has gone that was starting engines
        self._mailbox = Mailbox(self._heard, self._answers, lambda error: log.error("news of a driver: %s", error))
        self._saved: tuple[Any, ...] = ()
        roster = self._roster
        pages = tuple(handle.pages if handle is not None else 0 for handle in roster.handles)
        routing, starts = replace(roster.routing, pages=pages), kept.epochs[: len(pages)]
        core = ServingCore(self._post, routing, monotonic, replace=roster.replaced, starts=starts)
        self._core = core
        if routing.plans_copies:
            transfers = PageTransfers(LinkTable(monotonic, routing.page_transport), routing.page_size)
            core.router.fetching = CopyPlanner(core.router.index, transfers, roster.shares_tiers)
        for client, seconds in kept.leases.items():
            self._leases.connect(client, seconds)
        if kept.begun:
            kept.restore(core, born)
            for driver in self._drivers.values():
                driver.deaf = AWAY
            log.warning("the scheduler of %s began anew: %d driver(s)", roster.name, len(self._drivers))
        self._return = Return(self._drivers, monotonic)
        with self._changed:
            self._save()
        for replica, handle in roster.running.items():
            if replica in core.members.here:
                core.meet(replica, handle.epoch, handle.endpoint)
                self._lines.follow(replica, handle)
        Thread(target=self._keep_time, name="rayk-timer", daemon=True).start()
        if runtime is None:
            spare_from_kernel()
            start_reporting(self._runtime, self.readings)

    def __repr__(self) -> str:  # how Ray's dashboard and logs call it
        return "rayk scheduler"

    def _save(self) -> None:
        """Write down what a successor could not ask anybody for, if it changed. With the lock held."""
        core, leases = self._core, tuple(sorted(self._leases.drivers.items()))
        now = core.members.version, core.lifecycle.target, self._owner, leases, self._last, self._roster.reset_token
        if now == self._saved:
            return
        drivers = {number: driver.client for number, driver in self._drivers.items()}
        try:
            self._runtime.keep(self._key, keep(core, self._standing(), self._owner, dict(leases), drivers, self._last))
        except Exception:  # Ray's head does not answer: the next tick tries again
            log.exception("a successor could not be told of what changed")
            return
        self._saved = now

    # -- drivers -----------------------------------------------------------------------------------------

    def challenge(self) -> Challenge:
        """What a driver with a secret has to answer."""
        return self._authenticator.challenge()

    def connect(self, client: str, owner: bool, lease: float, proof: Proof | None = None) -> tuple[int, ServingRoster]:
        """A driver comes: its number, by which its tickets are known, and the roster. When it is silent for longer than
        `lease` seconds its requests end."""
        self._authenticator.check(proof)
        with self._changed:
            if len(self._drivers) >= DRIVERS:
                raise ConfigError(
                    f"{DRIVERS} drivers use {self._roster.name!r}, and no more can; close one, or have its requests "
                    "go through another"
                )
            for before in [n for n, driver in self._drivers.items() if driver.client == client]:
                self._end(before)  # its first call was not answered
            self._last = number = self._last + 1
            self._drivers[number] = _Driver(client)
            self._leases.connect(client, lease)
            if owner:
                self._owner = client
            self._save()
            return number, self._standing()

    def resume(self, number: int, client: str, told: int) -> ServingRoster | None:
        """A driver goes on: the roster. It is told nothing before it has said all that it has, with that number. None
        for one that counts as gone, which has to come again."""
        with self._changed:
            driver = self._drivers.get(number)
            if driver is None or driver.client != client or not self._leases.renew(client):
                return None
            driver.deaf = told
            return self._standing()

    def renew(self, client: str) -> bool:
        """The driver is alive; keeps its lease. False when that has ended."""
        return self._leases.renew(client)

    def leave(self, number: int) -> None:
        """The driver goes: its requests end."""
        with self._changed:
            self._end(number)
            self._flush()

    def owner(self) -> str:
        """The driver that started the Cluster and still uses it; '' when that has left, or its lease has ended."""
        return self._owner

    def _end(self, number: int) -> None:
        driver = self._drivers.pop(number, None)
        if driver is None:
            return
        self._leases.leave(driver.client)
        if self._owner == driver.client:
            self._owner = ""
        self._core.drop([ticket for ticket in self._core.tickets if driver_of(ticket) == number])
        for replica in self._core.members.here:
            self._post(replica, Forget(number))
        self._mailbox.forget(number)
        self._return.back(number)
        self._unfinished |= bool(self._core.supervisor.forget(driver.client))
        self._core.pump()
        self._changed.notify_all()

    def _keep_time(self) -> None:
        while True:
            sleep(TICK_SECONDS)
            try:
                with self._changed:
                    late = set(self._leases.tick())
                    for number in [n for n, driver in self._drivers.items() if driver.client in late]:
                        log.warning("driver %s was silent for longer than its lease", self._drivers[number].client)
                        self._end(number)
                    self._place_held()
                    self._save()
                    self._flush()
                    if self._unfinished and not self._core.supervisor.granted:
                        self._unfinished = False
                        end_strays(self._runtime, self._roster.name, "engine", self._roster.running.values())
            except Exception:  # the next tick tries again
                log.exception("the timer of a Cluster's scheduler failed")

    # -- requests ----------------------------------------------------------------------------------------

    def handle(self, first: Any, *rest: Any) -> None:
        """News of a driver; nothing of one whose lease has ended."""
        self._mailbox.handle(first, *rest)

    def read(self, wire: bytes) -> bytes:
        """News for a driver, as there are any, and now and then without; over when it counts as gone."""
        return self._mailbox.read(wire)

    def listen(self) -> SocketAddress | None:
        """Take messages from sockets, too, from now on."""
        return self._mailbox.listen()

    def _heard(self, number: int, wire: bytes) -> None:
        news = decode_driver_news(wire)
        with self._changed:
            if number in self._drivers:
                self._hear(number, news)
                self._flush()

    def _hear(self, number: int, news: DriverNews) -> None:
        core = self._core
        for each in news.standing:
            core.adopt(each.want, each.replica, each.begun)
        if news.told:
            self._return.back(number)
            if news.told == self._drivers[number].deaf:
                self._drivers[number].deaf = 0
        for line in news.lines:
            self._note_line(line)
        for replica, start in news.unheard:
            core.suspect(replica, start)
        if self._return.over:
            self._place_held()
            core.place(news.wants)
        else:
            self._return.hold(news.wants)
            self._return.drop(news.dropped)
        core.drop(news.dropped)

    def _place_held(self) -> None:
        if self._return.over and (wants := self._return.take()):
            self._core.place([want for want in wants if driver_of(want.ticket) in self._drivers])

    def _note_line(self, news: LineNews) -> None:
        fetching = self._core.router.fetching
        source = fetching.links.peers.get(news.source) if fetching is not None else None
        if fetching is None or source is None or source.epoch != news.epoch:
            return
        if news.trouble:
            fetching.links.failed(news.source, news.target, news.kind, news.trouble)
        else:
            fetching.links.carried(news.source, news.target, news.kind, news.pages, news.seconds)

    def _flush(self) -> None:
        """Sort what the core says by driver, for read()."""
        placed, refused = self._core.take()
        for ticket, replica, spans in placed:
            if (driver := self._drivers.get(driver_of(ticket))) is not None:
                driver.placed.append(Placed(ticket, replica, [(span.replica, span.start, span.stop) for span in spans]))
        for ticket, error in refused:
            if (driver := self._drivers.get(driver_of(ticket))) is not None:
                driver.refused.append(Refused(ticket, m.failure(error)))
        self._changed.notify_all()

    def _answers(self, number: int) -> Iterator[bytes]:
        with self._changed:
            if (driver := self._drivers.get(number)) is None or driver.deaf == AWAY:
                return
            driver.stream = stream = driver.stream + 1
            driver.roster = 0
        for count in itertools.count(1):
            with self._changed:
                deadline = monotonic() + HEARTBEAT
                while self._drivers.get(number) is driver and driver.stream == stream and not self._has_news(driver):
                    left = deadline - monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                if self._drivers.get(number) is not driver or driver.stream != stream:
                    return
                news = SchedulerNews(count, self._core.members.version)
                if not driver.deaf:
                    news = SchedulerNews(count, self._core.members.version, driver.placed, driver.refused)
                    driver.placed, driver.refused = [], []
                driver.roster = self._core.members.version
            yield encode_news(news)

    def _has_news(self, driver: _Driver) -> bool:
        told = not driver.deaf and (driver.placed or driver.refused)
        return bool(told) or driver.roster != self._core.members.version

    # -- engines -----------------------------------------------------------------------------------------

    def _post(self, replica: int, command: Command) -> None:
        if replica in self._roster.running:
            self._lines.post(replica, command)

    def _hear_engine(self, replica: int, handle: EngineHandle, report: Report, count: int) -> None:
        """Its report with that number."""
        if report.batch != count:
            raise MessageError(f"replica {replica} sent report {report.batch} after {count - 1}")
        with self._changed:
            if self._is(replica, handle):
                self._core.on_report(replica, report, np.frombuffer(report.first, np.int64).tolist())
                self._flush()

    def _lose(self, replica: int, handle: EngineHandle, reason: str) -> None:
        if self._is(replica, handle):
            self._runtime.stop([handle.actor], None)  # nothing of it may go on
        with self._changed:
            if self._is(replica, handle):
                self._core.lose(replica, reason)
                self._core.pump()
                self._core.disconnect()
                self._flush()

    def _is(self, replica: int, handle: EngineHandle) -> bool:
        return self._roster.running.get(replica) is handle

    # -- engines that come and go: a driver starts and ends them ---------------------------------------------

    def enlist(self, number: int, count: int) -> list[int]:
        """Indices for `count` engines that the driver is going to start."""
        with self._changed:
            replicas = self._core.enlist(count, self._client(number))
            self._save()
            self._changed.notify_all()
            return replicas

    def take_due(self, number: int) -> list[int]:
        """Indices of lost engines at which the driver, and no other, is to start others now."""
        with self._changed:
            return self._core.take_due(self._client(number))

    def seconds(self) -> float | None:
        """Until take_due() has something; None when it will not, as far as it is known now."""
        with self._changed:
            return self._core.supervisor.seconds()

    def replacements(self) -> list[Replacement]:
        """What is done about lost engines."""
        with self._changed:
            supervisor = self._core.supervisor
            return supervisor.replacements() if supervisor.replaces else []

    def give_up(self, replicas: Sequence[int], why: str, placeless: bool) -> None:
        """Those could not be started."""
        with self._changed:
            self._core.give_up(replicas, why, placeless)
            self._flush()

    def _client(self, number: int) -> str:
        """ClosedError for a driver whose lease has ended."""
        if number not in self._drivers:
            raise ClosedError(f"driver {number} of {self._roster.name!r}, whose lease has ended,")
        return self._drivers[number].client

    def join(self, replica: int, handle: EngineHandle, model: bytes) -> bytes | None:
        """An engine of enlist() takes requests from now on; the token of the last reset that it has to know of. One
        that did already may say so again; one that comes after another's gets ReplicaStateError."""
        with self._changed:
            before, known = self._roster, self._roster.running.get(replica)
            if known is not None and known.start == handle.start and replica in self._core.members.here:
                return before.reset_token
            self._roster = replace(before.with_engine(replica, handle), model=model)
            try:
                self._core.join(replica, handle.pages, handle.epoch, handle.endpoint, handle.start)
            except RaykError:
                self._roster = before
                raise
            self._lines.follow(replica, handle)
            self._save()
            self._flush()
            return self._roster.reset_token

    def drain(self, replica: int, leaving: bool) -> None:
        """See ServingCore."""
        with self._changed:
            self._core.drain(replica, leaving)
            self._save()
            self._flush()

    def undrain(self, replica: int) -> None:
        """ServingCore.resume()."""
        with self._changed:
            self._core.resume(replica)
            self._save()
            self._flush()

    def hand_over(self, replica: int) -> None:
        """See ServingCore."""
        with self._changed:
            self._core.hand_over(replica)

    def requests_on(self, replica: int) -> list[str]:
        """Ids of what is placed there."""
        with self._changed:
            return self._core.ids_on(replica)

    def offer(self, replica: int) -> None:
        """See ServingCore."""
        with self._changed:
            self._core.offer(replica)

    def offering(self, replica: int) -> bool:
        """Whether its offer is not over."""
        with self._changed:
            return self._core.evacuations.under_way(replica)

    def remove(self, replica: int) -> Removed:
        """See ServingCore; whoever calls ends the engine."""
        with self._changed:
            removed = self._core.remove(replica)
            self._roster = self._roster.with_engine(replica, None)
            self._lines.close(replica)
            self._save()
            self._flush()
            return removed

    def note_reset(self, token: bytes) -> None:
        """Engines that join later have to forget what was cached before that reset."""
        with self._changed:
            self._roster = replace(self._roster, reset_token=token)
            self._save()

    # -- questions -----------------------------------------------------------------------------------------

    def ping(self) -> int:
        """The roster's version."""
        return self._core.members.version

    def pid(self) -> int:
        """This process, on its node."""
        return os.getpid()

    def roster(self, proof: Proof | None = None) -> ServingRoster:
        """What a driver needs to attach."""
        self._authenticator.check(proof)
        with self._changed:
            return self._standing()

    def _standing(self) -> ServingRoster:
        members = self._core.members
        return replace(self._roster, version=members.version, states=tuple(map(str, members.states)))

    def explain(self, request_id: str) -> m.Explained:
        """Why a request went where it went; of a driver's the id is its number, a slash and the request's id."""
        with self._changed:
            return self._core.explain(request_id)

    def readings(self, labels: Labels) -> list[Reading]:
        """Its metrics."""
        with self._changed:
            return list(read_serving(self._core, len(self._drivers), labels))

    def state(self) -> ServingState:
        """A snapshot."""
        with self._changed:
            core, fetching = self._core, self._core.router.fetching
            counts = {number: [0, 0] for number in self._drivers}
            requests = [0] * len(core.members)
            for request in core.requests:
                counts.setdefault(request.driver, [0, 0])[request.replica >= 0] += 1
                if request.replica >= 0:
                    requests[request.replica] += 1
            drivers = {n: (driver.client, counts[n][0], counts[n][1]) for n, driver in self._drivers.items()}
            lines = fetching.links.table() if fetching is not None else []
            paths = {replica: self._lines.path(replica) for replica in self._roster.running}
            return ServingState(drivers, self._owner, requests, core.why_lost, core.admission_state(), lines, paths)
