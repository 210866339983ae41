"""The scheduler actor: runs the core's scripts by talking to the replicas. It only translates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any

from rayk import messages as m
from rayk.actors.link import Link, Pending, new_client_id
from rayk.actors.runtime import Actor, RayRuntime, Runtime
from rayk.answers import Answers
from rayk.errors import MessageError, RaykError, ReplicaLostError, StaleEpochError
from rayk.scheduler.core import Ask, SchedulerCore, Told
from rayk.scheduler.routing import make_router


class SchedulerActor:
    """Started by rayk.scheduler.cluster. `roster` is handed to drivers that attach by name."""

    def __init__(
        self,
        epoch: int,
        replicas: Sequence[Actor],
        epochs: Sequence[int],
        router: str,
        copies: bool,
        page_size: int,
        roster: Any,
        runtime: Runtime | None = None,
    ) -> None:
        client, runtime = new_client_id("scheduler"), runtime or RayRuntime()
        self._epoch = epoch
        self._roster = roster
        self._core = SchedulerCore(epochs, make_router(router), copies, monotonic, page_size)
        self._links = [
            Link(runtime, actor, f"replica {r}", epochs[r], client, partial(self._lost, r))
            for r, actor in enumerate(replicas)
        ]
        self._answers: Answers[bytes] = Answers()

    def handle(self, wire: bytes) -> bytes:
        """Answer a message. Never raises for what a sender did wrong or a replica failed to do."""
        seq = 0
        try:
            envelope = m.decode_envelope(wire)
            seq = envelope.seq
            if not isinstance(envelope, m.SchedulerEnvelope):
                raise MessageError(f"the scheduler does not take {type(envelope.command).__name__}; a replica does")
            if envelope.epoch != self._epoch:
                raise StaleEpochError(-1, envelope.epoch, self._epoch)
            repeated = self._answers.repeated(envelope.client, seq)
            if repeated is not None:
                return repeated
            result = self._run(envelope.client, envelope.command)
        except RaykError as error:
            return m.encode(m.Reply(self._epoch, seq, m.failure(error)))
        reply = m.encode(m.Reply(self._epoch, seq, result))
        self._answers.keep(envelope.client, seq, reply)
        if isinstance(envelope.command, m.Disconnect):
            self._answers.forget(envelope.client)
        return reply

    def _run(self, client: str, command: m.SchedulerCommand) -> m.Result:
        self._core.renewed[client] = monotonic()
        script = self._core.handle(client, command)
        try:
            asks = next(script)
            while True:
                asks = script.send(self._ask(asks))
        except StopIteration as end:
            result: m.Result = end.value
            return result

    def _ask(self, asks: Sequence[Ask]) -> list[Told]:
        """One round: all messages are sent before the first answer is read."""
        sent: list[Pending | RaykError] = []
        for ask in asks:
            try:
                sent.append(self._links[ask.replica].send(ask.command, ask.attached, ask.with_data))
            except RaykError as error:
                sent.append(error)
        return [self._read(pending) for pending in sent]

    def _read(self, pending: Pending | RaykError) -> Told:
        try:
            if isinstance(pending, RaykError):
                raise pending
            return Told(*pending.outcome())
        except RaykError as error:
            return Told(m.failure(error))

    def _lost(self, replica: int, reason: str) -> RaykError:
        placed = self._core.placements.on(replica)
        return ReplicaLostError(replica, self._core.epochs[replica], placed, reason)

    def ping(self) -> int:
        """The epoch, at once, also while the data lane is busy."""
        return self._epoch

    def renew(self, client: str) -> None:
        """The driver is alive; keeps its lease."""
        self._core.renewed[client] = monotonic()

    def roster(self) -> Any:
        """What a driver needs to attach."""
        return self._roster
