"""The scheduler actor: runs the core's scripts by talking to the replicas. It only translates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from threading import Condition
from time import monotonic
from typing import Any

from rayk import messages as m
from rayk.actors.link import Link, Pending, hear, new_client_id
from rayk.actors.pieces import joined
from rayk.actors.process import settle
from rayk.actors.runtime import Actor, RayRuntime, Runtime
from rayk.answers import Answers
from rayk.errors import MessageError, RaykError, ReplicaLostError, StaleEpochError
from rayk.scheduler.asks import Ask, Told
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.desk import DeskSettings

LANES = 8  # batches that are under way at once; the driver that waits for each of its batches uses one
ANSWERS = 16 * LANES  # remembered for each driver; more than its messages can overtake each other by


class SchedulerActor:
    """Started by rayk.scheduler.cluster. `roster` is handed to drivers that attach by name."""

    def __init__(
        self,
        epoch: int,
        replicas: Sequence[Actor],
        epochs: Sequence[int],
        settings: DeskSettings,
        copies: bool,
        roster: Any,
        runtime: Runtime | None = None,
    ) -> None:
        client, runtime = new_client_id("scheduler"), runtime or RayRuntime()
        self._epoch = epoch
        self._roster = roster
        self._core = SchedulerCore(epochs, settings, copies, monotonic)
        self._links = [
            Link(runtime, actor, f"replica {r}", epochs[r], client, partial(self._lost, r))
            for r, actor in enumerate(replicas)
        ]
        for r, link in enumerate(self._links):
            link.news, link.known = partial(self._hear, r), -1
            link.pages = self._core.hall is not None
        self._answers: Answers[bytes] = Answers(ANSWERS)
        self._working: set[tuple[str, int]] = set()  # mutations that a lane is at
        self._core_lock = Condition()  # a script's step and the sending of what it asks are one
        settle()

    def handle(self, first: bytes | int, *rest: bytes) -> bytes:
        """Answer a message (see rayk.actors.pieces). Never raises for what a sender did wrong or a replica failed to
        do.

        Several lanes call this at once: while one waits for replicas, others take the next batches.
        """
        seq = 0
        try:
            envelope = m.decode_envelope(joined(first, rest)[0])
            seq = envelope.seq
            if not isinstance(envelope, m.SchedulerEnvelope):
                raise MessageError(f"the scheduler does not take {type(envelope.command).__name__}; a replica does")
            if envelope.epoch != self._epoch:
                raise StaleEpochError(-1, envelope.epoch, self._epoch)
            return self._once(envelope)
        except RaykError as error:
            return m.encode(m.Reply(self._epoch, seq, m.failure(error)))

    def _once(self, envelope: m.SchedulerEnvelope) -> bytes:
        """Carry a command out unless that was done before, or is being done."""
        client, seq = envelope.client, envelope.seq
        this = (client, seq)
        with self._core_lock:
            self._core_lock.wait_for(lambda: this not in self._working)
            repeated = self._answers.repeated(client, seq)
            if repeated is not None:
                return repeated
            if seq:
                self._working.add(this)
        reply = b""
        try:
            reply = self._reply(envelope)
        finally:
            with self._core_lock:
                self._working.discard(this)
                if reply:
                    self._answers.keep(client, seq, reply)
                if isinstance(envelope.command, m.Disconnect):
                    self._answers.forget(client)
                self._core_lock.notify_all()
        return reply

    def _reply(self, envelope: m.SchedulerEnvelope) -> bytes:
        try:
            result = self._run(envelope.client, envelope.command)
        except RaykError as error:
            result = m.failure(error)
        return m.encode(m.Reply(self._epoch, envelope.seq, result))

    def _run(self, client: str, command: m.SchedulerCommand) -> m.Result:
        script = self._core.handle(client, command)
        told: list[Told] | None = None
        try:
            while True:
                with self._core_lock:
                    if told is None:
                        self._core.renewed[client] = monotonic()
                    if self._core.hall is not None:
                        self._core.hall.gate.reports([x.turn for x in self._links], [x.used for x in self._links])
                    asks = script.send(told) if told is not None else next(script)
                    sent = [self._send(ask) for ask in asks]
                told = [
                    Told(m.failure(heard)) if isinstance(heard, RaykError) else Told(*heard) for heard in hear(sent)
                ]
        except StopIteration as end:
            result: m.Result = end.value
            return result

    def _send(self, ask: Ask) -> Pending | RaykError:
        try:
            return self._links[ask.replica].send(ask.command, ask.attached, ask.with_data)
        except RaykError as error:
            return error

    def _hear(self, replica: int, news: m.News) -> None:
        with self._core_lock:
            self._core.desk.hear(replica, news)
            self._links[replica].known = self._core.desk.known[replica]

    def _lost(self, replica: int, reason: str) -> RaykError:
        with self._core_lock:
            placed = self._core.placements.on(replica)
            self._core.desk.lost(replica)
            if self._core.hall is not None:
                self._core.hall.lost(replica, placed)
        return ReplicaLostError(replica, self._core.epochs[replica], placed, reason)

    def ping(self) -> int:
        """The epoch, at once, also while the data lane is busy."""
        return self._epoch

    def pid(self) -> int:
        """This process, on its node."""
        return os.getpid()

    def renew(self, client: str) -> None:
        """The driver is alive; keeps its lease."""
        self._core.renewed[client] = monotonic()

    def roster(self) -> Any:
        """What a driver needs to attach."""
        return self._roster
