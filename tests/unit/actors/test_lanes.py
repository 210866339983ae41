"""The scheduler actor with several batches under way: what is twice is done once, whatever overtakes what."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest

from rayk import TextContext
from rayk import protocol as m
from rayk.actors.scheduler import SchedulerActor
from rayk.errors import MessageError
from rayk.protocol.columns import RESULTS
from rayk.protocol.context_sync import ContextSender
from rayk.protocol.dedup import ReplyCache
from rayk.scheduler.router.router import RouterSettings

from .fake import FakeRuntime

EPOCH = 77


class SlowReplica:
    """An actor whose answers come when `let_go` is set; `seen` are the commands in the order they arrived."""

    def __init__(self) -> None:
        self.let_go = Event()
        self.arrived = Event()
        self.seen: list[Any] = []

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False) -> Any:
        self.seen.append(m.decode_envelope(args[0]))
        self.arrived.set()
        return self, self.seen[-1]


class Patient(FakeRuntime):
    """Waits for a SlowReplica's answer, as ray.get would."""

    def get(self, ref: Any, target: str, timeout: float) -> Any:
        replica, envelope = ref
        assert replica.let_go.wait(10)
        command = envelope.command
        if isinstance(command, m.Admit):
            rows = len(command.contexts.ids)
            result: Any = m.AdmitDone(b"".join([(4).to_bytes(8, "little")] * RESULTS * rows), bytes(16 * rows))
        else:
            result = m.BlocksDone(True, []) if isinstance(command, m.Blocks) else m.Done()
        return m.encode(m.Reply(1, envelope.seq, result))


@pytest.fixture
def replicas() -> list[SlowReplica]:
    return [SlowReplica(), SlowReplica()]


@pytest.fixture
def scheduler(replicas: list[SlowReplica]) -> SchedulerActor:
    return SchedulerActor(EPOCH, replicas, [1, 2], RouterSettings("round-robin", (9, 9), 4), False, None, Patient())


def place(request_id: str, seq: int, replica: int, client: str = "driver") -> bytes:
    contexts = ContextSender().pack([TextContext(request_id, [1, 2, 3], 9)])
    return m.encode(m.SchedulerEnvelope(client, EPOCH, seq, m.PlaceMany(contexts, [replica])))


def test_a_batch_does_not_wait_for_another_replica(scheduler: SchedulerActor, replicas: list[SlowReplica]) -> None:
    slow, quick = replicas
    quick.let_go.set()
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(scheduler.handle, place("a", 1, 0))
        assert slow.arrived.wait(10)
        second = m.decode_reply(scheduler.handle(place("b", 2, 1))).result
        assert isinstance(second, m.PlaceDone) and second.replicas == [1] and not first.done()
        slow.let_go.set()
        assert m.decode_reply(first.result(10)).result.replicas == [0]  # type: ignore[union-attr]


def test_a_duplicate_waits_for_the_first_and_is_not_done_again(
    scheduler: SchedulerActor, replicas: list[SlowReplica]
) -> None:
    wire = place("a", 1, 0)
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(scheduler.handle, wire)
        assert replicas[0].arrived.wait(10)
        again = lanes.submit(scheduler.handle, wire)
        replicas[0].let_go.set()
        assert first.result(10) == again.result(10)
    assert len(replicas[0].seen) == 1


def test_an_id_in_two_batches_at_once_has_one_place(scheduler: SchedulerActor, replicas: list[SlowReplica]) -> None:
    """The check of the second follows the admission of the first to the same replica, so it finds it claimed."""
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(scheduler.handle, place("a", 1, 0))
        assert replicas[0].arrived.wait(10)
        second = lanes.submit(scheduler.handle, place("a", 2, 1))
        for replica in replicas:
            replica.let_go.set()
        assert first.result(10) and second.result(10)
        failures = m.decode_reply(second.result()).result.failures  # type: ignore[union-attr]
    assert failures[0].kind == "AlreadyClaimedError"
    assert [type(e.command).__name__ for e in replicas[0].seen] == ["Admit", "Blocks"] and not replicas[1].seen


def test_many_lanes_number_their_messages_in_order(scheduler: SchedulerActor, replicas: list[SlowReplica]) -> None:
    for replica in replicas:
        replica.let_go.set()
    start = Barrier(4)

    def lane(number: int) -> None:
        start.wait()
        for i in range(25):
            scheduler.handle(place(f"{number}-{i}", 1 + i, i % 2, f"driver-{number}"))

    with ThreadPoolExecutor(4) as lanes:
        assert all(future.exception() is None for future in [lanes.submit(lane, n) for n in range(4)])
    for replica in replicas:
        seqs = [envelope.seq for envelope in replica.seen]
        assert seqs == list(range(1, len(seqs) + 1))
    assert sum(len(replica.seen) for replica in replicas) == 100


def test_answers_within_the_window_may_overtake() -> None:
    answers: ReplyCache[str] = ReplyCache(window=3)
    answers.keep("d", 5, "five")
    assert answers.repeated("d", 4) is None, "not seen yet"
    answers.keep("d", 4, "four")
    assert [answers.repeated("d", seq) for seq in (4, 5, 6)] == ["four", "five", None]
    with pytest.raises(MessageError, match="number 2 after 5"):
        answers.repeated("d", 2)
    for seq in (6, 7, 8):
        answers.keep("d", seq, str(seq))
    with pytest.raises(MessageError, match="number 5 after 8"):
        answers.repeated("d", 5)
    answers.forget("d")
    assert answers.repeated("d", 5) is None
