"""The scheduler's scripts, answered by hand: which rounds they ask, and what they make of the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rayk import TextContext
from rayk import protocol as m
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    InsufficientBlocksError,
    IntegrityError,
    ReplicaIndexError,
    ReplicaLostError,
)
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.protocol.columns import AdmitResults
from rayk.protocol.context_sync import ContextSender
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaCall, ReplicaReply

LOST = m.failure(ReplicaLostError(1, 11, [], "it died"))
SILENT = m.failure(CallTimeoutError("replica 1", 4.0))
FULL = m.failure(InsufficientBlocksError("r", 0, 9, 1, 8))
OK = (0, 4, 0, 0, 0, 0, 0)
REFUSED = (-1,) * 7
Answer = Callable[[ReplicaCall], m.Result]


def admit_done(*rows: tuple[int, ...], **failures: m.Failure) -> m.AdmitDone:
    """Outcomes by row; `r1=failure` is that of row 1."""
    numbers = np.array(rows, np.int64).tobytes()
    return m.AdmitDone(numbers, bytes(16 * len(rows)), {int(name[1:]): f for name, f in failures.items()})


def usual(ask: ReplicaCall) -> m.Result:
    """What a replica with nothing cached and room for everything says."""
    match ask.command:
        case m.Admit(contexts):
            return admit_done(*[OK] * len(contexts.ids))
        case m.Lookup(views):
            return m.Found([0] * len(views), [9] * len(views))
        case m.Blocks():
            return m.BlocksDone(True, [])
        case m.GetMetrics():
            return m.MetricsDone(KVCacheMetrics(input_tokens=1 + ask.replica))
    return m.Done()


@dataclass(frozen=True)
class Place:
    """A request to place: on `replica`, or where the router says when all of a batch are -1."""

    request_id: str
    replica: int
    length: int


@dataclass(frozen=True)
class Placed:
    """A PlaceDone, readable."""

    replicas: list[int]
    rows: list[tuple[int, ...]]
    failures: dict[int, m.Failure]

    @property
    def landed(self) -> list[bool]:
        return [row != REFUSED for row in self.rows]


class Scheduler:
    """A core whose questions are answered by `answer`; `rounds` are the commands of each round, by replica."""

    def __init__(self, replicas: int = 2, copies: bool = False, router: str = "least-loaded") -> None:
        self.now = 100.0
        settings = RouterSettings(router, (1000,) * replicas, 4)
        self.core = SchedulerCore([10 + r for r in range(replicas)], settings, copies, lambda: self.now)
        self.rounds: list[list[tuple[int, str]]] = []
        self.asked: list[ReplicaCall] = []

    def run(self, command: Any, answer: Answer = usual, client: str = "driver") -> Any:
        self.rounds, self.asked = [], []
        script = self.core.handle(client, command)
        try:
            asks = next(script)
            while True:
                if asks:
                    self.rounds.append([(ask.replica, type(ask.command).__name__) for ask in asks])
                self.asked += asks
                asks = script.send([ReplicaReply(answer(ask), f"data of replica {ask.replica}") for ask in asks])
        except StopIteration as end:
            return end.value

    def passes(self, seconds: int) -> list[list[ReplicaCall]]:
        """Time goes by, and the scheduler runs; what it orders by itself."""
        orders: list[list[ReplicaCall]] = []
        for _ in range(seconds):
            self.now += 1.0
            orders += self.core.expire()
        return orders

    def place(self, *places: Place, answer: Answer = usual, **options: Any) -> Placed:
        ctxs = [TextContext(p.request_id, [1] * p.length, 99) for p in places]
        replicas = [p.replica for p in places] if any(p.replica >= 0 for p in places) else []
        done = self.run(m.PlaceMany(ContextSender().pack(ctxs, whole=True), replicas, **options), answer)
        assert isinstance(done, m.PlaceDone) and len(done.replicas) == len(places)
        outcomes = AdmitResults.received(done.numbers, done.seconds, done.failures, len(places))
        assert set(done.failures) <= set(outcomes.refused)
        return Placed(done.replicas, [tuple(row) for row in outcomes.rows], done.failures)

    @property
    def placed(self) -> dict[str, int]:
        return {i: r for r in range(len(self.core.members)) for i in self.core.placer.on(r)}


def place(request_id: str, replica: int = -1, length: int = 4) -> Place:
    return Place(request_id, replica, length)


def but(what: type, result: m.Result, replica: int | None = None) -> Answer:
    """usual(), except for one kind of question (to one replica)."""
    return lambda ask: result if isinstance(ask.command, what) and replica in (None, ask.replica) else usual(ask)


# -- claims ------------------------------------------------------------------------------------------


def test_a_claim_goes_to_its_replica_only() -> None:
    scheduler = Scheduler()
    assert scheduler.run(m.ClaimOne("r", 1)) == m.Claimed(1)
    assert scheduler.rounds == [[(1, "Claim")]]
    assert scheduler.placed == {"r": 1}


def test_a_claim_that_fails_is_forgotten() -> None:
    scheduler = Scheduler()
    assert scheduler.run(m.ClaimOne("r", 1), but(m.Claim, LOST)) == LOST
    assert scheduler.placed == {}


def test_a_known_id_is_checked_with_its_replica_before_it_is_refused() -> None:
    scheduler = Scheduler()
    scheduler.run(m.ClaimOne("r", 1))
    with pytest.raises(AlreadyClaimedError) as caught:
        scheduler.run(m.ClaimOne("r", 0))
    assert caught.value.replica == 1 and scheduler.rounds == [[(1, "Blocks")]]
    assert scheduler.run(m.ClaimOne("r", 0), but(m.Blocks, m.BlocksDone(False, []))) == m.Claimed(3)
    assert scheduler.placed == {"r": 0}


def test_released_ids_are_forgotten_first() -> None:
    scheduler = Scheduler()
    scheduler.run(m.ClaimOne("r", 1))
    assert scheduler.run(m.ClaimOne("r", 0, released={"r": 1, "unknown": 7})) == m.Claimed(2)
    assert scheduler.rounds == [[(0, "Claim")]], "nothing to check"


def test_a_released_claim_that_is_told_of_late_is_not_the_present_one() -> None:
    scheduler = Scheduler()
    scheduler.run(m.ClaimOne("r", 1))
    scheduler.run(m.ClaimOne("r", 0, released={"r": 1}))
    scheduler.run(m.Describe({"r": 1}))
    assert scheduler.placed == {"r": 0}
    scheduler.run(m.Describe({"r": 2}), client="another")
    assert scheduler.placed == {}, "released by force, of which another driver tells"


@pytest.mark.parametrize("replica", [-1, 2, 99])
def test_an_index_out_of_range_is_refused(replica: int) -> None:
    scheduler = Scheduler()
    with pytest.raises(ReplicaIndexError):
        scheduler.run(m.ClaimOne("r", replica))
    assert scheduler.placed == {} and scheduler.rounds == []


# -- placing -----------------------------------------------------------------------------------------


def test_one_message_to_each_replica_with_work() -> None:
    scheduler = Scheduler(3)
    done = scheduler.place(*(place(f"r{i}", i % 2) for i in range(6)))
    assert scheduler.rounds == [[(0, "Admit"), (1, "Admit")]]
    assert [ask.command.contexts.ids for ask in scheduler.asked] == [
        ["r0", "r2", "r4"],
        ["r1", "r3", "r5"],
    ]
    assert done.replicas == [0, 1] * 3 and done.rows == [OK] * 6


def test_answers_are_put_back_in_the_order_of_the_requests() -> None:
    def number(ask: ReplicaCall) -> m.Result:
        return admit_done(*[(0, 4, int(request_id[1:]), 0, 0, 0, 0) for request_id in ask.command.contexts.ids])

    done = Scheduler(3).place(*(place(f"r{i}", (2 * i) % 3) for i in range(7)), answer=number)
    assert [cached for _, _, cached, *_ in done.rows] == list(range(7))


def test_the_router_places_what_has_no_replica() -> None:
    scheduler = Scheduler(2)
    done = scheduler.place(place("a", length=9), place("b"), place("c"), place("d"))
    assert done.replicas == [0, 1, 1, 0]


def test_nothing_to_place_asks_nothing() -> None:
    scheduler = Scheduler()
    assert scheduler.place() == Placed([], [], {})
    assert scheduler.rounds == []


def test_what_a_replica_refuses_is_not_placed() -> None:
    scheduler = Scheduler(1)
    done = scheduler.place(
        place("a"),
        place("b"),
        place("c"),
        answer=but(m.Admit, admit_done(OK, REFUSED, REFUSED, r1=FULL)),
    )
    assert done.landed == [True, False, False] and done.failures == {1: FULL}
    assert scheduler.placed == {"a": 0}
    assert scheduler.core.placer.counts() == ([1], [4])


def test_a_lost_replica_fails_its_part_only() -> None:
    scheduler = Scheduler(2)
    done = scheduler.place(place("a", 0), place("b", 1), place("c", 1), answer=but(m.Admit, LOST, 1))
    assert done.landed == [True, False, False] and done.failures == {1: LOST, 2: LOST}
    assert scheduler.placed == {"a": 0}


def test_an_id_twice_in_a_batch_is_placed_once() -> None:
    scheduler = Scheduler(2)
    done = scheduler.place(place("a"), place("a"), place("b"))
    assert done.failures[1].kind == "AlreadyClaimedError"
    assert scheduler.placed == {"a": 0, "b": 1}


def test_alloc_of_a_claimed_request_places_nothing_anew() -> None:
    scheduler = Scheduler(2)
    scheduler.run(m.ClaimOne("r", 1))
    scheduler.place(place("r", 1), claim=False, generations=[1], answer=but(m.Admit, admit_done(REFUSED, r0=FULL)))
    assert scheduler.placed == {"r": 1}, "still claimed, though it got no pages"
    assert scheduler.rounds == [[(1, "Admit")]]
    assert not scheduler.asked[0].command.claim


def test_placing_out_of_range_is_refused_for_that_request() -> None:
    scheduler = Scheduler(2)
    done = scheduler.place(place("a", 5), place("b", 1))
    assert done.failures[0].kind == "ReplicaIndexError" and done.rows[1] == OK
    assert scheduler.placed == {"b": 1}


def test_stop_on_error_counts_what_the_scheduler_refuses() -> None:
    """An id that is claimed already stops the batch as much as a replica that is full."""
    scheduler = Scheduler(1)
    scheduler.run(m.ClaimOne("taken", 0))
    done = scheduler.place(place("a"), place("taken"), place("b"), stop_on_error=True)
    assert done.landed == [True, False, False]
    assert scheduler.placed == {"taken": 0, "a": 0}


# -- copies ------------------------------------------------------------------------------------------


def found(**residents: list[int]) -> Answer:
    """Replica i holds residents['ri'][k] leading pages of request k; exports give what was asked for."""

    def answer(ask: ReplicaCall) -> m.Result:
        match ask.command:
            case m.Lookup(views):
                return m.Found(residents.get(f"r{ask.replica}", [0] * len(views)), [9] * len(views))
            case m.Export(_, start, stop):
                return m.Exported(100 * ask.replica + start, start, [b"h"] * (stop - start))
        return usual(ask)

    return answer


def test_missing_pages_are_fetched_from_those_that_hold_them() -> None:
    scheduler = Scheduler(3, copies=True)
    scheduler.place(place("a", 1), peers=True, answer=found(r0=[2], r1=[1], r2=[5]))
    assert scheduler.rounds == [
        [(0, "Lookup"), (1, "Lookup"), (2, "Lookup")],
        [(0, "Export"), (2, "Export")],
        [(1, "Admit")],
        [(0, "Acknowledge"), (2, "Acknowledge")],
    ]
    exports = [ask for ask in scheduler.asked if isinstance(ask.command, m.Export)]
    assert [(ask.command.start, ask.command.stop, ask.with_data) for ask in exports] == [(1, 2, True), (2, 5, True)]
    [admit] = [ask for ask in scheduler.asked if isinstance(ask.command, m.Admit)]
    assert [(h.start, len(h.hashes)) for h in admit.command.imports] == [(1, 1), (2, 3)]
    assert admit.attached == ("data of replica 0", "data of replica 2")
    assert admit.command.uses == {0: [0, 1]}
    acks = [ask.command.export_ids for ask in scheduler.asked if isinstance(ask.command, m.Acknowledge)]
    assert acks == [[1], [202]]


def test_imports_belong_to_their_requests() -> None:
    scheduler = Scheduler(2, copies=True)
    scheduler.place(
        place("a", 0),
        place("b", 0),
        place("c", 0),
        peers=True,
        answer=found(r0=[0, 3, 1], r1=[2, 4, 1]),
    )
    [admit] = [ask for ask in scheduler.asked if isinstance(ask.command, m.Admit)]
    assert admit.command.uses == {0: [0], 1: [1]}
    assert [h.start for h in admit.command.imports] == [0, 3]


def test_both_directions_in_one_batch_are_the_same_rounds() -> None:
    scheduler = Scheduler(2, copies=True)
    scheduler.place(place("a", 0), place("b", 1), peers=True, answer=found(r0=[0, 4], r1=[4, 0]))
    assert scheduler.rounds == [
        [(0, "Lookup"), (1, "Lookup")],
        [(1, "Export"), (0, "Export")],
        [(0, "Admit"), (1, "Admit")],
        [(1, "Acknowledge"), (0, "Acknowledge")],
    ]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_replica_does_not_keep_others_from_copying(lost: int) -> None:
    scheduler = Scheduler(3, copies=True)
    base = found(r0=[2], r1=[0], r2=[5])
    done = scheduler.place(place("a", 1), peers=True, answer=lambda ask: LOST if ask.replica == lost else base(ask))
    exported = [ask.replica for ask in scheduler.asked if isinstance(ask.command, m.Export)]
    assert exported == {0: [2], 1: [], 2: [0]}[lost]
    assert done.landed == [lost != 1]
    acked = [ask.replica for ask in scheduler.asked if isinstance(ask.command, m.Acknowledge)]
    assert acked == exported


def test_exports_are_acknowledged_when_the_target_fails() -> None:
    scheduler = Scheduler(2, copies=True)
    base = found(r0=[4], r1=[0])
    done = scheduler.place(
        place("a", 1), peers=True, answer=lambda ask: LOST if isinstance(ask.command, m.Admit) else base(ask)
    )
    assert done.failures == {0: LOST}
    assert scheduler.rounds[-1] == [(0, "Acknowledge")]


def test_nobody_is_asked_without_copies() -> None:
    for scheduler, wanted in (
        (Scheduler(2, copies=False), True),
        (Scheduler(1, copies=True), True),
        (Scheduler(2, copies=True), False),
    ):
        scheduler.place(place("a", 0), peers=wanted)
        assert scheduler.rounds == [[(0, "Admit")]]


# -- all replicas --------------------------------------------------------------------------------------


def test_metrics_add_up() -> None:
    scheduler = Scheduler(3)
    done = scheduler.run(m.EveryReplica(m.GetMetrics()))
    assert done == m.MetricsDone(KVCacheMetrics(input_tokens=6))
    assert scheduler.rounds == [[(r, "GetMetrics") for r in range(3)]]


@pytest.mark.parametrize("command", [m.GetMetrics(), m.ResetMetrics(), m.ResetPrefixCache(), m.CheckIntegrity()])
def test_one_failure_is_the_answer_but_all_are_asked(command: Any) -> None:
    scheduler = Scheduler(3)
    broken = m.failure(IntegrityError("replica 1", "page 3 is in 2 places"))
    assert scheduler.run(m.EveryReplica(command), but(type(command), broken, 1)) == broken
    assert scheduler.rounds == [[(r, type(command).__name__) for r in range(3)]]


def test_hit_counts() -> None:
    view = ContextSender().view(TextContext("a", [1, 1, 1, 1], 99))
    scheduler = Scheduler(3)
    assert scheduler.run(m.HitCountsOf(view), found(r1=[4])) == m.Counts([0, 4, 0])
    broken = m.failure(IntegrityError("replica 1", "page 3 is in 2 places"))
    assert scheduler.run(m.HitCountsOf(view), but(m.Lookup, broken, 2)) == broken


@pytest.mark.parametrize("why", [LOST, SILENT])
def test_who_does_not_answer_does_not_keep_the_others_from_it(why: m.Failure) -> None:
    view, scheduler = ContextSender().view(TextContext("a", [1, 1, 1, 1], 99)), Scheduler(3)
    known = found(r0=[3], r1=[4])
    counts = scheduler.run(m.HitCountsOf(view), lambda ask: why if ask.replica == 1 else known(ask))
    assert counts == m.Counts([3, 0, 0])
    results = {}
    for command in (m.GetMetrics, m.ResetMetrics, m.CheckIntegrity, m.PollTransfers, m.Drain, m.ResetPrefixCache):
        try:
            results[command] = scheduler.run(m.EveryReplica(command()), but(command, why, 1))
        except CallTimeoutError as error:
            results[command] = m.failure(error)
        assert scheduler.rounds == [[(r, command.__name__) for r in range(3)]]
    assert results == {
        m.GetMetrics: m.MetricsDone(KVCacheMetrics(input_tokens=4)),
        m.ResetMetrics: m.Done(),
        m.CheckIntegrity: m.Unasked([1]),
        m.PollTransfers: m.Done(),
        m.Drain: m.Done() if why is LOST else SILENT,
        m.ResetPrefixCache: m.ResetDone(0, {}) if why is LOST else SILENT,
    }


# -- drivers ---------------------------------------------------------------------------------------------


def test_leaving_releases_what_is_still_claimed_one_message_a_replica() -> None:
    scheduler = Scheduler(3)
    scheduler.run(m.Connect(5.0))
    for i in range(4):
        scheduler.run(m.ClaimOne(f"r{i}", i % 2))
    scheduler.run(m.ClaimOne("other", 2), client="another")
    assert scheduler.run(m.Disconnect()) == m.Done()
    assert [(ask.replica, ask.command) for ask in scheduler.asked] == [
        (0, m.Release(["r0", "r2"], True, [1, 3])),
        (1, m.Release(["r1", "r3"], True, [2, 4])),
    ]
    assert scheduler.placed == {"other": 2}
    assert scheduler.run(m.Disconnect()) == m.Done() and scheduler.rounds == []


def test_leases_end_when_they_are_not_renewed() -> None:
    scheduler = Scheduler(2)
    scheduler.run(m.Connect(5.0))
    scheduler.run(m.ClaimOne("mine", 0))
    scheduler.run(m.ClaimOne("unleased", 1), client="owner")
    assert scheduler.passes(5) == [], "it is still in time"
    assert scheduler.passes(1) == [[ReplicaCall(0, m.Release(["mine"], True, [1]))]]
    assert scheduler.placed == {"unleased": 1}
    assert scheduler.passes(9) == []


def test_description() -> None:
    scheduler = Scheduler(2)
    scheduler.run(m.Connect(5.0))
    scheduler.place(place("a", length=7), place("b", length=3))
    known = scheduler.run(m.Describe())
    assert (known.epochs, known.requests, known.tokens, known.clients) == ([10, 11], [1, 1], [7, 3], 1)
    assert known.states == ["ready", "ready"]
    assert known.held == [8, 4], "whole pages of 4, with room for the next token"
    assert known.capacity == [4000, 4000]
