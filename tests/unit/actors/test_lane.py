"""The fast lane: what goes by it, that nothing overtakes, and that what breaks is done once and goes on by calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayk import AsyncPagedKVCacheManager, InferenceSession, PagedKVCacheManager, ReplicaLostError, TextContext, Tick
from rayk import protocol as m
from rayk.actors import lane as lanes
from rayk.actors.graph import LaneError
from rayk.actors.replica import ReplicaActor
from rayk.bench.core.ray_path import ray_params
from rayk.kvcache.progress import Progress

from ...measure.fast_lane import ITERATIONS, _Bench  # noqa: TID252  # tests/ is no package with an absolute name
from .fake import Event, FakeRuntime, contents, manager_on, params, session_on, stamp

Batch = list[list[TextContext]]


class Faulty(FakeRuntime):
    """Fails once at the event `at` of a lane of replica 1, with `error`."""

    def __init__(self, at: str, error: BaseException | None = None, **options: Any) -> None:
        super().__init__(fail=self._fails, **options)
        self.at, self.error, self.armed = at, error or LaneError("torn"), False

    def _fails(self, event: Event) -> BaseException | None:
        if self.armed and event[:2] == (self.at, "replica-1"):
            self.armed = False
            return self.error
        return None


@pytest.fixture(params=[False, True], ids=["eager", "lazy"])
def lazy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def runtime(lazy: bool) -> FakeRuntime:
    return FakeRuntime(lazy=lazy)


@pytest.fixture
def manager(runtime: FakeRuntime) -> Iterator[PagedKVCacheManager]:
    with manager_on(runtime, fast_lane=True) as manager:
        yield manager


def admitted(manager: PagedKVCacheManager) -> Batch:
    """Two requests on each replica, with their first token."""
    batches = [
        [TextContext(f"r{r}-{i}", range(9 * i + 30 * r, 9 * i + 30 * r + 6), 100) for i in (0, 1)] for r in (0, 1)
    ]
    ctxs = [ctx for batch in batches for ctx in batch]
    assert [a.error for a in manager.try_admit(ctxs, [0, 0, 1, 1])] == [None] * 4
    return batches


def decode(manager: PagedKVCacheManager, batches: Batch, times: int = 1) -> list[int]:
    """So many iterations, as ticks; what their forwards returned."""
    values = []
    for _ in range(times):
        results = manager.tick([Tick(alloc=b, execute=b) for b in batches], stamp)
        values += [result.value for result in results]
        for batch in batches:
            for ctx in batch:
                ctx.update(7)
        manager.tick([Tick(step=b) for b in batches])
    return values


def outcome(manager: PagedKVCacheManager, batches: Batch) -> list[Any]:
    """All that can be seen of the requests and the cache."""
    manager.check_integrity()
    seen: list[Any] = [manager.get_metrics_aggregated(), *map(manager.get_num_used_pages, (0, 1))]
    for r, batch in enumerate(batches):
        for ctx in batch:
            seen += [ctx.tokens.all.tolist(), manager.get_req_blocks(ctx.request_id, r)]
            seen.append(contents(manager, ctx.request_id, r, ctx.tokens.processed_length))
    return seen


def expected() -> tuple[list[int], list[Any]]:
    """What decode() and outcome() give without lanes, after 6 iterations."""
    with manager_on(FakeRuntime()) as manager:
        batches = admitted(manager)
        return decode(manager, batches, 6), outcome(manager, batches)


def by_lane(runtime: FakeRuntime, since: int = 0) -> int:
    return sum(event[0] == "lane-sent" for event in runtime.events[since:])


def closings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "fast lane" in r.getMessage()]


def test_all_that_a_lane_carries_bears_a_number() -> None:
    assert not set(lanes.SPOKEN) & set(m.READ_ONLY)


def test_ticks_go_by_lanes_and_everything_else_by_calls(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    batches = admitted(manager)
    assert not runtime.lanes, "nobody ticked yet"
    with runtime.watch() as calls:
        values = decode(manager, batches, 6)
        manager.step([[], []])
        manager.execute(batches, stamp)
    assert calls == [] and len(runtime.lanes) == 2 and by_lane(runtime) == 26
    with runtime.watch() as calls:
        assert manager.contains("r1-0", 1)
    assert calls == [("replica-1", "Blocks")]
    assert values == expected()[0]


def test_results_and_pages_are_those_of_calls(manager: PagedKVCacheManager) -> None:
    batches = admitted(manager)
    assert (decode(manager, batches, 6), outcome(manager, batches)) == expected()


@pytest.mark.parametrize(
    ("at", "when"),
    [("lane-open", 0), *((f"lane-{at}", when) for at in ("send", "sent", "get", "got") for when in (0, 1, 4))],
)
def test_what_a_broken_lane_carried_is_done_once(
    lazy: bool, at: str, when: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the message had not left, was on its way, or was carried out, nobody can tell afterwards."""
    runtime = Faulty(at, lazy=lazy)
    with manager_on(runtime, fast_lane=True) as manager:
        batches = admitted(manager)
        values = decode(manager, batches, when)
        since, runtime.armed = len(runtime.events), True
        values += decode(manager, batches, 6 - when)
        assert not runtime.armed, "nothing failed"
        assert (values, outcome(manager, batches)) == expected()
        [warning] = closings(caplog)
        assert "replica 1" in warning and "torn" in warning
        if at != "lane-open":
            assert ("lane-close", "replica-1") in runtime.events[since:]
        since = len(runtime.events)
        decode(manager, batches)
        assert runtime.sent(since) == [("replica-1", "RunTick")] * 2, "the broken one stays closed"
        assert by_lane(runtime, since) == 2, "the other one goes on"
        for lane in runtime.lanes:
            lane.deliver()  # what was still on its way is too late
        manager.check_integrity()
        assert len(closings(caplog)) == 1


