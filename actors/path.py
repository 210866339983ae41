"""The way of messages to one actor: a socket where there is one, else Ray's calls.

A socket is opened on a thread of its own, and again some time after it failed; until it is open messages go by calls.
What went by a socket that was cut is sent again by calls, in its order: messages bear numbers, so that what was done is
answered from memory. Nothing overtakes: a message goes by the socket only when the last call was answered, and a call
that is made while messages are on the socket tells the actor for how many of them it has to wait.
"""

from __future__ import annotations

import logging
from threading import Lock, Thread
from time import monotonic
from typing import Any

from rayk.actors.chunks import PIECE, cut
from rayk.actors.connection import Connection, Sent
from rayk.actors.frames import SocketError
from rayk.actors.interface import Actor, ActorGoneError, Runtime, SocketAddress
from rayk.errors import CallTimeoutError, RaykError
from rayk.protocol.lines import PathState

log = logging.getLogger("rayk.actors")

LISTEN_SECONDS = 5.0  # for the actor to say where it listens
AGAIN_SECONDS, LONGEST_SECONDS = 1.0, 60.0  # until a socket that failed is tried again, twice as long each time


class MessagePath:
    """Of one channel to `actor`; `target` names it in warnings. Unless it `repeats`, what a socket that was cut left is
    its sender's to send again."""

    def __init__(self, runtime: Runtime, actor: Actor, target: str, sockets: bool = True, repeats: bool = True) -> None:
        self._runtime = runtime
        self._actor = actor
        self._target = target
        self._repeats = repeats
        self._lock = Lock()  # of the next six
        self._line: Connection | None = None
        self._reason = "" if actor.socket is not None else "it listens on no socket"
        self._opening, self._closed = False, not sockets
        self._again_at, self._pause = 0.0, AGAIN_SECONDS
        self._last_call: Any = None  # of which it is not known that it was answered
        self._messages = 0
        self._answered, self._answered_at = 0, monotonic()  # bytes by the last look, and when they grew
        if actor.socket is not None:
            self._open()

    def send(self, wire: bytes, room: int | None = None, most: int = 0) -> Sent | None:
        """By the socket; None when a call has to be made: also when more than `room` bytes, or `most` messages, would
        be on their way there."""
        line = self._line
        if line is None:
            self._open_again()
            return None
        if self._last_call is not None and not self._last_is_done():
            return None
        if room is not None and len(line):
            line.look()
        if room is not None and (line.unanswered + len(wire) > room or len(line) >= most):
            return None
        try:
            sent = line.send(wire)
        except SocketError:
            self.resend(line)
            return None
        self._messages += 1
        return sent

    def call(self, wire: bytes, attached: Any = (), with_data: bool = False) -> list[Any]:
        """By a call of handle(), or handle_with_data(), which gives two references."""
        line = self._line
        if line is not None and line.cut:
            self.resend(line)
        with self._lock:
            return self._call(wire, attached, with_data)

    def _call(self, wire: bytes, attached: Any = (), with_data: bool = False) -> list[Any]:
        arguments = cut(wire) if len(wire) > PIECE else (wire,)
        line = self._line
        if line is not None and len(line):
            arguments = ((line.label, line.sent), *arguments)
        if with_data:
            refs = list(self._actor.call("handle_with_data", *arguments, returns=2))
        else:
            refs = [self._actor.call("handle", *arguments, *attached)]
        self._last_call = refs[0]
        return refs

    def resend(self, line: Connection) -> None:
        """A connection was cut: what was not answered goes by calls, and what comes later, too, for a while."""
        with self._lock:
            if self._line is line:
                self._line = None
                self._failed(line.cut)
            for sent in line.take_left() if self._repeats else ():
                sent.call = self._call(sent.wire)[0]

    def look(self, patience: float) -> None:
        """Take answers that nobody waits for; to be called every second. What a socket left that was cut, or that
        answered nothing for longer than `patience`, is sent again."""
        line = self._line
        if line is None:
            self._open_again()
            return
        if len(line):
            line.look()
        if not len(line) or line.answered != self._answered:
            self._answered, self._answered_at = line.answered, monotonic()
        elif monotonic() - self._answered_at > patience:
            line.close(f"it answered nothing for {patience:g} s")
        if line.cut:
            self.resend(line)

    def _last_is_done(self) -> bool:
        try:
            self._runtime.get(self._last_call, self._target, 0.0)
        except CallTimeoutError:
            return False
        except Exception:  # whoever waits for it hears what it was
            pass
        self._last_call = None
        return True

    def state(self, replica: int) -> PathState:
        """What carries messages now."""
        line = self._line
        if line is not None and not line.cut:
            return PathState(replica, line.by, "", self._messages)
        return PathState(replica, "calls", self._reason or "the socket is being opened", self._messages)

    def close(self) -> None:
        """Use no socket any more."""
        with self._lock:
            self._closed, self._again_at = True, 0.0
            line = self._line
        if line is not None:
            line.close()

    # -- opening ---------------------------------------------------------------------------------

    def _open_again(self) -> None:
        if self._again_at and monotonic() >= self._again_at:
            self._open()

    def _open(self) -> None:
        with self._lock:
            if self._opening or self._closed:
                return
            self._opening, self._again_at = True, 0.0
        Thread(target=self._connect, name="rayk-connect", daemon=True).start()

    def _connect(self) -> None:
        line, reason = None, ""
        for ask in (False, True):  # the actor may have begun anew, and listen elsewhere
            try:
                if ask:
                    self._actor.socket = self._where() or self._actor.socket
                assert self._actor.socket is not None
                line = Connection(self._actor.socket)
                break
            except (SocketError, OSError) as error:  # OSError: no file descriptors
                reason = str(error) or type(error).__name__
        with self._lock:
            self._opening = False
            if line is None:
                self._failed(reason)
            elif self._closed:
                line.close()
            else:
                self._line, self._reason, self._pause = line, "", AGAIN_SECONDS

    def _where(self) -> SocketAddress | None:
        """Where the actor listens now, as far as it answers."""
        try:
            found: SocketAddress | None = self._runtime.get(
                self._actor.call("listen", control=True), self._target, LISTEN_SECONDS
            )
            return found
        except (ActorGoneError, RaykError):
            return None

    def _failed(self, reason: str) -> None:
        """With the lock."""
        if self._closed:
            return
        if not self._reason:
            log.warning("the socket of %s carries nothing (%s): going on with calls", self._target, reason)
        self._reason = reason
        self._again_at, self._pause = monotonic() + self._pause, min(LONGEST_SECONDS, 2 * self._pause)
