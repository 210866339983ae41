"""The end of the data plane in a process that asks: one socket to one actor, used from any thread.

Who waits for an answer reads the socket; when several wait, one of them reads for all. future() has a thread read from
then on, for event loops. A connection that is cut stays cut: what was not answered raises SocketError, and is for the
sender to send again by another way.
"""

from __future__ import annotations

import select
import socket
from concurrent.futures import Future
from contextlib import suppress
from threading import Condition, Lock, Thread
from time import monotonic
from typing import Any

from rayk.actors.frames import FrameReader, SocketError, introduce, pieces, watch_link
from rayk.actors.interface import SocketAddress
from rayk.actors.listener import HANDSHAKE_SECONDS, SEND_SECONDS, machine

CONNECT_SECONDS = 2.0


class Sent:
    """A message on its way. `answer` is there once it came."""

    __slots__ = ("answer", "call", "future", "line", "number", "wire")

    def __init__(self, line: Connection, number: int, wire: bytes) -> None:
        self.line = line
        self.number = number
        self.wire = wire
        self.answer: bytes | None = None
        self.future: Future[bytes] | None = None
        self.call: Any = None  # a reference to the answer, of what had to be sent again by a call


class Connection:
    """`label` names it to the listener; `cut` says why it carries nothing any more, "" while it does."""

    def __init__(self, address: SocketAddress) -> None:
        end, self.by = _connect(address)
        try:
            end.settimeout(HANDSHAKE_SECONDS)
            self.label = introduce(end, address.key)
            end.setblocking(True)
        except (OSError, SocketError) as error:
            end.close()
            raise SocketError(str(error) or type(error).__name__) from None
        self.cut = ""
        self.sent = 0
        """Messages so far."""
        self._sent_bytes = 0
        self.answered = 0
        """Bytes of messages that were answered."""
        self._end = end
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._frames = FrameReader()
        self._on_way: dict[int, Sent] = {}
        self._left: list[Sent] = []  # when it was cut
        self._writing = Lock()
        self._reading = Lock()
        self._arrived = Condition()
        self._waiting = 0  # threads that wait for another one to read
        self._reader: Thread | None = None

    def __len__(self) -> int:
        """Messages that were not answered yet."""
        return len(self._on_way)

    @property
    def unanswered(self) -> int:
        """Bytes of those."""
        return self._sent_bytes - self.answered

    def send(self, wire: bytes) -> Sent:
        """SocketError when it cannot be sent: the other side did not get it whole."""
        with self._writing:
            if self.cut:
                raise SocketError(self.cut)
            self.sent += 1
            self._sent_bytes += len(wire)
            sent = self._on_way[self.sent] = Sent(self, self.sent, wire)
        try:
            for piece in pieces(sent.number, wire):
                with self._writing:
                    self._write(piece)
        except BaseException as error:  # what was sent of it cannot be taken back
            self._on_way.pop(sent.number, None)
            self._fail(str(error) or type(error).__name__)
            raise SocketError(self.cut) from (None if isinstance(error, (OSError, SocketError)) else error)
        return sent

    def _write(self, piece: bytes) -> None:
        """With the lock of writers. Reads meanwhile, so that two ends that are full do not wait for each other."""
        if self.cut:
            raise SocketError(self.cut)
        with suppress(BlockingIOError):
            done = self._end.send(piece, socket.MSG_DONTWAIT)
            if done == len(piece):
                return
            piece = piece[done:]
        rest, until = memoryview(piece), monotonic() + SEND_SECONDS
        both = select.poll()  # not select(), which knows the first 1,024 descriptors of a process only
        both.register(self._end, select.POLLIN | select.POLLOUT)
        while rest:
            ready = both.poll(max(0.0, until - monotonic()) * 1e3)
            if not ready:
                raise SocketError(f"the other side took nothing for {SEND_SECONDS:g} s")
            readable, writable = ready[0][1] & ~select.POLLOUT, ready[0][1] & ~select.POLLIN
            if readable and self._reading.acquire(blocking=False):
                try:
                    self._read(0.0)
                finally:
                    self._release()
            if writable:
                with suppress(BlockingIOError):
                    rest = rest[self._end.send(rest, socket.MSG_DONTWAIT) :]
                    until = monotonic() + SEND_SECONDS

    def wait(self, sent: Sent, timeout: float) -> bytes | None:
        """The answer; None when it did not come in time. SocketError when it will not come by this way."""
        until = monotonic() + timeout
        while sent.answer is None:
            if self.cut:
                raise SocketError(self.cut)
            left = until - monotonic()
            if self._reading.acquire(blocking=False):
                try:
                    self._read(max(0.0, left))
                finally:
                    self._release()
            elif left > 0:
                with self._arrived:
                    self._waiting += 1
                    self._arrived.wait_for(
                        lambda: sent.answer is not None or self.cut or not self._reading.locked(), left
                    )
                    self._waiting -= 1
            if left <= 0:
                break
        return sent.answer

    def look(self) -> None:
        """Take the answers that are here, unless another thread reads."""
        if self._reading.acquire(blocking=False):
            try:
                self._read(0.0)
            finally:
                self._release()

    def future(self, sent: Sent) -> Future[bytes]:
        """The answer, or SocketError, without a thread that waits for it."""
        with self._arrived:
            if sent.future is None:
                sent.future = Future()
                if sent.answer is not None:
                    sent.future.set_result(sent.answer)
                elif self.cut:
                    sent.future.set_exception(SocketError(self.cut))
            if self._reader is None and not self.cut:
                self._reader = Thread(target=self._read_on, name="rayk-socket", daemon=True)
                self._reader.start()
        return sent.future

    def take_left(self) -> list[Sent]:
        """What was sent and not answered when it was cut, in its order; once."""
        with self._arrived:
            left, self._left = self._left, []
        return left

    def close(self, reason: str = "it was closed") -> None:
        """Cut it."""
        self._fail(reason)

    def _release(self) -> None:
        self._reading.release()
        if self._waiting:
            with self._arrived:
                self._arrived.notify_all()

    def _read_on(self) -> None:
        with self._reading:
            while not self.cut:
                self._read(None)
                if self._waiting:
                    with self._arrived:
                        self._arrived.notify_all()

    def _read(self, timeout: float | None) -> None:
        """Take what comes within so many seconds, None for any time. With the lock of readers."""
        try:
            if timeout and not self._poll.poll(timeout * 1e3):
                return
            messages = self._frames.receive(self._end, socket.MSG_DONTWAIT if timeout is not None else 0)
        except BlockingIOError:
            return
        except (OSError, ValueError, SocketError) as error:  # ValueError: another thread closed it
            self._fail(str(error) or type(error).__name__)
            return
        for number, answer in messages:
            sent = self._on_way.pop(number, None)
            if sent is not None:
                self.answered += len(sent.wire)
                sent.answer = answer
                if sent.future is not None:
                    _settle(sent.future, answer)

    def _fail(self, reason: str) -> None:
        with self._arrived:
            if self.cut:
                return
            self.cut = reason
            with suppress(OSError):
                self._end.shutdown(socket.SHUT_RDWR)  # whoever reads it wakes up
            self._end.close()
            self._left, self._on_way = list(self._on_way.values()), {}
            left = self._left
            self._arrived.notify_all()
        for sent in left:
            if sent.future is not None:
                _settle(sent.future, SocketError(reason))


def _settle(future: Future[bytes], outcome: bytes | SocketError) -> None:
    with suppress(Exception):  # nobody waits any more
        if isinstance(outcome, SocketError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _connect(address: SocketAddress) -> tuple[socket.socket, str]:
    """A connected socket, and its kind: "unix" on the same machine, else "tcp"."""
    if address.machine == machine():
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            end.settimeout(CONNECT_SECONDS)
            end.connect(address.path)
            return end, "unix"
        except OSError:
            end.close()
    if not address.port:
        raise SocketError(f"{address.path} does not answer, and there is no way from other machines")
    try:
        end = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
    except OSError as error:
        raise SocketError(f"{address.host}:{address.port} does not answer: {error.strerror or error}") from None
    watch_link(end)
    return end, "tcp"
