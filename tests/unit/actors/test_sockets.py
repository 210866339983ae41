"""The data plane's two ends: whole messages in order, and what happens when a socket does not behave."""

from __future__ import annotations

import os
import random
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from rayk.actors import connection as connecting
from rayk.actors import frames, listener
from rayk.actors.connection import Connection
from rayk.actors.frames import HEADER, PIECE, FrameReader, SocketError, introduce, pieces
from rayk.actors.listener import Listener, SocketAddress

WAIT = 10.0
Listen = Callable[..., Listener]
Connect = Callable[[SocketAddress], Connection]


def echo(wire: bytes) -> bytes:
    return wire[::-1]


@pytest.fixture
def listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    made: list[Listener] = []

    def start(answer: Callable[[bytes], bytes] = echo, host: str = "127.0.0.1", threads: int = 1) -> Listener:
        made.append(Listener(answer, host, threads))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def connect() -> Iterator[Callable[[SocketAddress], Connection]]:
    made: list[Connection] = []

    def start(address: SocketAddress) -> Connection:
        made.append(Connection(address))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def remote(address: SocketAddress) -> SocketAddress:
    """The same from another machine."""
    return address._replace(machine="another")


@pytest.mark.parametrize("by", ["unix", "tcp"])
def test_messages_of_any_length_come_back(connect: Connect, listen: Listen, by: str) -> None:
    address = listen().address
    line = connect(address if by == "unix" else remote(address))
    assert line.by == by
    for length in (0, 1, 100, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 17):
        wire = os.urandom(length)
        assert line.wait(line.send(wire), WAIT) == wire[::-1]
    assert len(line) == 0 and line.sent == 7


def test_one_message_after_the_other_is_answered_in_order(connect: Connect, listen: Listen) -> None:
    seen: list[int] = []

    def note(wire: bytes) -> bytes:
        seen.append(int(wire))
        return wire

    line = connect(listen(note).address)
    sent = [line.send(b"%d" % i) for i in range(500)]
    assert [line.wait(each, WAIT) for each in reversed(sent)] == [b"%d" % i for i in reversed(range(500))]
    assert seen == list(range(500))


def test_many_threads_use_one_connection(connect: Connect, listen: Listen) -> None:
    line, wrong = connect(listen().address), list[object]()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            wire = draw.randbytes(draw.choice((10, 5_000, PIECE + 100)))
            if line.wait(line.send(wire), WAIT) != wire[::-1]:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and len(line) == 0


def test_what_is_not_read_in_time_can_be_read_later(connect: Connect, listen: Listen) -> None:
    gate = threading.Event()

    def slow(wire: bytes) -> bytes:
        gate.wait(WAIT)
        return wire

    line = connect(listen(slow).address)
    sent = line.send(b"x")
    assert line.wait(sent, 0.0) is None and line.wait(sent, 0.05) is None
    gate.set()
    assert line.wait(sent, WAIT) == b"x"


def test_with_more_threads_one_that_takes_long_holds_up_no_other(connect: Connect, listen: Listen) -> None:
    gate = threading.Event()

    def answer(wire: bytes) -> bytes:
        if wire == b"slow":
            gate.wait(WAIT)
        return wire

    line = connect(listen(answer, threads=4).address)
    slow, quick = line.send(b"slow"), line.send(b"quick")
    assert line.wait(quick, WAIT) == b"quick" and slow.answer is None
    gate.set()
    assert line.wait(slow, WAIT) == b"slow"


def test_a_flood_that_nobody_reads_meanwhile_stands_still_for_nobody(connect: Connect, listen: Listen) -> None:
    """Both directions are full: the sender reads while it sends."""
    line, wire = connect(listen().address), os.urandom(40_000)
    sent = [line.send(wire) for _ in range(300)]
    assert all(line.wait(each, WAIT) == wire[::-1] for each in sent)