def states(manager: PagedKVCacheManager) -> list[tuple[str, int]]:
    return [(each.state, each.messages) for each in manager.lane_states()]


def test_what_is_said_before_a_lane_is_open_goes_by_calls(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    runtime.lanes_open = False
    batches = admitted(manager)
    assert states(manager) == [("unused", 0)] * 2
    values = decode(manager, batches, 2)
    assert by_lane(runtime) == 0 and len(runtime.lanes) == 2 and states(manager) == [("opening", 0)] * 2
    runtime.lanes[1].open = True
    values += decode(manager, batches, 2)
    assert by_lane(runtime) == 4 and states(manager) == [("opening", 0), ("open", 4)]
    runtime.lanes[0].open = True
    values += decode(manager, batches, 2)
    assert by_lane(runtime) == 12 and len(runtime.lanes) == 2
    assert (values, outcome(manager, batches)) == expected()


def test_a_lane_that_rests_opens_again(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    batches = admitted(manager)
    values = decode(manager, batches, 2)
    first, _ = runtime.lanes
    first.open, first.rested = False, True
    assert states(manager) == [("resting", 4), ("open", 4)]
    values += decode(manager, batches, 4)
    assert len(runtime.lanes) == 3 and runtime.lanes[2].actor is first.actor
    assert states(manager) == [("open", 12), ("open", 12)]
    assert (values, outcome(manager, batches)) == expected()


def test_an_answer_too_long_for_a_lane_comes_by_a_call_and_nothing_is_done_twice(
    runtime: FakeRuntime,
    manager: PagedKVCacheManager,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("rayk.actors.replica.LONGEST", 10)
    batches = admitted(manager)
    with runtime.watch() as calls:
        values = decode(manager, batches, 6)
    assert len(calls) == by_lane(runtime) == 24
    assert (values, outcome(manager, batches)) == expected()
    assert states(manager) == [("open", 12)] * 2 and not closings(caplog)


def test_an_interrupted_message_ends_its_lane(lazy: bool) -> None:
    for at in ("lane-send", "lane-sent"):
        runtime = Faulty(at, KeyboardInterrupt(), lazy=lazy)
        with manager_on(runtime, fast_lane=True) as manager:
            batches = admitted(manager)
            decode(manager, batches)
            runtime.armed = True
            with pytest.raises(KeyboardInterrupt):
                manager.tick([Tick(), Tick(alloc=batches[1])])
            assert manager.lane_states()[1] == (1, "closed", "it was interrupted", 2)
            manager.tick([Tick(), Tick(alloc=batches[1])])
            for lane in runtime.lanes:
                lane.deliver()
            manager.check_integrity()


def test_it_is_said_why_there_is_no_lane(runtime: FakeRuntime) -> None:
    with manager_on(runtime) as manager:
        assert {(each.state, each.reason) for each in manager.lane_states()} == {("off", "not asked for")}
    inline = PagedKVCacheManager(params(), InferenceSession(), 16, max_batch_size=8, fast_lane=True)
    assert inline.lane_states() == [(0, "off", "in this process", 0), (1, "off", "in this process", 0)]


def test_a_broken_lane_says_why(lazy: bool) -> None:
    runtime = Faulty("lane-got", lazy=lazy)
    with manager_on(runtime, fast_lane=True) as manager:
        batches = admitted(manager)
        runtime.armed = True
        decode(manager, batches, 2)
        assert manager.lane_states() == [(0, "open", "", 4), (1, "closed", "torn", 1)]


@pytest.mark.parametrize("at", ["lane-get", "lane-got"])
def test_a_call_does_not_overtake_what_nobody_waited_for(lazy: bool, at: str, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Faulty(at, KeyboardInterrupt(), lazy=lazy)
    with manager_on(runtime, fast_lane=True) as manager:
        batches = admitted(manager)
        decode(manager, batches)
        manager.tick([Tick(alloc=b, execute=b) for b in batches], stamp)
        for batch in batches:
            for ctx in batch:
                ctx.update(7)
        before = manager.get_num_used_pages(1)
        since, runtime.armed = len(runtime.events), True
        with pytest.raises(KeyboardInterrupt):
            manager.tick([Tick(), Tick(step=batches[1], release=["r1-0"])])
        assert manager.get_num_used_pages(1) < before, "the release came first"
        runs = [event[2] for event in runtime.events[since:] if event[:2] == ("run", "replica-1")]
        assert runs[0] == "RunTick" and "GetUsage" in runs[1:]
        manager.tick([Tick(), Tick(alloc=batches[1][1:], execute=batches[1][1:])], stamp)
        assert len(closings(caplog)) == 1 and "never read" in closings(caplog)[0]
        manager.check_integrity()


def test_an_answer_of_a_call_that_nobody_read_ends_the_lane(
    runtime: FakeRuntime, manager: PagedKVCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    batches = admitted(manager)
    decode(manager, batches)
    manager._calls.link(1).send(m.Release(["r1-0"]))  # type: ignore[attr-defined]
    since = len(runtime.events)
    manager.tick([Tick(step=batches[0]), Tick(alloc=batches[1][1:])])
    assert runtime.sent(since) == [("replica-1", "RunTick")] and by_lane(runtime, since) == 1
    runs = [event[2] for event in runtime.events if event[:2] == ("run", "replica-1")]
    assert runs.index("Release") < len(runs) - 1 and runs[-1] == "RunTick"
    assert len(closings(caplog)) == 1


def test_long_messages_go_by_calls_and_the_lane_stays(
    runtime: FakeRuntime, manager: PagedKVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = admitted(manager)
    decode(manager, batches)
    since = len(runtime.events)
    monkeypatch.setattr(lanes, "LONGEST", 10)
    decode(manager, batches)
    assert len(runtime.sent(since)) == 4 and by_lane(runtime, since) == 0
    monkeypatch.undo()
    since = len(runtime.events)
    decode(manager, batches)
    assert runtime.sent(since) == [] and by_lane(runtime, since) == 4


def test_a_lost_replica_is_named_and_the_others_go_on(
    runtime: FakeRuntime, manager: PagedKVCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    batches = admitted(manager)
    decode(manager, batches)
    runtime.kill("replica-1")
    since = len(runtime.events)
    with pytest.raises(ReplicaLostError) as caught:
        manager.tick([Tick(alloc=b, execute=b) for b in batches], stamp)
    assert caught.value.replica == 1 and caught.value.requests == ["r1-0", "r1-1"]
    assert by_lane(runtime, since) == 2 and len(closings(caplog)) == 1
    for ctx in batches[0]:
        ctx.update(7)
    since = len(runtime.events)
    manager.tick([Tick(step=batches[0], alloc=batches[0]), Tick()])
    assert by_lane(runtime, since) == 1
    with pytest.raises(ReplicaLostError):
        manager.step([[], batches[1]])


def test_lanes_come_and_go_with_replicas(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    decode(manager, admitted(manager))
    [added] = manager.add_replicas(1)
    new = TextContext("new", range(6), 100)
    assert manager.try_admit([new], [added])[0].error is None
    manager.tick([Tick(), Tick(), Tick(execute=[new])], stamp)
    assert [lane.actor.label for lane in runtime.lanes] == ["replica-0", "replica-1", "replica-2"]
    manager.release("new", added)
    manager.drain_replica(added)
    since = len(runtime.events)
    manager.remove_replica(added)
    what = [event[:2] for event in runtime.events[since:]]
    assert what.index(("lane-close", "replica-2")) < what.index(("stop", ("replica-2",)))
    since = len(runtime.events)
    manager.shutdown()
    what = [event[:2] for event in runtime.events[since:]]
    closed = [what.index(("lane-close", f"replica-{r}")) for r in (0, 1)]
    assert max(closed) < min(i for i, event in enumerate(what) if event[0] == "stop")
    assert ("lane-close", "replica-2") not in what


def test_a_replica_in_the_place_of_a_lost_one_gets_a_lane_of_its_own(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    batches = admitted(manager)
    decode(manager, batches)
    runtime.kill("replica-1")
    with pytest.raises(ReplicaLostError):
        manager.step([[], batches[1]])
    assert manager.lane_states()[1].state == "closed"
    assert manager.add_replicas(1) == [1]
    new = TextContext("new", range(200, 206), 100)
    assert manager.try_admit([new], [1])[0].error is None
    assert manager.tick([Tick(), Tick(execute=[new])], stamp)[1].value == 6
    assert states(manager) == [("open", 2), ("open", 1)] and runtime.lanes[-1].actor is runtime.actor("replica-1")


def test_the_lane_of_a_lost_replica_is_closed_when_it_is_replaced(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    decode(manager, admitted(manager))
    runtime.kill("replica-1")
    with pytest.raises(ReplicaLostError):
        manager.contains("r1-0", 1)
    since = len(runtime.events)
    manager.add_replicas(1)
    assert ("lane-close", "replica-1") in runtime.events[since:] and states(manager) == [("open", 2), ("unused", 0)]


def test_a_replica_that_drains_keeps_its_lane(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    batches = admitted(manager)
    values = decode(manager, batches, 2)
    manager.drain_replica(1)
    values += decode(manager, batches, 2)
    manager.resume_replica(1)
    values += decode(manager, batches, 2)
    assert states(manager) == [("open", 12)] * 2
    assert (values, outcome(manager, batches)) == expected()


def test_requests_that_were_handed_over_go_on_by_the_lane_of_their_new_replica(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    batches = admitted(manager)
    decode(manager, batches)
    moved = manager.drain_replica(1, deadline=0.0).moved
    assert moved == {"r1-0": 0, "r1-1": 0}
    manager.tick([Tick(alloc=batches[0] + batches[1], execute=batches[0] + batches[1]), Tick()], stamp)
    manager.remove_replica(1)
    assert states(manager) == [("open", 3)]
    for ctx in batches[0] + batches[1]:
        ctx.update(7)
        assert contents(manager, ctx.request_id, 0, ctx.tokens.processed_length)
    manager.check_integrity()


def test_drivers_that_share_a_cluster_have_calls(runtime: FakeRuntime, caplog: pytest.LogCaptureFixture) -> None:
    with manager_on(runtime, name="shared", fast_lane=True) as manager:
        decode(manager, admitted(manager))
        assert {each.reason for each in manager.lane_states()} == {"a named session, whose drivers share its replicas"}
    assert not runtime.lanes and len([r for r in caplog.records if "named session" in r.getMessage()]) == 1


def test_an_event_loop_has_calls(runtime: FakeRuntime) -> None:
    with session_on(runtime) as session:
        manager = AsyncPagedKVCacheManager(params(), session, 16, max_batch_size=8, fast_lane=True)
        decode(manager.sync, admitted(manager.sync))
        assert not runtime.lanes
        manager.sync.shutdown()


def test_lane_and_calls_take_turns_in_a_replica() -> None:
    """Ray runs what comes by a lane on another thread than calls."""

    class Slow:
        def __init__(self) -> None:
            self.inside, self.most, self.entered, self.leave = 0, 0, threading.Semaphore(0), threading.Semaphore(0)

        def handle(self, wire: bytes, attached: Any = ()) -> tuple[bytes, list[Any]]:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered.release()
            assert self.leave.acquire(timeout=10)
            self.inside -= 1
            return wire, []

    actor, service = object.__new__(ReplicaActor), Slow()
    actor._door, actor._service = threading.Lock(), service  # type: ignore[assignment]
    actor._progress = Progress()
    ways = (actor.handle, actor.handle_with_data, actor.handle_by_lane)
    threads = [threading.Thread(target=call, args=(b"x",)) for call in ways]
    for thread in threads:
        thread.start()
    assert service.entered.acquire(timeout=10)
    assert not service.entered.acquire(timeout=0.1), "the others wait at the door"
    for _ in threads:
        service.leave.release()
    for thread in threads:
        thread.join(10)
    assert service.most == 1 and service.inside == 0


def test_the_benchmark_times_lanes_and_not_calls(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_on(runtime) as session:
        manager = PagedKVCacheManager(ray_params(2), session, 300, max_batch_size=8)
        bench = _Bench(manager, 2)
        call, lane = bench.compare(2, 1)
        assert len(call) == len(lane) == ITERATIONS - 1 and min(call + lane) > 0
        assert by_lane(runtime) == 2 * (2 * ITERATIONS + 1) + 2
        monkeypatch.setattr(lanes, "LONGEST", 10)
        with pytest.raises(RuntimeError, match="times of calls"):
            bench.compare(2, 1)
        manager.shutdown()
