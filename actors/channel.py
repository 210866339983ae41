"""A numbered line to one actor: epoch, sequence numbers, deadlines, and errors that name who failed."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from threading import Lock
from time import monotonic
from typing import Any, NamedTuple

from rayk import protocol as m
from rayk.actors.connection import Sent
from rayk.actors.frames import SocketError
from rayk.actors.interface import Actor, ActorGoneError, Runtime
from rayk.actors.path import MessagePath
from rayk.errors import CallTimeoutError, RaykError
from rayk.protocol.lines import PathState

CALL_SECONDS = 120.0  # an answer that takes longer means a hung process
SLICE = 0.5  # seconds between two looks at a process that takes long to answer


def new_client_id(kind: str) -> str:
    """A sender's name that no other sender has."""
    return f"{kind}-{os.getpid()}-{os.urandom(6).hex()}"


class Answer(NamedTuple):
    """A result, and a reference to the page data that came with it (None unless asked for)."""

    result: m.Result
    data: Any = None


class Traffic(NamedTuple):
    """Messages sent on a line, their bytes, and the bytes of the answers read; page data not counted."""

    calls: int = 0
    sent: int = 0
    received: int = 0


class Pending(NamedTuple):
    """A sent message whose answer was not read yet."""

    link: ActorChannel
    ref: Any
    data: Any

    def wait(self) -> Answer:
        """The answer; a Failure is raised as the error it stands for."""
        answer = self.outcome()
        if isinstance(answer.result, m.Failure):
            raise m.to_error(answer.result)
        return answer

    def heard(self, waited: float = 0.0) -> Answer | RaykError:
        """The answer, or why there is none; so many seconds of the deadline were waited for it already."""
        try:
            return Answer(self.link.read(self.ref, waited), self.data)
        except RaykError as error:
            return error

    def within(self, seconds: float) -> Answer | RaykError | None:
        """heard(), if that is known within so many seconds, else None."""
        wire = self.link.wire_within(self.ref, seconds)
        if wire is None or isinstance(wire, RaykError):
            return wire
        try:
            return Answer(self.link.decoded(wire), self.data)
        except RaykError as error:
            return error

    async def arrival(self) -> Any:
        """Return when outcome() would not wait: what arrived, None when outcome() has to say why nothing did."""
        return await self.link.arrival(self.ref)

    def outcome(self) -> Answer:
        """The answer, a Failure included. Raises only when the actor is gone or silent."""
        return Answer(self.link.read(self.ref), self.data)


def hear(
    sent: Sequence[Pending | RaykError], since: float | None = None, wires: Sequence[Any] | None = None
) -> list[Answer | RaykError]:
    """heard() of a whole round: one wait where all goes well. Its deadlines count from `since` (monotonic) on, and
    `wires` is what arrival() had of each, if that was waited for."""
    on_way = [pending for pending in sent if isinstance(pending, Pending)]
    started = monotonic() if since is None else since
    if wires is None and len(on_way) == len(sent) > 1:
        wires = on_way[0].link.fetch_all([pending.ref for pending in on_way], monotonic() - started)
    if wires is not None and None not in wires:
        return [Answer(p.link.decoded(wire), p.data) for wire, p in zip(wires, on_way, strict=True)]
    waited = monotonic() - started
    return [each.heard(waited) if isinstance(each, Pending) else each for each in sent]


class Pulse:
    """Whether a process lives, by its ping(), which has a lane of its own. Only time in which somebody looks counts,
    and none in which this process stood still itself."""

    def __init__(self, runtime: Runtime, actor: Actor, target: str, method: str = "ping") -> None:
        self._method = method
        self._runtime = runtime
        self._actor = actor
        self._target = target
        self._lock = Lock()
        self._asked: Any = None
        self._last = 0.0
        self.silence = 0.0
        """Seconds for which ping() was not answered, by the last look."""
        self.answer: Any = None
        """What it answered last."""

    def look(self) -> float:
        """`silence` now; ActorGoneError when the process died."""
        with self._lock:
            now = monotonic()
            if self._asked is not None:
                try:
                    self.answer = self._runtime.get(self._asked, self._target, 0.0)
                    self._asked, self.silence = None, 0.0
                except CallTimeoutError:
                    self.silence += min(now - self._last, 2 * SLICE)
            if self._asked is None:
                self._asked = self._actor.call(self._method, control=True)
            self._last = now
            return self.silence