def test_who_never_reads_is_cut_off(
    stack: ExitStack, connect: Connect, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SEND_SECONDS", 1.0)
    here = listen()
    end = stack.enter_context(socket.socket(socket.AF_UNIX))
    end.connect(here.address.path)
    introduce(end, here.address.key)
    with pytest.raises(OSError):  # noqa: PT011, PT012  # any, once the listener has had enough
        end.settimeout(WAIT)
        for number in range(10_000):
            for piece in pieces(number, b"x" * 100_000):
                end.sendall(piece)
    other = connect(here.address)
    assert other.wait(other.send(b"ab"), WAIT) == b"ba"


@pytest.mark.parametrize("end", ["listener", "answer raises"])
def test_a_cut_connection_says_so_to_all_that_wait(connect: Connect, listen: Listen, end: str) -> None:
    gate = threading.Event()

    def answer(wire: bytes) -> bytes:
        gate.wait(WAIT)
        raise RuntimeError("a bug")

    here = listen(answer)
    line = connect(here.address)
    sent = [line.send(b"x") for _ in range(3)]
    line.future(sent[2])
    if end == "listener":
        threading.Timer(0.05, here.close).start()
    else:
        gate.set()
    for each in sent:
        with pytest.raises(SocketError):
            line.wait(each, WAIT)
    with pytest.raises(SocketError):
        line.future(sent[2]).result(WAIT)
    with pytest.raises(SocketError):
        line.send(b"y")
    assert line.cut
    gate.set()


def test_futures(connect: Connect, listen: Listen) -> None:
    line = connect(listen().address)
    before = line.send(b"ab")
    assert line.wait(before, WAIT) == b"ba" and line.future(before).result(0) == b"ba"
    futures = [line.future(line.send(b"%d1" % i)) for i in range(5)]
    assert [f.result(WAIT) for f in futures] == [b"1%d" % i for i in range(5)]
    assert line.wait(line.send(b"cd"), WAIT) == b"dc", "a thread reads for those that wait, too"
    late = line.future(line.send(b"x"))
    line.close()
    assert late.done() or isinstance(late.exception(WAIT), SocketError)


def test_only_who_knows_the_key_gets_in(connect: Connect, listen: Listen) -> None:
    here = listen()
    for address in (here.address, remote(here.address)):
        with pytest.raises(SocketError):
            connect(address._replace(key=bytes(32)))
    assert "key=" not in repr(here.address) and repr(here.address.key) not in repr(here.address)
    path = Path(here.address.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_listener_that_does_not_know_the_key_is_refused(stack: ExitStack, connect: Connect, tmp_path: Path) -> None:
    false = stack.enter_context(socket.socket(socket.AF_UNIX))
    false.bind(str(tmp_path / "s"))
    false.listen()

    def serve() -> None:
        end, _ = false.accept()
        stack.callback(end.close)
        end.sendall(bytes(32))
        end.recv(200)
        end.sendall(bytes(32))

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(SocketError, match="does not know the key"):
        connect(SocketAddress(listener.machine(), str(tmp_path / "s"), "127.0.0.1", 0, b"k" * 32))


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200, b""])
def test_strangers_end_at_the_door(connect: Connect, listen: Listen, garbage: bytes) -> None:
    here = listen()
    with socket.create_connection((here.address.host, here.address.port)) as stranger:
        stranger.sendall(garbage)
        with suppress(OSError):  # it may be shut out already
            stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(WAIT)
        with suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
    line = connect(here.address)
    assert line.wait(line.send(b"ab"), WAIT) == b"ba"


def test_half_a_handshake_holds_up_nobody(connect: Connect, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.2)
    here = listen()
    with socket.create_connection((here.address.host, here.address.port)) as half:
        line = connect(here.address)
        assert line.wait(line.send(b"ab"), WAIT) == b"ba"
        half.settimeout(WAIT)
        while half.recv(1000):
            pass


