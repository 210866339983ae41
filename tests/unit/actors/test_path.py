"""The way of a channel's messages: a socket or calls, in order, each done once, whatever is cut."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rayk import protocol as m
from rayk.actors import path as module
from rayk.actors.channel import ActorChannel
from rayk.actors.interface import SocketAddress
from rayk.actors.listener import Listener
from rayk.errors import CallTimeoutError, RaykError, ReplicaLostError
from rayk.protocol.dedup import ReplyCache

from ...patience import scaled  # noqa: TID252  # tests/ is no package that has an absolute name

WAIT = 10.0


class Actor:
    """Takes messages by calls, one after the other, and by a socket; notes what it does, and how it came."""

    def __init__(self) -> None:
        self.socket: SocketAddress | None = None
        self.done: list[tuple[str, int]] = []
        self.behind: list[tuple[bytes, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.door = threading.Lock()
        self.answers: ReplyCache[bytes] = ReplyCache(remembered=64)
        self.pool = ThreadPoolExecutor(1)
        self.listener = self.listen()

    def listen(self) -> Listener:
        listener = Listener(lambda wire: self.answer("socket", wire), "127.0.0.1")
        self.socket = listener.address
        return listener

    def answer(self, way: str, wire: bytes) -> bytes:
        self.gate.wait(WAIT)
        with self.door:
            envelope = m.decode_envelope(wire)
            assert isinstance(envelope, m.ReplicaEnvelope)
            repeated = self.answers.repeated(envelope.client, envelope.seq) if envelope.seq else None
            if repeated is not None:
                return repeated
            self.done.append((way, envelope.seq))
            reply = m.encode(m.Reply(1, envelope.seq, m.UsageDone(envelope.seq, 0, 0)))
            if envelope.seq:
                self.answers.keep(envelope.client, envelope.seq, reply)
            return reply

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False, lane: str = "") -> Any:
        if control:
            return self.pool.submit(lambda: 1)
        if isinstance(args[0], tuple):
            (label, count), *args = args  # type: ignore[assignment]  # a list or a tuple
            self.behind.append((label, count))
            self.listener.handled(label, count, WAIT)
        return self.pool.submit(self.answer, "call", args[0])


class Runtime:
    """Futures for references."""

    sockets = True

    def get(self, ref: Future[Any], target: str, timeout: float) -> Any:
        try:
            return ref.result(timeout)
        except TimeoutError:
            raise CallTimeoutError(target, timeout) from None

    def get_all(self, refs: Any, timeout: float) -> Any:
        return [ref.result(timeout) for ref in refs]

    def future(self, ref: Future[Any]) -> Future[Any]:
        return ref


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Actor]:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)
    actor = Actor()
    yield actor
    actor.gate.set()
    actor.listener.close()
    actor.pool.shutdown()


@pytest.fixture
def channel(actor: Actor) -> Iterator[ActorChannel]:
    def gone(reason: str) -> RaykError:
        return ReplicaLostError(0, 1, [], reason)

    channel = ActorChannel(Runtime(), actor, "replica 0", 1, "driver", gone, timeout=WAIT)  # type: ignore[arg-type]
    yield channel
    channel.close()


def until(channel: ActorChannel, kind: str) -> None:
    """Until messages go by `kind`."""
    began = time.monotonic()
    while channel.path(0).kind != kind:
        assert time.monotonic() - began < scaled(WAIT), channel.path(0)
        channel.ask(m.GetUsage())
        time.sleep(0.005)


def number(result: Any) -> int:
    """Of the message that it answers."""
    assert isinstance(result, m.UsageDone)
    return result.total


def seqs(actor: Actor) -> list[int]:
    return [seq for _, seq in actor.done if seq]


def test_messages_go_by_the_socket_once_it_is_open(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    channel.ask(m.PollTransfers())
    assert actor.done[-1] == ("socket", 1)
    assert channel.path(3).messages == sum(way == "socket" for way, _ in actor.done) and channel.path(3).replica == 3


def test_what_a_cut_socket_left_is_done_once_and_in_order(
    actor: Actor, channel: ActorChannel, caplog: pytest.LogCaptureFixture
) -> None:
    until(channel, "unix")
    actor.gate.clear()
    sent = [channel.send(m.PollTransfers()) for _ in range(5)]
    with caplog.at_level(logging.WARNING, "rayk"):
        actor.listener.close()
        actor.socket = None  # nowhere to come back to for now
        later = channel.send(m.PollTransfers())
        actor.gate.set()
        answers = [each.wait().result for each in [*reversed(sent), later]]
    assert [number(a) for a in answers] == [5, 4, 3, 2, 1, 6]
    assert seqs(actor) == [1, 2, 3, 4, 5, 6]
    assert len([r for r in caplog.records if "carries nothing" in r.message]) == 1
    assert channel.path(0).kind == "calls" and channel.path(0).reason


def test_answers_that_were_lost_come_from_memory(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    real = actor.listener._reply

    def answer_into_the_void(connection: Any, number: int, wire: bytes) -> None:
        actor.answer("socket", wire)
        connection.close()

    actor.listener._reply = answer_into_the_void  # type: ignore[method-assign]
    sent = channel.send(m.PollTransfers())
    assert number(sent.wait().result) == 1
    assert actor.done[-1] == ("socket", 1), "it was done before, and not again"
    actor.listener._reply = real  # type: ignore[method-assign]
    until(channel, "unix")


def test_a_call_waits_for_what_was_sent_before_it(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    actor.gate.clear()
    by_socket = channel.send(m.PollTransfers())
    threading.Timer(0.1, actor.gate.set).start()
    by_call = channel.send(m.PollTransfers(), attached=["data"])
    after = channel.send(m.PollTransfers())
    assert [number(each.wait().result) for each in (by_call, by_socket, after)] == [2, 1, 3]
    assert {count for _, count in actor.behind} == {1 + sum(way == "socket" for way, seq in actor.done if not seq)}
    assert [each for each in actor.done if each[1]][:2] == [("socket", 1), ("call", 2)]


def test_a_message_by_the_socket_waits_until_calls_were_answered(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    actor.gate.clear()
    channel.send(m.PollTransfers(), attached=["data"])  # nobody reads its answer
    second = channel.send(m.PollTransfers())
    actor.gate.set()
    assert number(second.wait().result) == 2 and seqs(actor) == [1, 2]
    until(channel, "unix")
    channel.ask(m.PollTransfers())
    assert actor.done[-1][0] == "socket", "once it was answered"


def test_a_listener_that_is_there_again_is_used_again(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    actor.listener.close()
    channel.ask(m.PollTransfers())
    assert channel.path(0).kind == "calls"
    actor.listener = actor.listen()
    until(channel, "unix")


def test_an_answer_that_is_late_is_not_an_error_of_the_socket(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    actor.gate.clear()
    sent = channel.send(m.PollTransfers())
    assert sent.within(0.05) is None
    channel._timeout = 0.05
    with pytest.raises(CallTimeoutError, match="replica 0"):
        sent.wait()
    actor.gate.set()
    channel._timeout = WAIT
    assert number(sent.wait().result) == 1 and channel.path(0).kind == "unix"


async def _arrivals(actor: Actor, channel: ActorChannel) -> None:
    sent = channel.send(m.PollTransfers())
    assert number(channel.decoded(await sent.arrival())) == 1
    actor.gate.clear()
    first, second = channel.send(m.PollTransfers()), channel.send(m.PollTransfers())
    threading.Timer(0.05, actor.listener.close).start()
    threading.Timer(0.1, actor.gate.set).start()
    wires = [await each.arrival() for each in (second, first)]
    assert [number(channel.decoded(wire)) for wire in wires] == [3, 2]


def test_an_event_loop_waits_for_both(actor: Actor, channel: ActorChannel) -> None:
    import asyncio

    until(channel, "unix")
    asyncio.run(_arrivals(actor, channel))
    assert seqs(actor) == [1, 2, 3]


def test_a_closed_path_goes_on_with_calls(actor: Actor, channel: ActorChannel) -> None:
    until(channel, "unix")
    channel.close()
    assert number(channel.ask(m.PollTransfers())) == 1 and actor.done[-1] == ("call", 1)
