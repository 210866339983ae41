"""Events over ZeroMQ: what a subscriber of vLLM's reads, misses and asks for, and what a replica does not wait for."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rayk.errors import ConfigError
from rayk.kvcache.page_hash import PageHasher
from rayk.protocol.kv_events import AllBlocksCleared, KVEventsConfig, decode, stored
from rayk.replica import kv_event_publisher
from rayk.replica.kv_event_publisher import END, KVEventPublisher, checked

from ...kv_reader import Reader  # noqa: TID252  # tests/ is no package that has an absolute name

zmq = pytest.importorskip("zmq", reason="pyzmq is not installed (extra `events`)")

WAIT_MS = 5000
HASHER = PageHasher("xxh3_128", b"seed", 4)
ROOT = (None, None)
PAGES = np.empty(0, np.int32)


class Tree:
    """Tells a publisher of pages of four tokens, as a prefix tree does; `deep` of a sequence are cached."""

    def __init__(self, publisher: KVEventPublisher) -> None:
        self.publisher = publisher
        self.tips: dict[Any, list[Any]] = {}

    def grow(self, pages: int = 1, root: Any = ROOT) -> list[int]:
        """More pages below those of `root`; their tokens."""
        tips = self.tips.setdefault(root, [HASHER.root(root)])
        tokens = [100 * (len(tips) + each) + i for each in range(pages) for i in range(4)]
        hashes = HASHER.chain(tips[-1], np.array(tokens, np.int32).tobytes())
        self.publisher.stored(root, tips[-1], hashes, PAGES, np.array(tokens, np.int32).tobytes())
        tips += hashes
        return tokens

    def shrink(self, pages: int = 1, root: Any = ROOT) -> None:
        self.publisher.removed(self.tips[root][-pages:])
        del self.tips[root][-pages:]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """Publishers and readers, all closed at the end. Endpoints are files of the test unless they are named."""
    made: list[Any] = []

    def make(kind: Any = KVEventPublisher, *args: Any, **options: Any) -> Any:
        if kind is KVEventPublisher:
            replica, clock = options.pop("replica", 0), options.pop("clock", None)
            for name in ("endpoint", *(options.pop("more", ()))):
                options.setdefault(name, f"ipc://{tmp_path}/{name}")
            more = {} if clock is None else {"clock": clock}
            made.append(KVEventPublisher(KVEventsConfig(**options), replica, 4, HASHER, **more))
        else:
            made.append(kind(zmq, *args))
        return made[-1]

    yield make
    for each in made:
        each.close()


def settle(publisher: KVEventPublisher, tree: Tree, reader: Reader) -> None:
    """The reader is known to the publisher, and has read all that it sent."""
    at = reader.next
    for _ in range(WAIT_MS):
        tree.grow()
        if reader.socket.poll(1):
            break
    tokens = sum(len(tips) - 1 for tips in tree.tips.values())
    reader.until(lambda: reader.next > at and len(reader.pages) == tokens)


def replayed(endpoint: str, first: int) -> list[tuple[int, Any]]:
    """All batches from `first` on that are kept."""
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send_multipart([b"", first.to_bytes(8, "big")])
        out = []
        while True:
            assert socket.poll(WAIT_MS), "no answer"
            _, topic, number, payload = socket.recv_multipart()
            if number == END:
                assert (topic, payload) == (b"", b"")
                return out
            assert topic == b"kv-events"
            out.append((int.from_bytes(number, "big"), decode(payload)))


@pytest.mark.parametrize("arrays", [False, True])
def test_a_subscriber_receives_every_batch(make: Any, arrays: bool, tmp_path: Path) -> None:
    publisher = make(replica=3, arrays=arrays, clock=lambda: 7.5, more=["replay_endpoint"])
    tree = Tree(publisher)
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.subscribe(b"kv-events")
    subscriber.connect(f"ipc://{tmp_path}/endpoint_dp3")
    while not subscriber.poll(1):
        tree.grow()
    tokens = tree.grow(2, ("salt", "adapter"))
    while True:
        assert subscriber.poll(WAIT_MS), "nothing came"
        topic, number, payload = subscriber.recv_multipart()
        batch = decode(payload)
        last = batch.events[-1]
        if getattr(last, "lora_name", None):
            break
    subscriber.close(0)
    assert (topic, batch.ts, batch.data_parallel_rank, batch.publisher_id) == (b"kv-events", 7.5, 3, None)
    keys = [int.from_bytes(each[:8], "little") for each in tree.tips["salt", "adapter"][1:]]
    want = stored(keys, None, 4, tokens, "adapter", "salt")
    assert want.extra_keys == [["adapter", "salt"], ["adapter"]]
    assert last == (msgspec.structs.replace(want, cache_salt=None) if arrays else want)
    wire = msgspec.msgpack.decode(payload)[1][-1]
    assert (wire[0] if arrays else wire["type"]) == "BlockStored"
    kept = replayed(f"ipc://{tmp_path}/replay_endpoint_dp3", int.from_bytes(number, "big"))
    assert kept == [(int.from_bytes(number, "big"), batch)]


def test_numbers_begin_with_a_cleared_cache(make: Any, tmp_path: Path) -> None:
    for _ in range(2):  # the second starts anew where the first was
        publisher = make(more=["replay_endpoint"])
        [(number, batch)] = replayed(f"ipc://{tmp_path}/replay_endpoint", 0)
        assert number == 0 and batch.events[0] == AllBlocksCleared()
        publisher.close()


def test_what_was_missed_is_asked_for(make: Any, tmp_path: Path) -> None:
    publisher = make(more=["replay_endpoint"], buffer_steps=4)
    replay = f"ipc://{tmp_path}/replay_endpoint"
    tree = Tree(publisher)
    for i in range(6):  # one batch each
        tree.grow()
        while replayed(replay, 0)[-1][0] < i:
            pass
    last = replayed(replay, 0)[-1][0]
    assert [number for number, _ in replayed(replay, last - 2)] == [last - 2, last - 1, last]
    assert [number for number, _ in replayed(replay, 0)] == [*range(last - 3, last + 1)]  # the others are not kept
    assert replayed(replay, last + 1) == []
    with zmq.Context.instance().socket(zmq.DEALER) as nonsense:
        nonsense.setsockopt(zmq.LINGER, 0)
        nonsense.connect(replay)
        nonsense.send_multipart([b"", b"what?"])
        nonsense.send(b"")
        assert len(replayed(replay, last)) == 1  # and others are answered all the same


def test_a_reader_that_missed_some_ends_with_the_same_pages(make: Any, tmp_path: Path) -> None:
    publisher = make(more=["replay_endpoint"])
    tree = Tree(publisher)
    tree.grow(3)
    assert replayed(f"ipc://{tmp_path}/replay_endpoint", 0)
    reader = make(Reader, f"ipc://{tmp_path}/endpoint", f"ipc://{tmp_path}/replay_endpoint")
    settle(publisher, tree, reader)
    assert reader.gaps == 1 and reader.clears == 1 and reader.ranks == {0}
    tree.shrink(2)
    tree.grow(5, (None, "adapter"))
    reader.until(lambda: len(reader.pages) == sum(len(tips) - 1 for tips in tree.tips.values()))
    assert set(reader.pages) == {int.from_bytes(h[:8], "little") for t in tree.tips.values() for h in t[1:]}
    tree.shrink(5, (None, "adapter"))
    tree.shrink(len(tree.tips[ROOT]) - 1)
    reader.until(lambda: not reader.pages)
    assert reader.clears == 2 and reader.gaps == 1


def test_one_that_comes_late_asks_for_all(make: Any, tmp_path: Path) -> None:
    publisher = make(more=["snapshot_endpoint"])
    tree = Tree(publisher)
    tree.grow(3)
    tree.grow(2, ("salt", None))
    tree.shrink()
    reader = make(Reader, f"ipc://{tmp_path}/endpoint")
    at = reader.next
    reader.until(lambda: reader.next > at)  # an idle publisher sends a batch each second
    name = reader.snapshot(f"ipc://{tmp_path}/snapshot_endpoint")
    assert len(name) == 16 and reader.next
    assert set(reader.pages) == {int.from_bytes(h[:8], "little") for t in tree.tips.values() for h in t[1:]}
    assert [page[3] for page in reader.pages.values()].count("salt") == 1
    tree.grow(2)
    reader.until(lambda: len(reader.pages) == 6)


def test_changes_that_nobody_can_send_are_dropped_and_that_is_said(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(kv_event_publisher, "MOST_WAITING", 10)
    publisher = make()
    tree = Tree(publisher)
    going, stop, sent = threading.Event(), threading.Event(), list[Any]()

    def busy(batch: Any, arrays: bool) -> bytes:
        sent.append(batch)
        going.set()
        assert stop.wait(20)
        return encode(batch, arrays)

    encode = kv_event_publisher.wire.encode
    monkeypatch.setattr(kv_event_publisher.wire, "encode", busy)
    tree.grow()
    assert going.wait(20)
    for _ in range(15):
        tree.grow()
    stop.set()
    publisher.close()
    assert sent[-1].events[0] == AllBlocksCleared() and len(sent[-1].events) == 5  # what came after the drop


def test_a_slow_subscriber_costs_the_replica_nothing(make: Any, tmp_path: Path) -> None:
    publisher = make(more=["snapshot_endpoint"], buffer_steps=8)
    tree = Tree(publisher)
    reader = make(Reader, f"ipc://{tmp_path}/endpoint")
    reader.snapshot(f"ipc://{tmp_path}/snapshot_endpoint")
    for _ in range(3000):  # and nobody reads
        tree.grow()
    while len(reader.pages) < 3000:
        reader.snapshot(f"ipc://{tmp_path}/snapshot_endpoint")
    assert set(reader.pages) == {int.from_bytes(each[:8], "little") for each in tree.tips[ROOT][1:]}


def test_what_cannot_be_bound_is_refused(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(kv_event_publisher, "REBIND_SECONDS", 0.05)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        for name in ("endpoint", "replay_endpoint", "snapshot_endpoint"):
            with pytest.raises(ConfigError, match=rf"replica 0 cannot publish cache events at {endpoint}: .*in use"):
                make(**{name: endpoint})


def test_an_error_ends_the_socket_and_not_the_replica(make: Any, monkeypatch: Any, caplog: Any) -> None:
    publisher = make()
    monkeypatch.setattr(kv_event_publisher.wire, "encode", None)
    tree = Tree(publisher)
    tree.grow()
    publisher._thread.join(20)
    tree.grow()
    publisher.close()
    assert "replica 0 publishes no more cache events" in caplog.text and not publisher._changes


def test_without_pyzmq_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayk\[events\]'"):
        checked("inproc://a", True, 1)


def test_what_a_user_may_say() -> None:
    assert checked(None, False, 4) is None
    assert checked("tcp://*:5557", True, 4) == KVEventsConfig("tcp://*:5557")
    with pytest.raises(ConfigError, match="without prefix caching"):
        checked("tcp://*:5557", False, 1)