@pytest.mark.parametrize(
    "wire",
    [HEADER.pack(PIECE + 1, 1, 0), HEADER.pack(4, 1, 2) + b"abcd"],
)
def test_what_is_no_message_cuts_the_connection(
    stack: ExitStack, connect: Connect, listen: Listen, wire: bytes
) -> None:
    here = listen()
    end = stack.enter_context(socket.socket(socket.AF_UNIX))
    end.connect(here.address.path)
    introduce(end, here.address.key)
    end.sendall(wire)
    end.settimeout(WAIT)
    assert end.recv(10) == b""


def test_messages_that_never_end_are_bounded(stack: ExitStack) -> None:
    ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
    reader = FrameReader()
    with pytest.raises(SocketError, match="longer than"):  # noqa: PT012  # which one is too many is not the point
        for number in range(frames.UNFINISHED + 1):
            theirs.sendall(HEADER.pack(1, number, 1) + b"x")
            reader.receive(ours)


def test_a_socket_whose_file_is_gone_is_reached_over_the_network(connect: Connect, listen: Listen) -> None:
    here = listen()
    Path(here.address.path).unlink()
    line = connect(here.address)
    assert line.by == "tcp" and line.wait(line.send(b"ab"), WAIT) == b"ba"
    here.close()
    with pytest.raises(SocketError, match="does not answer"):
        connect(here.address)


def test_an_address_that_this_node_does_not_have(connect: Connect, listen: Listen) -> None:
    here = listen(host="192.0.2.77")
    assert here.address.port == 0
    assert connect(here.address).by == "unix"
    with pytest.raises(SocketError, match="no way from other machines"):
        connect(remote(here.address))


def test_waiting_until_earlier_messages_were_answered(connect: Connect, listen: Listen) -> None:
    gate = threading.Event()

    def slow(wire: bytes) -> bytes:
        gate.wait(WAIT)
        return wire

    here = listen(slow)
    line = connect(here.address)
    sent = [line.send(b"1"), line.send(b"2")]
    time.sleep(0.05)
    assert not here.handled(line.label, 2, 0.05)
    gate.set()
    assert here.handled(line.label, 2, WAIT) and line.wait(sent[1], WAIT) == b"2"
    assert here.handled(b"unknown!", 5, 0.0), "of a connection that is gone nothing more will come"


def test_a_full_table_of_file_descriptors_passes(
    stack: ExitStack, connect: Connect, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, failing = listen(), [3]
    here.close()
    again = Listener.__new__(Listener)  # only its loop, over an end that fails at first
    served = threading.Event()
    again._open = True

    def serve(accepted: socket.socket) -> None:
        accepted.close()
        served.set()

    monkeypatch.setattr(again, "_serve", serve, raising=False)
    ours = stack.enter_context(socket.socket(socket.AF_UNIX))
    path = here._path.parent / "again"
    ours.bind(str(path))
    ours.listen()

    class Failing:
        def accept(self) -> object:
            if failing[0]:
                failing[0] -= 1
                raise OSError(24, "Too many open files")
            return ours.accept()

    threading.Thread(target=again._accept, args=(Failing(),), daemon=True).start()
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(str(path))
    assert served.wait(WAIT) and failing[0] == 0
    again._open = False
    ours.close()


def test_sockets_of_processes_that_are_gone_are_removed(listen: Listen, tmp_path: Path) -> None:
    folder = tmp_path / f"rayk-sockets-{os.getuid()}"
    folder.mkdir()
    (folder / "999999999-abc").touch()
    (folder / f"{os.getppid()}-abc").touch()
    here = listen()
    assert {p.name for p in folder.iterdir()} == {f"{os.getppid()}-abc", Path(here.address.path).name}
    here.close()
    assert not Path(here.address.path).exists()


def test_a_connection_waits_no_longer_than_it_should_for_a_listener_that_hangs(
    stack: ExitStack, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "HANDSHAKE_SECONDS", 0.2)
    silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    began = time.monotonic()
    with pytest.raises(SocketError):
        connect(SocketAddress("another", "", "127.0.0.1", silent.getsockname()[1], b"k" * 32))
    assert time.monotonic() - began < WAIT