class ActorChannel:
    """One sender's line to one actor. `gone(reason)` makes the error for an actor whose process died.

    With `quiet`, an actor whose ping() is not answered for so many seconds is not waited for any longer, and is sent
    nothing until it answers; one that does answer is waited for up to the timeout. Without `sockets` it makes calls,
    and need not be closed.
    """

    pulse_method = "ping"

    def __init__(
        self,
        runtime: Runtime,
        actor: Actor,
        target: str,
        epoch: int,
        client: str,
        gone: Callable[[str], RaykError],
        timeout: float = CALL_SECONDS,
        quiet: float | None = None,
        sockets: bool = True,
    ) -> None:
        self.actor = actor
        self.quiet = quiet
        self.epoch = epoch
        self._runtime = runtime
        self.target = target
        self._client = client
        self._gone = gone
        self._timeout = timeout
        self._pulse = Pulse(runtime, actor, target, self.pulse_method)
        self._numbers = itertools.count(1)
        self._calls = self._sent = self._received = 0
        self.seen = self.unfilled = 0
        """The latest change that an answer told of, and the tokens left to prefill after it."""
        self.roster = 0
        """The latest version of the roster that a scheduler's answer told of."""
        self.news: Callable[[m.CacheDelta], None] | None = None
        """Told of news in answers; who sets it says in `known` from where on."""
        self.known = m.NOT_ASKED
        self.pages = False
        """Whether answers have to say how many pages are in use."""
        self.turn = self.used = 0
        """The latest such number, and the answer it is of."""
        self._sockets = sockets
        self._path = MessagePath(runtime, actor, target, sockets)

    def renewed(self, epoch: int) -> ActorChannel:
        """The line to the actor as it began anew; messages are numbered on."""
        line = copy(self)
        line.epoch, line.roster = epoch, 0
        line._path = MessagePath(self._runtime, self.actor, self.target, self._sockets)
        line._pulse = Pulse(self._runtime, self.actor, self.target, self.pulse_method)
        return line

    @property
    def traffic(self) -> Traffic:
        """What went over this line so far."""
        return Traffic(self._calls, self._sent, self._received)

    def send(self, command: Any, attached: Sequence[Any] = (), with_data: bool = False) -> Pending:
        """Send one command; `attached` are references to page data of other replicas."""
        if self.quiet is not None and self._pulse.silence >= self.quiet and self.look() >= self.quiet:
            raise CallTimeoutError(self.target, self.quiet)
        seq = 0 if isinstance(command, m.READ_ONLY) else next(self._numbers)
        if isinstance(command, m.SchedulerCommand):
            wire = m.encode(m.SchedulerEnvelope(self._client, self.epoch, seq, command))
        else:
            wire = m.encode(m.ReplicaEnvelope(self._client, self.epoch, seq, command, self.known, self.pages))
        self._calls += 1
        self._sent += len(wire)
        try:
            if not attached and not with_data:
                sent = self._path.send(wire)
                if sent is not None:
                    return Pending(self, sent, None)
            ref, *data = self._path.call(wire, attached, with_data)
            return Pending(self, ref, data[0] if data else None)
        except ActorGoneError as error:
            raise self._gone(str(error)) from None

    def path(self, replica: int) -> PathState:
        """What carries messages now."""
        return self._path.state(replica)

    def close(self) -> None:
        """Let go of the socket; what is still sent goes by calls."""
        self._path.close()

    @property
    def unanswered(self) -> bool:
        """Whether ping() was not answered for `quiet`, when it was looked last."""
        return self.quiet is not None and self._pulse.silence >= self.quiet

    def ask(self, command: Any) -> Any:
        """Send and wait: the result, or the error it stands for."""
        return self.send(command).wait().result

    def read(self, ref: Any, waited: float = 0.0) -> m.Result:
        """The result behind a reference."""
        return self.decoded(self.fetch(ref, waited))

    def decoded(self, wire: bytes) -> m.Result:
        """The result in an answer that came over this line."""
        self._received += len(wire)
        reply = m.decode_reply(wire)
        if reply.seen > self.seen:
            self.seen, self.unfilled = reply.seen, reply.unfilled
        if reply.pages is not None and reply.pages[0] > self.turn:
            self.turn, self.used = reply.pages
        if reply.roster > self.roster:
            self.roster = reply.roster
        if reply.news is not None and self.news is not None:
            self.news(reply.news)
        return reply.result

    def look(self) -> float:
        """Have the actor's ping() called, if no call is under way; seconds for which it was not answered."""
        try:
            return self._pulse.look()
        except ActorGoneError as error:
            raise self._gone(str(error)) from None

    def fetch_all(self, refs: Sequence[Any], waited: float = 0.0, within: float | None = None) -> list[Any] | None:
        """The values behind references of any actors; None when one of them has to be asked for by itself."""
        if any(isinstance(ref, Sent) for ref in refs):
            return None
        return self._runtime.get_all(refs, max(0.0, self._timeout - waited) if within is None else within)

    def wire_within(self, ref: Any, seconds: float) -> Any:
        """The value behind a reference, or the error of an actor that is gone; None when it is not there in time."""
        try:
            return self._get(ref, seconds)
        except CallTimeoutError:
            return None
        except RaykError as error:
            return error
        except ActorGoneError as error:
            return self._gone(str(error))

    async def arrival(self, ref: Any) -> Any:
        """The value behind a reference, once it is there; None when it will not come any more."""
        with suppress(Exception):  # read() says what it was
            if isinstance(ref, Sent):
                try:
                    return await self._arrived(ref.line.future(ref))
                except SocketError:
                    self._path.resend(ref.line)
                if ref.answer is not None:
                    return ref.answer
                ref = ref.call
            return await self._arrived(self._runtime.future(ref))
        return None

    async def _arrived(self, coming: Future[Any]) -> Any:
        future = asyncio.wrap_future(coming)
        if self.quiet is None:
            return await asyncio.wait_for(future, self._timeout)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio says it was lost
        started = monotonic()
        while not (await asyncio.wait([future], timeout=SLICE))[0]:
            if monotonic() - started > self._timeout or self.look() >= self.quiet:
                return None
        return future.result()

    def fetch(self, ref: Any, waited: float = 0.0) -> Any:
        """The value behind a reference of this actor's."""
        try:
            return self._wait(ref, max(0.0, self._timeout - waited))
        except CallTimeoutError as error:
            raise CallTimeoutError(self.target, error.seconds) from None
        except ActorGoneError as error:
            raise self._gone(str(error)) from None

    def _get(self, ref: Any, seconds: float) -> Any:
        """The same, within so many seconds, or CallTimeoutError."""
        if isinstance(ref, Sent):
            if ref.call is None:
                try:
                    answer = ref.line.wait(ref, seconds)
                    if answer is None:
                        raise CallTimeoutError(self.target, seconds)
                except SocketError:
                    self._path.resend(ref.line)
                    answer = ref.answer
                if answer is not None:
                    return answer
            ref = ref.call
        return self._runtime.get(ref, self.target, seconds)

    def _wait(self, ref: Any, left: float) -> Any:
        if self.quiet is None:
            try:
                return self._get(ref, left)
            except CallTimeoutError:
                raise CallTimeoutError(self.target, self._timeout) from None
        while True:
            part = 0.0 if self._pulse.silence >= self.quiet else min(left, SLICE)
            try:
                return self._get(ref, part)
            except CallTimeoutError:
                left -= part
                if left <= 0:
                    raise CallTimeoutError(self.target, self._timeout) from None
                if self._pulse.look() >= self.quiet:
                    raise CallTimeoutError(self.target, self.quiet) from None
