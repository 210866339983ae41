"""Events over ZeroMQ on loopback: what a subscriber of vLLM's does."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from rayk.errors import ConfigError
from rayk.scheduler.router.kv_event_publisher import END, EventPublisher, endpoint_of
from rayk.scheduler.router.kv_events import EventBatch, Layout, Verdict, decode, removed, stored
from rayk.scheduler.router.kv_events import Intake as EventIntake
from rayk.scheduler.router.prefix_index import Best, PrefixIndex

zmq = pytest.importorskip("zmq", reason="pyzmq is not installed (extra `events`)")

WAIT_MS = 5000


@pytest.fixture
def context() -> Iterator[Any]:
    """A context of its own, whose sockets are all closed at the end."""
    made: list[Any] = []

    class Closing(zmq.Context):  # type: ignore[misc, name-defined]  # Any, where pyzmq may be missing
        def socket(self, *args: Any, **kwargs: Any) -> Any:
            made.append(super().socket(*args, **kwargs))
            return made[-1]

    context = Closing()
    yield context
    for socket in made:
        socket.close(0)
    context.term()


def subscriber(context: Any, publisher: EventPublisher, topic: str = "kv-events") -> Any:
    """A subscriber that is known to the publisher: what was published until then is behind it."""
    socket = context.socket(zmq.SUB)
    socket.connect(publisher.endpoint)
    socket.setsockopt_string(zmq.SUBSCRIBE, topic)
    for _ in range(WAIT_MS):
        publisher.publish([])
        if socket.poll(1):
            break
    last = publisher.publish([])
    while int.from_bytes(receive(socket)[1], "big") != last:
        pass
    return socket


def receive(socket: Any) -> list[bytes]:
    assert socket.poll(WAIT_MS), "nothing came"
    frames: list[bytes] = socket.recv_multipart()
    return frames


def replayed(context: Any, publisher: EventPublisher, first: int) -> list[tuple[int, EventBatch]]:
    """All batches from `first` on that the publisher still has."""
    socket = context.socket(zmq.DEALER)
    socket.connect(publisher.replay_endpoint)
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    out = []
    while (frames := receive(socket))[1] != END:
        out.append((int.from_bytes(frames[1], "big"), decode(frames[2])))
    socket.close()
    return out


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "inproc://events"])
@pytest.mark.parametrize("layout", Layout)
def test_a_subscriber_hears_every_batch(context: Any, endpoint: str, layout: Layout) -> None:
    with EventPublisher(endpoint, 3, layout=layout, clock=lambda: 7.5, context=context) as publisher:
        socket = subscriber(context, publisher)
        events = [stored([1, 2], None, 16), removed([b"x" * 32])]
        number = publisher.publish(events)
        topic, raw, payload = receive(socket)
        assert (topic, int.from_bytes(raw, "big")) == (b"kv-events", number)
        assert decode(payload) == EventBatch(7.5, list(events), 3)


def test_what_was_missed_is_asked_for(context: Any) -> None:
    replay = "tcp://127.0.0.1:*"
    with EventPublisher("tcp://127.0.0.1:*", replay_endpoint=replay, kept=4, context=context) as publisher:
        for i in range(6):
            publisher.publish([stored([i], i - 1 if i else None, 16)])
        numbers = [number for number, _ in replayed(context, publisher, 3)]
        assert numbers == [3, 4, 5]
        assert [number for number, _ in replayed(context, publisher, 0)] == [2, 3, 4, 5]  # the others are not kept
        assert replayed(context, publisher, 6) == []
        nonsense = context.socket(zmq.DEALER)
        nonsense.connect(publisher.replay_endpoint)
        nonsense.send_multipart([b"", b"what?"])
        nonsense.send(b"")
        assert len(replayed(context, publisher, 5)) == 1  # and others are answered all the same
        nonsense.close()


def test_an_index_is_kept_true_through_a_gap(context: Any) -> None:
    index = PrefixIndex(1)
    intake = EventIntake(index)
    with EventPublisher("inproc://a", replay_endpoint="inproc://b", context=context) as publisher:
        publisher.publish([stored([1, 2, 3], None, 16)])
        socket = subscriber(context, publisher)
        publisher.publish([removed([3])])
        _, raw, payload = receive(socket)
        number = int.from_bytes(raw, "big")
        assert intake.take(0, 0, number, decode(payload).events) is Verdict.resync
        for number, batch in replayed(context, publisher, 0):
            assert intake.take(0, 0, number, batch.events) is Verdict.applied
    assert index.best([1, 2, 3]) == Best(2, 0)


def test_other_topics_are_not_heard(context: Any) -> None:
    with EventPublisher("inproc://a", topic="mine", context=context) as publisher:
        deaf = context.socket(zmq.SUB)
        deaf.connect(publisher.endpoint)
        deaf.setsockopt_string(zmq.SUBSCRIBE, "yours")
        subscriber(context, publisher, "mine")
        assert not deaf.poll(0)


def test_ports_follow_the_replica() -> None:
    assert endpoint_of("tcp://*:5557", 0) == "tcp://*:5557" and endpoint_of("tcp://*:5557", 3) == "tcp://*:5560"
    assert endpoint_of("inproc://x", 2) == "inproc://x_dp2" and endpoint_of("ipc:///tmp/x", 0) == "ipc:///tmp/x"
    with pytest.raises(ConfigError, match="has no port"):
        endpoint_of("tcp://somewhere", 1)


def test_what_cannot_be_bound_is_refused(context: Any) -> None:
    with EventPublisher("tcp://127.0.0.1:*", context=context) as publisher:
        for more in ({}, {"replay_endpoint": publisher.endpoint}):
            endpoint = "tcp://127.0.0.1:*" if more else publisher.endpoint
            with pytest.raises(ConfigError, match=r"cannot be published at tcp://127\.0\.0\.1"):
                EventPublisher(endpoint, context=context, **more)
    publisher.close()


def test_without_pyzmq_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayk\[events\]'"):
        EventPublisher("inproc://a")
