"""The end in an actor of drivers' lines (actors/post_line.py): posts, each carried out once and in its sender's order,
and a stream for each driver, whose parts are kept until they were heard.

Both come by sockets and by Ray's calls alike, so that one may go on where the other was cut. A connection has either
posts or reads: who reads is waited with until there is something to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

from rayk.actors.chunks import joined
from rayk.actors.interface import SocketAddress
from rayk.actors.listener import Listener, listening
from rayk.errors import MessageError, RaykError
from rayk.protocol.base import failure
from rayk.protocol.lines import Part, Post, Read, decode_line, encode_line

BEHIND_SECONDS = 60.0  # for which a call waits for posts that were sent before it by a socket
SENDERS = 1024  # that are remembered; beyond that the one that was silent for longest is forgotten


class Mailbox:
    """`post(driver, body)` carries a post out, `stream(driver)` makes what there is for that driver, and `failed` is
    told what a post raised, or that one is missing or cannot be read."""

    def __init__(
        self,
        post: Callable[[int, bytes], None],
        stream: Callable[[int], Iterator[bytes]],
        failed: Callable[[Exception], None],
    ) -> None:
        self._post = post
        self._stream = stream
        self._failed = failed
        self._lock = Lock()  # of the next two
        self._streams: dict[int, _Stream] = {}  # by driver
        self._listener: Listener | None = None
        self._posting = Lock()
        self._taken: dict[str, int] = {}  # the last post of each sender

    def listen(self) -> SocketAddress | None:
        """Take messages from a socket, too, from now on."""
        from rayk.actors.runtime import RayRuntime  # in the actor's process, which has it

        with self._lock:
            if self._listener is None:
                self._listener = listening(self._answer, RayRuntime.address())
            return self._listener.address if self._listener is not None else None

    def close(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            self._listener.close()

    def _answer(self, wire: bytes) -> bytes:
        message = self._decoded(wire)
        if isinstance(message, Read):
            return self._part(message)
        self._take(message)
        return b""

    def _decoded(self, wire: bytes) -> Post | Read:
        try:
            return decode_line(wire)
        except Exception as error:  # it may have been a post
            self._failed(error)
            raise

    # -- posts ---------------------------------------------------------------------------------------------

    def handle(self, first: Any, *rest: Any) -> None:
        """A post by a call, see rayk.actors.chunks; what begins with a pair waits for so many messages of that
        connection."""
        if isinstance(first, tuple):
            if self._listener is not None:
                self._listener.handled(first[0], first[1], BEHIND_SECONDS)
            first, *rest = rest  # type: ignore[assignment]  # a list or a tuple
        post = self._decoded(joined(first, rest)[0])
        assert isinstance(post, Post)
        self._take(post)

    def _take(self, post: Post) -> None:
        with self._posting:
            last = self._taken.pop(post.sender, 0)
            self._taken[post.sender] = max(last, post.number)
            if len(self._taken) > SENDERS:
                del self._taken[next(iter(self._taken))]
            if post.number <= last:  # it was sent again
                return
            try:
                if post.number > last + 1:
                    raise MessageError(f"{post.sender} sent post {post.number} after {last}")
                self._post(post.driver, post.body)
            except Exception as error:
                self._failed(error)

    # -- streams -------------------------------------------------------------------------------------------

    def read(self, wire: bytes) -> bytes:
        """The part that a Read asks for, by a call."""
        read = self._decoded(wire)
        assert isinstance(read, Read)
        return self._part(read)

    def _part(self, read: Read) -> bytes:
        with self._lock:
            stream = self._streams.get(read.driver)
            if read.number == 1 and (stream is None or stream.name != read.name):
                stream = self._streams[read.driver] = _Stream(read.name, self._stream(read.driver))
        if stream is None or stream.name != read.name:
            return encode_line(Part(over=True))  # another has its place, or the driver counts as gone
        return stream.part(read)

    def forget(self, driver: int) -> None:
        """That driver is gone."""
        with self._lock:
            self._streams.pop(driver, None)


class _Stream:
    def __init__(self, name: str, parts: Iterator[bytes]) -> None:
        self.name = name
        self._parts = parts
        self._made = 0
        self._kept: dict[int, bytes] = {}
        self._lock = Lock()

    def part(self, read: Read) -> bytes:
        """Waits for it."""
        with self._lock:
            for number in [number for number in self._kept if number <= read.heard]:
                del self._kept[number]
            if read.number in self._kept:  # it was asked for before
                return self._kept[read.number]
            if read.number != self._made + 1:  # by a socket that was cut, and the same came another way: no part of it
                error = MessageError(f"part {read.number} of a stream was asked for after {self._made}")
                return encode_line(Part(failure=failure(error)))
            try:
                body = next(self._parts, None)
                part = Part(body) if body is not None else Part(over=True)
            except RaykError as raised:
                part = Part(failure=failure(raised))
            self._made += 1
            wire = self._kept[self._made] = encode_line(part)
            return wire
