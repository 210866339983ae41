"""Posts and streams of an engine's line: once and in order, whatever is cut, and nobody waits for a full socket."""

from __future__ import annotations

import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rayk.actors import mailbox, post_line
from rayk.actors import path as paths
from rayk.actors.interface import ActorGoneError
from rayk.actors.mailbox import Mailbox
from rayk.actors.path import MessagePath
from rayk.actors.post_line import PostLine
from rayk.actors.runtime import RayRuntime
from rayk.errors import CallTimeoutError, MessageError, RaykError, RemoteError
from rayk.protocol.lines import Post, Read, decode_part, encode_line

from .test_path import Runtime

WAIT = 10.0


class Engine:
    """An actor with a mailbox: it notes its posts, and says numbers as long as it may."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failures: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.more = threading.Semaphore(0)
        self.said = 0
        self.end: Exception | None = None
        self.calls: list[str] = []
        self.dead = False
        self.lanes = {"": ThreadPoolExecutor(1), "reports": ThreadPoolExecutor(4)}
        self.mailbox = Mailbox(self._post, self._stream, self.failures.append)
        self.socket = self.mailbox.listen()

    def _post(self, driver: int, body: bytes) -> None:
        self.gate.wait(WAIT)
        self.done.append(int(body))

    def _stream(self, driver: int) -> Iterator[bytes]:
        while True:
            found = self.more.acquire(timeout=0.05)  # its heart beats twenty times a second
            if found and self.end is not None:
                raise self.end
            if found:
                self.said += 1
            yield b"%d" % self.said if found else b""

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False, lane: str = "") -> Future[Any]:
        self.calls.append(method)
        if self.dead or control:
            answer: Future[Any] = Future()
            answer.set_exception(ActorGoneError("it died")) if self.dead else answer.set_result(self.socket)
            return answer
        return self.lanes[lane].submit(getattr(self.mailbox, method), *args)

    def close(self) -> None:
        self.gate.set()
        self.mailbox.close()
        for lane in self.lanes.values():
            lane.shutdown(wait=False)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(RayRuntime, "address", staticmethod(lambda: "127.0.0.1"))
    monkeypatch.setattr(paths, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(post_line, "SLICE", 0.02)
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def line(engine: Engine) -> Iterator[PostLine]:
    line = PostLine(Runtime(), engine, "replica 0", "reports")  # type: ignore[arg-type]  # stand-ins
    yield line
    line.close()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def heard(parts: Iterator[bytes], count: int) -> list[int]:
    """The next numbers, heartbeats left out."""
    found = list[int]()
    while len(found) < count:
        part = next(parts)
        found += [int(part)] if part else []
    return found


def ends(line: PostLine) -> list[MessagePath]:
    return [line._posts, line._reads]


def cut(path: MessagePath, how: int) -> None:
    if path._line is not None:
        with suppress(OSError):
            path._line._end.shutdown(how)


def by_socket(line: PostLine, parts: Iterator[bytes]) -> None:
    until(lambda: next(parts) is not None and line.path(0).kind == "unix")


def test_posts_and_parts_go_by_sockets(engine: Engine, line: PostLine) -> None:
    parts = line.stream(WAIT)
    by_socket(line, parts)
    engine.calls.clear()
    for i in range(200):
        line.post(b"%d" % i)
        engine.more.release()
    assert heard(parts, 200) == list(range(1, 201))
    until(lambda: engine.done == list(range(200)))
    assert "read" not in engine.calls and line.path(4).replica == 4 and line.path(4).messages > 200


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_all_is_done_once_and_in_order_while_sockets_are_cut(engine: Engine, line: PostLine, how: int) -> None:
    parts, draw = line.stream(WAIT), random.Random(how)
    by_socket(line, parts)
    for i in range(150):
        if draw.random() < 0.1:
            cut(draw.choice(ends(line)), how)
        if draw.random() < 0.1:
            until(lambda: next(parts) is not None and line.path(0).kind == "unix")
        line.post(b"%d" % i)
        engine.more.release()
        assert heard(parts, 1) == [i + 1]
    until(lambda: next(parts) is not None and len(engine.done) == 150)
    assert engine.done == list(range(150)) and not engine.failures


def test_a_post_that_a_cut_socket_left_is_carried_out_though_none_follows(engine: Engine, line: PostLine) -> None:
    parts = line.stream(WAIT)
    by_socket(line, parts)
    assert line._posts._line is not None
    line._posts._line._end.close()  # the kernel would take no more of it
    with suppress(OSError, ValueError):
        line.post(b"7")
    until(lambda: next(parts) is not None and engine.done == [7])


@pytest.mark.parametrize("which", ["posts", "reads"])
def test_a_socket_that_says_nothing_is_given_up_before_the_engine_is(
    engine: Engine, line: PostLine, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Half open: what is sent goes nowhere."""
    parts = line.stream(WAIT)
    by_socket(line, parts)
    monkeypatch.setattr(post_line, "QUIET_SECONDS", 0.2)
    here, there = socket.socketpair()
    path = getattr(line, f"_{which}")
    real = path._line._end
    monkeypatch.setattr(path._line, "_end", here)
    path._line._poll.register(here)
    here.setblocking(False)
    for i in range(5):
        line.post(b"%d" % i)
        engine.more.release()
    assert heard(parts, 5) == [1, 2, 3, 4, 5]
    until(lambda: next(parts) is not None and engine.done == list(range(5)))
    there.close()
    real.close()


