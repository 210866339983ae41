"""A driver's line to an engine, or to a Cluster's scheduler: posts one way, a stream the other (actors/mailbox.py).

Each has a socket of its own, and goes on by calls where that was cut. A post never waits: one for which the socket has
no room goes by a call.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from itertools import count
from threading import Lock
from time import monotonic
from typing import Any

from rayk import protocol as m
from rayk.actors.channel import new_client_id
from rayk.actors.connection import Sent
from rayk.actors.frames import SocketError
from rayk.actors.interface import Actor, Runtime
from rayk.actors.path import MessagePath
from rayk.errors import CallTimeoutError
from rayk.protocol.lines import PathState, Post, Read, decode_part, encode_line

AHEAD = 2  # parts that are asked for before the first of them came
SLICE = 0.5  # seconds between two looks
QUIET_SECONDS = 2.5  # for which a socket may bring nothing, where something comes every second
ROOM, POSTS = 96_000, 64  # bytes and posts on their way that a socket takes for certain


class PostLine:
    """To the `actor` that errors call `target`; its read() has the lane `lane`."""

    def __init__(self, runtime: Runtime, actor: Actor, target: str, lane: str) -> None:
        self._runtime = runtime
        self._actor = actor
        self._target = target
        self._lane = lane
        self._sender = new_client_id("post")
        self._numbers = count(1)
        self._lock = Lock()  # posts go in their order
        self._posts = MessagePath(runtime, actor, target, runtime.sockets)
        self._reads = MessagePath(runtime, actor, f"the stream of {target}", runtime.sockets, repeats=False)

    def post(self, body: bytes, driver: int = 0) -> None:
        """Have it carried out, after all posts before it; does not wait for that."""
        with self._lock:
            wire = encode_line(Post(self._sender, next(self._numbers), driver, body))
            if self._posts.send(wire, ROOM, POSTS) is None:
                self._posts.call(wire)

    def stream(self, silence: float, driver: int = 0) -> Iterator[bytes]:
        """What the actor has to say to that driver. ActorGoneError when it is gone, CallTimeoutError when nothing came
        for `silence` seconds, and what its stream raised."""
        name, heard, asked = os.urandom(8).hex(), 0, deque[Sent]()
        while True:
            wire = self._part(name, driver, heard, asked, silence)
            part = decode_part(wire)
            if part.failure is not None:
                raise m.to_error(part.failure)
            if part.over:
                return
            heard += 1
            self._ask(name, driver, heard, asked)  # before this one is dealt with
            yield part.body

    def _ask(self, name: str, driver: int, heard: int, asked: deque[Sent]) -> None:
        """By the socket, as far as there is one."""
        while len(asked) < AHEAD and not (asked and asked[0].line.cut):
            sent = self._reads.send(encode_line(Read(name, driver, heard + len(asked) + 1, heard)))
            if sent is None:
                return
            asked.append(sent)

    def _part(self, name: str, driver: int, heard: int, asked: deque[Sent], silence: float) -> bytes:
        """The next one. A socket that brings nothing is given up before the actor is."""
        passed, last, call = 0.0, monotonic(), None
        while True:
            if call is None:
                self._ask(name, driver, heard, asked)
            if not asked and call is None:
                read = encode_line(Read(name, driver, heard + 1, heard))
                call = self._actor.call("read", read, lane=self._lane)
            wire = self._arrived(asked, call)
            self._posts.look(QUIET_SECONDS)
            if wire is not None:
                return wire
            now = monotonic()
            passed, last = passed + min(now - last, 2 * SLICE), now  # no time in which this process was stopped
            if passed >= silence:
                raise CallTimeoutError(self._target, passed)
            if asked and passed >= QUIET_SECONDS:
                asked[0].line.close(f"it brought nothing for {passed:.1f} s")

    def _arrived(self, asked: deque[Sent], call: Any) -> bytes | None:
        if asked:
            line = asked[0].line
            try:
                wire = line.wait(asked[0], SLICE)
            except SocketError:
                asked.clear()
                self._reads.resend(line)
                return None
            if wire is not None:
                asked.popleft()
            return wire
        try:
            found: bytes = self._runtime.get(call, self._target, SLICE)
            return found
        except CallTimeoutError:
            return None

    def path(self, replica: int) -> PathState:
        """What carries posts and parts now; calls, if one of them goes by calls."""
        posts, reads = self._posts.state(replica), self._reads.state(replica)
        worse = reads if reads.kind == "calls" else posts
        return worse._replace(messages=posts.messages + reads.messages)

    def close(self) -> None:
        """Let go of the sockets; what is still sent goes by calls."""
        self._posts.close()
        self._reads.close()
