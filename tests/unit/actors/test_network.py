"""The data plane between two machines, which are network namespaces that the tests make: the handshake, and links that
are cut both ways or one way, without anybody being told.

A namespace belongs to a thread: the listener's sockets are made by one in the first, the driver's by one in the second.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rayk import protocol as m
from rayk.actors import connection, frames, listener
from rayk.actors import path as module
from rayk.actors.channel import ActorChannel
from rayk.actors.connection import Connection
from rayk.actors.frames import SocketError
from rayk.actors.listener import Listener
from rayk.errors import RaykError, ReplicaLostError

from .test_path import WAIT, Actor, Runtime, number, seqs

CLONE_NEWNET = 0x40000000
HOSTS = {"a": "10.213.77.1", "b": "10.213.77.2"}
LINK_SECONDS = 1.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """Two machines with a link between them."""

    def __init__(self) -> None:
        self.names = {side: f"rayk-{os.getpid()}-{side}" for side in HOSTS}
        self.threads = {side: ThreadPoolExecutor(1) for side in HOSTS}

    def begin(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
        a, b = self.names.values()
        ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for side, name in self.names.items():
            ip("-n", name, "address", "add", f"{HOSTS[side]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            self.threads[side].submit(self._enter, name).result()

    @staticmethod
    def _enter(name: str) -> None:
        with open(f"/run/netns/{name}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def on(self, side: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do that on a machine; threads that it starts are there, too."""
        return self.threads[side].submit(work, *arguments).result(WAIT)

    def drop(self, side: str) -> None:
        """What that machine sends goes nowhere."""
        other = HOSTS["b" if side == "a" else "a"]
        ip("-n", self.names[side], "route", "add", "blackhole", f"{other}/32")

    def mend(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "-n", name, "route", "flush", "type", "blackhole"], capture_output=True)

    def close(self) -> None:
        for thread in self.threads.values():
            thread.shutdown()
        for name in self.names.values():
            with suppress(OSError):  # there is no ip
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.begin()
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', error)}")
    finally:
        made.close()


class RemoteActor(Actor):
    """It listens on machine b."""

    def __init__(self, network: Network) -> None:
        self.network = network
        super().__init__()

    def listen(self) -> Listener:
        made: Listener = self.network.on("b", Listener, lambda wire: self.answer("socket", wire), HOSTS["b"])
        self.socket = made.address._replace(machine="another one")
        return made


@pytest.fixture
def actor(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteActor]:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(frames, "LINK_SECONDS", LINK_SECONDS)
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.1)
    network.mend()
    actor = RemoteActor(network)
    yield actor
    network.mend()
    actor.gate.set()
    actor.listener.close()
    actor.pool.shutdown()


def gone(reason: str) -> RaykError:
    return ReplicaLostError(0, 1, [], reason)


@pytest.fixture
def channel(network: Network, actor: RemoteActor) -> Iterator[ActorChannel]:
    def make() -> ActorChannel:
        return ActorChannel(Runtime(), actor, "replica 0", 1, "driver", gone, timeout=WAIT)  # type: ignore[arg-type]

    made = network.on("a", make)
    yield made
    made.close()


def until(network: Network, channel: ActorChannel, kind: str) -> None:
    """Until messages go by `kind`."""
    end = time.monotonic() + WAIT
    while channel.path(0).kind != kind:
        assert time.monotonic() < end, channel.path(0)
        network.on("a", channel.ask, m.GetUsage())
        time.sleep(0.01)


def test_the_handshake_goes_across(network: Network, actor: RemoteActor, channel: ActorChannel) -> None:
    until(network, channel, "tcp")
    for i in range(1, 20):
        assert number(network.on("a", channel.ask, m.PollTransfers())) == i
    assert actor.done[-1] == ("socket", 19)


def test_without_the_key_nobody_is_let_in(network: Network, actor: RemoteActor) -> None:
    assert actor.socket is not None
    with pytest.raises(SocketError):
        network.on("a", Connection, actor.socket._replace(key=bytes(32)))
    assert actor.done == []


@pytest.mark.parametrize("ways", ["a", "b", "ab"], ids=["to the actor", "from the actor", "both ways"])
def test_a_link_that_carries_nothing_is_noticed_while_an_answer_is_waited_for(
    network: Network, actor: RemoteActor, channel: ActorChannel, ways: str
) -> None:
    """Nobody closes anything: the kernel would wait for a quarter of an hour. What was sent is done once, by a call."""
    until(network, channel, "tcp")
    for side in ways:
        network.drop(side)
    began = time.monotonic()
    answers = [network.on("a", channel.send, m.PollTransfers()) for _ in range(4)]
    assert [number(network.on("a", each.wait).result) for each in answers] == [1, 2, 3, 4]
    assert time.monotonic() - began < 4 * LINK_SECONDS
    assert seqs(actor) == [1, 2, 3, 4] and channel.path(0).kind == "calls"
    network.mend()
    until(network, channel, "tcp")
    assert number(network.on("a", channel.ask, m.PollTransfers())) == 5


def test_a_link_that_is_cut_while_the_actor_works_is_noticed(
    network: Network, actor: RemoteActor, channel: ActorChannel
) -> None:
    """The message arrived and was acknowledged; only the answer cannot come."""
    until(network, channel, "tcp")
    actor.gate.clear()
    sent = network.on("a", channel.send, m.PollTransfers())
    threading.Timer(0.2, lambda: [network.drop("a"), network.drop("b")]).start()
    threading.Timer(0.2 + 3 * LINK_SECONDS, actor.gate.set).start()
    assert number(network.on("a", sent.wait).result) == 1
    assert seqs(actor) == [1], "once, though it came by both ways"


def test_an_actor_that_works_for_long_on_a_link_that_carries_is_waited_for(
    network: Network, actor: RemoteActor, channel: ActorChannel
) -> None:
    until(network, channel, "tcp")
    actor.gate.clear()
    sent = network.on("a", channel.send, m.PollTransfers())
    threading.Timer(2.5 * LINK_SECONDS, actor.gate.set).start()
    assert number(network.on("a", sent.wait).result) == 1
    assert actor.done[-1] == ("socket", 1) and channel.path(0).kind == "tcp"


def test_a_reader_that_takes_nothing_is_given_up(network: Network, actor: RemoteActor) -> None:
    """It is there, and reads no byte: who sends to it waits for a bounded time, and then goes by calls."""
    assert actor.socket is not None
    actor.gate.clear()
    line = network.on("a", Connection, actor.socket)
    began = time.monotonic()

    def send() -> None:
        for _ in range(1000):
            line.send(bytes(1 << 20))

    with pytest.raises(SocketError):
        network.threads["a"].submit(send).result(WAIT)
    assert time.monotonic() - began < 2 * WAIT
    line.close()


def test_a_silent_peer_is_let_go(network: Network, actor: RemoteActor, channel: ActorChannel) -> None:
    """The actor's end, too, notices that nobody is there any more: connections do not pile up."""
    until(network, channel, "tcp")
    network.drop("a")
    network.drop("b")
    end = time.monotonic() + WAIT
    while actor.listener._connections:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert listener.SEND_SECONDS > frames.LINK_SECONDS