def test_a_post_does_not_wait_for_an_engine_that_takes_none(engine: Engine, line: PostLine) -> None:
    parts = line.stream(WAIT)
    by_socket(line, parts)
    engine.gate.clear()
    began = time.monotonic()
    for i in range(300):
        line.post((b"%d" % i).zfill(2_000))
    assert time.monotonic() - began < WAIT / 2 and engine.calls.count("handle") >= 200
    assert next(parts) is not None, "its stream goes on"
    engine.gate.set()
    until(lambda: engine.done == list(range(300)))


def test_a_reader_that_stands_still_has_little_made_for_it(engine: Engine, line: PostLine) -> None:
    parts = line.stream(WAIT)
    by_socket(line, parts)
    for _ in range(50):
        engine.more.release()
    assert heard(parts, 1) == [1]
    time.sleep(0.1)
    assert engine.said <= 1 + post_line.AHEAD + 1
    assert heard(parts, 49) == list(range(2, 51))


@pytest.mark.parametrize("sockets", [True, False])
def test_what_a_stream_raises_ends_it(engine: Engine, sockets: bool) -> None:
    runtime = Runtime()
    runtime.sockets = sockets
    line = PostLine(runtime, engine, "replica 0", "reports")  # type: ignore[arg-type]  # stand-ins
    parts = line.stream(WAIT)
    assert next(parts) is not None
    engine.end = RemoteError(0, "ValueError", "a bug", "here")
    engine.more.release()
    with pytest.raises(RemoteError, match="a bug"):
        list(parts)
    line.close()


def test_an_engine_that_is_silent_or_gone(engine: Engine, line: PostLine, monkeypatch: pytest.MonkeyPatch) -> None:
    by_socket(line, line.stream(WAIT))
    monkeypatch.setattr(engine.mailbox, "_part", lambda read: time.sleep(1.0) or b"")
    with pytest.raises(CallTimeoutError, match="replica 0"):
        next(line.stream(0.1))
    engine.dead = True
    engine.mailbox.close()
    for path in ends(line):
        cut(path, socket.SHUT_RDWR)
    with pytest.raises(ActorGoneError, match="it died"):
        next(line.stream(WAIT))


def test_a_mailbox_takes_no_post_out_of_order_and_gives_no_part_twice_to_two(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = engine.mailbox
    for number in (1, 1, 2, 1, 2):
        box.handle(encode_line(Post("a", number, 0, b"%d" % number)))
    assert engine.done == [1, 2] and not engine.failures
    box.handle(encode_line(Post("a", 4, 0, b"4")))
    [error] = engine.failures
    assert isinstance(error, MessageError) and "post 4 after 2" in str(error)

    def read(name: str, number: int, heard: int = 0) -> Any:
        return decode_part(box.read(encode_line(Read(name, 0, number, heard))))

    monkeypatch.setattr(mailbox, "SENDERS", 3)
    for who in "bcdefg":
        for sender, number in (("a", 3 + ord(who) - ord("b")), (who, 1)):
            box.handle(encode_line(Post(sender, number, 0, b"%d" % number)))
    assert len(engine.failures) == 1, "who still says something is not forgotten"

    engine.more.release()
    engine.more.release()
    first = read("x", 1)
    assert first.body == b"1" == read("x", 1).body and read("x", 2, 1).body == b"2"
    for late in 7, 1:  # 1: by a socket that was cut, while the same came by a call
        assert isinstance(_raised(read("x", late).failure), MessageError)
    engine.more.release()
    assert read("x", 3, 2).body == b"3", "nobody hears of those"
    read("y", 1)
    assert read("x", 3).over, "another has its place"
    box.forget(0)
    assert read("y", 2).over
    with pytest.raises(Exception, match=r"truncated|invalid"):
        box.handle(b"\xc1")
    assert len(engine.failures) == 2


def _raised(failure: Any) -> RaykError:
    from rayk import protocol as m

    return m.to_error(failure)
