"""A replica, or the scheduler, that does not answer harms only itself. Time is the fake cluster's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest

from rayk import AsyncPagedKVCacheManager, PagedKVCacheManager, TextContext, Tick
from rayk import protocol as m
from rayk.actors import channel as link_module
from rayk.actors import scheduler as scheduler_actor
from rayk.actors.channel import CALL_SECONDS
from rayk.actors.replica_calls import BUSY_SECONDS, PATIENT, QUESTION_SECONDS, SILENT_SECONDS
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    DrainError,
    NoReplicaError,
    RaykError,
    ReplicaLostError,
    ReplicaRemovedError,
)
from rayk.manager import scaling_calls as changes
from rayk.manager.calls import CLOSING_SECONDS
from rayk.manager.cluster_view import HUNG_SECONDS, SCHEDULER_SECONDS
from rayk.protocol.admission import AdmissionPolicy

from ..actors.fake import FakeActor, FakeRuntime, chain, contents, manager_on, params, session_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

NOTICED = QUESTION_SECONDS + SILENT_SECONDS + 1.0  # with the steps in which it is looked


@pytest.fixture(params=[False, True], ids=["eager", "lazy"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    runtime = FakeRuntime(lazy=request.param)
    for module in (scheduler_actor, link_module, changes):
        monkeypatch.setattr(module, "monotonic", lambda: runtime.time)
    monkeypatch.setattr(changes, "sleep", runtime.pass_)
    return runtime


@pytest.fixture
def manager(runtime: FakeRuntime) -> Iterator[PagedKVCacheManager]:
    """Two replicas that have computed the same prefix, for request w0 and w1."""
    with manager_on(runtime, pages=32) as manager:
        warm(manager)
        yield manager
        for actor in runtime.actors:
            actor.go_on()


def warm(manager: PagedKVCacheManager) -> None:
    ctxs = [TextContext(f"w{r}", [5] * 16, 100) for r in range(2)]
    assert [a.error for a in manager.try_admit(ctxs, [0, 1])] == [None] * 2
    manager.execute([[ctxs[0]], [ctxs[1]]], stamp)
    for ctx in ctxs:
        ctx.update(1)
    manager.step([[ctxs[0]], [ctxs[1]]])


def ctx(name: str, first: int = 0, prefix: tuple[int, ...] = (), **more: Any) -> TextContext:
    return TextContext(name, [*prefix, *range(first, first + 9)], 100, **more)


def replica(runtime: FakeRuntime, index: int) -> FakeActor:
    return runtime.actor(f"replica-{index}")


def held(runtime: FakeRuntime, index: int) -> list[str]:
    return sorted(replica(runtime, index).core.requests)


def error_of(call: Callable[[], Any]) -> RaykError | None:
    """The error that it raises, or that its one admission bears."""
    try:
        result = call()
    except RaykError as error:
        return error
    return result[0].error if isinstance(result, list) and hasattr(result[0], "error") else None


@contextmanager
def at_most(runtime: FakeRuntime, seconds: float) -> Iterator[None]:
    began = runtime.time
    yield
    assert runtime.time - began <= seconds, f"it took {runtime.time - began} s"


def wakes(runtime: FakeRuntime, index: int) -> None:
    """It answers again, and the scheduler has time to hear it."""
    actor = replica(runtime, index)
    actor.go_on()
    while actor.queue:
        actor.queue.popleft()()
    runtime.pass_(1.0)


# -- requests to others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hung", "busy"])
def test_requests_to_healthy_replicas_go_on(runtime: FakeRuntime, manager: PagedKVCacheManager, how: str) -> None:
    setattr(replica(runtime, 1), how, True)
    with at_most(runtime, QUESTION_SECONDS + 1):
        assert error_of(lambda: manager.try_admit([ctx("a", 0, (5,) * 16)], [0])) is None, "one question may wait"
    runtime.pass_(SILENT_SECONDS - 0.5)  # and not long enough to be taken out
    with at_most(runtime, 0.0):
        for i in range(4):
            name = f"b{i}"
            assert error_of(lambda: manager.try_admit([ctx(name, 50 * i, (5,) * 8)], [0])) is None  # noqa: B023  # now
            assert [a.replica for a in manager.try_admit([ctx(f"c{i}", 50 * i)])] == [0], "the router knows"
            manager.release(f"b{i}", 0), manager.release(f"c{i}", 0)
        manager.claim("d", 0)
        assert manager.replica_states() == ["ready", {"hung": "silent", "busy": "ready"}[how]]
    wakes(runtime, 1)
    assert manager.replica_states() == ["ready", "ready"] and held(runtime, 1) == ["w1"]
    manager.release("a", 0), manager.release("d", 0)
    assert {a.replica for a in manager.try_admit([ctx(f"e{i}", 90 * i) for i in range(2)])} == {0, 1}, "it is back"
    assert manager.check_integrity() == []


def test_what_the_router_placed_there_goes_elsewhere(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    replica(runtime, 1).hung = True
    with at_most(runtime, NOTICED + 1):
        admissions = manager.try_admit([ctx(f"a{i}", 20 * i) for i in range(4)])
    assert [(a.replica, a.error) for a in admissions] == [(0, None)] * 4
    wakes(runtime, 1)
    assert held(runtime, 1) == ["w1"] and held(runtime, 0) == ["a0", "a1", "a2", "a3", "w0"]


def test_admit_all_or_nothing_goes_elsewhere_too(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    replica(runtime, 1).hung = True
    assert manager.admit([ctx(f"a{i}", 20 * i) for i in range(4)]) == [0] * 4
    wakes(runtime, 1)
    assert held(runtime, 1) == ["w1"]


def test_a_queue_gives_those_who_met_a_silent_replica_another_turn(runtime: FakeRuntime) -> None:
    with manager_on(runtime, pages=32, admission=AdmissionPolicy(high=1.0, low=1.0)) as manager:
        warm(manager)
        replica(runtime, 1).hung = True
        admissions = manager.try_admit([ctx(f"a{i}", 20 * i) for i in range(4)])
        assert [(a.replica, a.error) for a in admissions] == [(0, None)] * 4
        wakes(runtime, 1)
        assert held(runtime, 1) == ["w1"]


def test_who_waits_in_the_queue_waits_on_while_all_are_silent(runtime: FakeRuntime) -> None:
    with manager_on(runtime, replicas=1, pages=32, admission=AdmissionPolicy(high=1.0, low=1.0)) as manager:
        manager.claim("x", 0)
        actor = replica(runtime, 0)
        actor.hung = True
        assert isinstance(error_of(lambda: manager.claim("y", 0)), CallTimeoutError)
        assert manager.replica_states() == ["silent"]
        assert manager.enter([ctx("a")]) == [], "it waits"
        wakes(runtime, 0)
        [(_, admission)] = manager.enter()
        assert (admission.replica, admission.error) == (0, None)


def test_without_a_queue_nobody_is_placed_while_all_are_silent(runtime: FakeRuntime) -> None:
    with manager_on(runtime, replicas=1) as manager:
        replica(runtime, 0).hung = True
        with at_most(runtime, NOTICED + 1):
            assert isinstance(error_of(lambda: manager.try_admit([ctx("a")])), CallTimeoutError)
        assert isinstance(error_of(lambda: manager.try_admit([ctx("a")])), NoReplicaError)
        wakes(runtime, 0)
        assert held(runtime, 0) == [] and manager.admit([ctx("a")]) == [0]


# -- requests to the silent one ------------------------------------------------------------------------------

PLACING = {
    "try_admit": lambda manager: manager.try_admit([ctx("a", 7)], [1]),
    "claim": lambda manager: manager.claim("a", 1),
}


@pytest.mark.parametrize("how", PLACING)
def test_an_admission_that_timed_out_is_undone(runtime: FakeRuntime, manager: PagedKVCacheManager, how: str) -> None:
    used, place = manager.get_num_used_pages(1), PLACING[how]
    replica(runtime, 1).hung = True
    for most in (NOTICED, 0.0, 0.0):
        with at_most(runtime, most):
            error = error_of(lambda: place(manager))
        assert isinstance(error, CallTimeoutError) and error.target == "replica 1" and error.seconds < 10
    assert manager.holder("a") is None
    manager.claim("a", 0)  # the id is free
    wakes(runtime, 1)
    assert held(runtime, 1) == ["w1"] and manager.get_num_used_pages(1) == used
    manager.release("a", 0)
    place(manager)
    assert held(runtime, 1) == ["a", "w1"] and manager.holder("a") == 1


def test_an_event_loop_is_answered_alike(runtime: FakeRuntime) -> None:
    async def serve(manager: AsyncPagedKVCacheManager) -> None:
        replica(runtime, 1).hung = True
        [admission] = await manager.try_admit([ctx("a")], [1])
        assert isinstance(admission.error, CallTimeoutError) and admission.error.target == "replica 1"
        [admission] = await manager.try_admit([ctx("b")])
        assert (admission.replica, admission.error) == (0, None)
        assert (await manager.get_metrics_aggregated()).input_tokens == 9
        assert await manager.check_integrity() == [1]
        wakes(runtime, 1)
        assert await manager.check_integrity() == [] and held(runtime, 1) == []
        await manager.release("b", 0)

    with session_on(runtime) as session:
        manager = AsyncPagedKVCacheManager(params(2), session, 32, max_batch_size=8, router="least-loaded")
        asyncio.run(serve(manager))


def test_an_alloc_that_timed_out_can_be_repeated(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    late = ctx("late", 3)
    manager.claim("late", 1)
    replica(runtime, 1).hung = True
    assert isinstance(error_of(lambda: manager.alloc(late, 1)), CallTimeoutError)
    assert late.tokens.processed == 0
    wakes(runtime, 1)
    assert held(runtime, 1) == ["late", "w1"], "it was claimed before"
    manager.alloc(late, 1)
    manager.execute([[], [late]], stamp)
    late.update(1)
    manager.step([[], [late]])
    assert contents(manager, "late", 1, 9) == chain(list(range(3, 12)))


def test_a_request_that_a_silent_replica_has_stays_its_own(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    replica(runtime, 1).hung = True
    with at_most(runtime, QUESTION_SECONDS + 1):
        assert isinstance(error_of(lambda: manager.claim("w1", 0)), AlreadyClaimedError)
    wakes(runtime, 1)
    manager.release("w1", 1)
    assert held(runtime, 1) == []


def test_a_busy_replica_is_waited_for(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    actor = replica(runtime, 1)
    actor.busy = True
    runtime.due.append((runtime.time + 30, actor.go_on))
    assert error_of(lambda: manager.try_admit([ctx("a")], [1])) is None
    assert held(runtime, 1) == ["a", "w1"]


def test_but_not_for_ever_and_not_by_all_lanes(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    replica(runtime, 1).busy = True
    with at_most(runtime, BUSY_SECONDS + 2):
        assert isinstance(error_of(lambda: manager.try_admit([ctx("a")], [1])), CallTimeoutError)
    runtime.actor("scheduler").instance._questions._patient = PATIENT  # lanes that wait for it
    with at_most(runtime, 0.0):
        assert isinstance(error_of(lambda: manager.try_admit([ctx("b")], [1])), CallTimeoutError)
        assert error_of(lambda: manager.try_admit([ctx("c")], [0])) is None
    wakes(runtime, 1)
    assert held(runtime, 1) == ["w1"]


def test_a_replica_that_dies_while_it_is_silent_is_lost(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    replica(runtime, 1).hung = True
    error_of(lambda: manager.claim("a", 1))
    runtime.kill("replica-1")
    runtime.pass_(1.0)
    assert isinstance(error_of(lambda: manager.claim("b", 1)), ReplicaLostError)
    assert manager.replica_states() == ["ready", "lost"]
    replica(runtime, 1).hung = False
    assert manager.add_replicas(1) == [1] and manager.replica_states() == ["ready", "ready"]
    manager.claim("b", 1)


def test_a_scheduler_that_stood_still_does_not_blame_replicas(
    runtime: FakeRuntime, manager: PagedKVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock went on while it did not run; the answer is there soon after it looks again."""
    actor, stalls = replica(runtime, 1), [600.0, 600.0, 0.1]

    def pass_(seconds: float) -> None:
        runtime.time += stalls.pop(0)
        if not stalls:
            actor.go_on()

    actor.hung = True
    monkeypatch.setattr(runtime, "pass_", pass_)
    assert error_of(lambda: manager.try_admit([ctx("a")], [1])) is None
    assert manager.replica_states() == ["ready", "ready"] and held(runtime, 1) == ["a", "w1"]


# -- copies ------------------------------------------------------------------------------------------------


def hangs_at(runtime: FakeRuntime, label: str, command: str, before: Callable[[], Any] = lambda: None) -> None:
    """The actor hangs when that is sent to it, for the first time; `before` that is done."""
    done: list[str] = []

    def fail(event: tuple[Any, ...]) -> None:
        if event == ("send", label, command) and not done:
            done.append(command)
            before()
            runtime.actor(label).hung = True

    runtime.fail = fail


def test_pages_that_a_silent_source_pins_too_late_are_unpinned(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    source = manager.add_replicas(1) and 0  # a third one, which has nothing
    hangs_at(runtime, f"replica-{source}", "Export")
    with at_most(runtime, QUESTION_SECONDS + 1):
        [admission] = manager.try_admit([ctx("a", 0, (5,) * 16)], [2])
    assert admission.error is None and replica(runtime, 2).core.metrics.cross_replica_blocks_copied == 0
    actor = replica(runtime, source)
    actor.go_on()
    while actor.queue:
        actor.queue.popleft()()
    assert len(actor.core.exports.tips) == 1, "it did it, for nobody"
    runtime.pass_(1.0)
    while actor.queue:
        actor.queue.popleft()()
    assert actor.core.exports.tips == []


# -- draining ----------------------------------------------------------------------------------------------


def test_a_silent_replica_can_be_drained_in_time_removed_and_replaced(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    replica(runtime, 1).hung = True
    with at_most(runtime, 5 + NOTICED):
        error = error_of(lambda: manager.drain_replica(1, deadline=5))
    assert isinstance(error, DrainError) and list(error.left) == ["w1"] and "replica 1 did not answer" in str(error)
    with at_most(runtime, 1.0):
        manager.remove_replica(1)
    assert replica(runtime, 1).stopped and manager.replica_states() == ["ready", "removed"]
    assert isinstance(error_of(lambda: manager.get_req_blocks("w1", 1)), ReplicaRemovedError)
    with at_most(runtime, 1.0):
        assert manager.add_replicas(1) == [2]
    manager.claim("w1", 2)
    assert manager.check_integrity() == []


def test_one_that_nobody_noticed_yet_can_be_removed(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    replica(runtime, 1).hung = True
    with at_most(runtime, NOTICED + 1):
        manager.remove_replica(1)
    assert manager.replica_states() == ["ready", "removed"]


def test_a_silent_target_does_not_keep_a_replica_from_draining(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    manager.add_replicas(1)
    hangs_at(runtime, "replica-2", "Admit")
    hung = replica(runtime, 2)
    before = [runtime.time]
    drained = manager.drain_replica(0, deadline=0)
    assert runtime.time - before[0] <= NOTICED + 1 and drained.left == [] and list(drained.moved) == ["w0"]
    assert drained.moved["w0"] == 1
    if hung.hung:
        wakes(runtime, 2)
    assert held(runtime, 2) == [] and held(runtime, 0) == [] and held(runtime, 1) == ["w0", "w1"]


@pytest.mark.parametrize("released", [False, True])
def test_a_source_that_falls_silent_once_its_requests_have_moved(
    runtime: FakeRuntime, manager: PagedKVCacheManager, released: bool
) -> None:
    """With a release of its driver's before the scheduler's: then the request is nobody's at its new place, too."""
    source = replica(runtime, 0)

    def release() -> None:
        if released:
            source.hung = True
            epoch = source.service.epoch
            claim = source.service.core.requests["w0"].generation
            order = m.Release(["w0"], generations=[claim])
            source.call("handle", m.encode(m.ReplicaEnvelope("a driver", epoch, 1, order)))

    hangs_at(runtime, "replica-0", "Release", release)
    with at_most(runtime, NOTICED + 2):
        drained = manager.drain_replica(0, deadline=0)
    assert drained.moved == {"w0": 1} and held(runtime, 1) == ["w0", "w1"]
    wakes(runtime, 0)
    wakes(runtime, 1)
    assert held(runtime, 0) == [] and held(runtime, 1) == (["w1"] if released else ["w0", "w1"])


# -- all replicas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lost", "silent"])
def test_one_of_all_does_not_keep_the_others_from_answering(
    runtime: FakeRuntime, manager: PagedKVCacheManager, how: str
) -> None:
    total = manager.get_metrics_aggregated().input_tokens
    if how == "lost":
        runtime.kill("replica-1")
    else:
        replica(runtime, 1).hung = True
    with at_most(runtime, NOTICED + 1):
        assert manager.get_metrics_aggregated().input_tokens == total / 2
    assert manager.replica_states() == ["ready", how]
    probe = ctx("probe", 0, (5,) * 16)
    assert [hit.device_blocks for hit in manager.get_prefix_cache_hit_counts(probe)] == [4, 0]
    assert manager.check_integrity() == [1]
    manager.poll_transfers()
    manager.reset_metrics()
    assert manager.get_metrics_aggregated().input_tokens == 0
    for promise in (manager.reset_prefix_cache, manager.drain):
        error = error_of(promise)
        if how == "lost":
            assert error is None, "what it had is gone with it"
        else:
            assert isinstance(error, CallTimeoutError) and error.target == "replica 1"
    if how == "silent":
        wakes(runtime, 1)
        assert manager.get_metrics_aggregated().input_tokens == 0, "it was reset, too"
        assert manager.check_integrity() == []


def test_a_replica_that_was_silent_during_a_reset_serves_nothing_from_before(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    manager.release("w0", 0), manager.release("w1", 1)
    replica(runtime, 1).hung = True
    error = error_of(manager.reset_prefix_cache)
    assert isinstance(error, CallTimeoutError) and replica(runtime, 0).core.usage.cached == 0
    actor = replica(runtime, 1)
    actor.go_on()
    runtime.pass_(1.0)
    again = ctx("again", 0, (5,) * 16)
    manager.claim("again", 1)
    manager.alloc(again, 1)
    assert again.cached_prefix_length in (0, None) and again.tokens.processed == 0


def test_describing_a_cluster_with_a_silent_replica_does_not_wait_for_it(runtime: FakeRuntime) -> None:
    from rayk.actors.describe import describe

    with manager_on(runtime, pages=32, name="prod") as manager:
        warm(manager)
        replica(runtime, 1).hung = True
        error_of(lambda: manager.claim("a", 1))
        with at_most(runtime, 0.0):
            [state] = describe(runtime, "prod")
        assert [each.state for each in state.replicas] == ["ready", "silent"] and state.metrics is not None
        assert state.replicas[1].reason and state.replicas[1].pages is None
        wakes(runtime, 1)


def test_a_driver_that_leaves_is_released_at_a_silent_replica_when_that_wakes(runtime: FakeRuntime) -> None:
    with manager_on(runtime, pages=32, name="prod") as manager:
        warm(manager)
        replica(runtime, 1).hung = True
        with session_on(runtime, "prod") as session:
            settings: dict[str, Any] = {"enable_runtime_checks": True, "router": "least-loaded", "max_batch_size": 8}
            other = PagedKVCacheManager(params(), session, 32, **settings)
            other.claim("mine", 0)
            replica(runtime, 1).go_on()
            other.claim("there", 1)
            replica(runtime, 1).hung = True
            with at_most(runtime, NOTICED + 1):
                other.leave()
        assert held(runtime, 0) == ["w0"]
        wakes(runtime, 1)
        assert held(runtime, 1) == ["w1"]


# -- the scheduler -------------------------------------------------------------------------------------------


def test_a_scheduler_that_stopped_for_good_is_named_in_time(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    runtime.actor("scheduler").hung = True
    for most in (SCHEDULER_SECONDS + 2, 0.0, 0.0):
        with at_most(runtime, most):
            error = error_of(lambda: manager.try_admit([ctx("a")]))
        assert isinstance(error, CallTimeoutError) and error.target == "the scheduler"
        assert error.seconds == HUNG_SECONDS < CALL_SECONDS
    assert [event for event in runtime.events if event[0] == "restart"] == [("restart", "scheduler")], "once"
    with at_most(runtime, 0.0):
        assert manager.tick([Tick(), Tick(release=["w1"])])[1].error is None, "replicas answer as before"
        manager.release("w0", 0)
    began = runtime.time
    manager.shutdown()
    assert runtime.time - began <= CLOSING_SECONDS + 1 and runtime.running == []


def test_a_scheduler_that_hangs_is_ended_and_the_call_goes_on_with_the_next(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    runtime.restarts = True
    actor = runtime.actor("scheduler")
    before, actor.hung = actor.instance, True
    with at_most(runtime, HUNG_SECONDS + 2):
        assert error_of(lambda: manager.try_admit([ctx("a")], [0])) is None
    assert actor.instance is not before and held(runtime, 0) == ["a", "w0"] and held(runtime, 1) == ["w1"]
    assert manager.holder("w1") == 1 and manager.replica_states() == ["ready", "ready"]
    actor.hung = True
    with at_most(runtime, HUNG_SECONDS + 2):
        manager.claim("b", 1)
    for name, replica in (("a", 0), ("b", 1), ("w0", 0), ("w1", 1)):
        manager.release(name, replica)


def test_a_scheduler_that_comes_back_is_used_again_and_nothing_is_claimed_twice(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    actor = runtime.actor("scheduler")
    actor.hung = True
    assert isinstance(error_of(lambda: manager.try_admit([ctx("a")], [0])), CallTimeoutError)
    actor.go_on()
    while actor.queue:
        actor.queue.popleft()()
    assert held(runtime, 0) == ["a", "w0"], "it did what nobody waits for any more"
    manager.claim("b", 0)
    assert held(runtime, 0) == ["b", "w0"], "which the driver gave back first"
    assert manager.try_admit([ctx("a")], [1])[0].error is None


def test_a_slow_scheduler_whose_ping_answers_is_waited_for(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    actor = runtime.actor("scheduler")
    actor.busy = True
    runtime.due.append((runtime.time + 3 * SCHEDULER_SECONDS, actor.go_on))
    assert error_of(lambda: manager.try_admit([ctx("a")], [0])) is None


def test_closing_a_named_session_does_not_wait_for_a_scheduler_that_stopped(runtime: FakeRuntime) -> None:
    with manager_on(runtime, pages=32, name="prod"):
        began = runtime.time
        with session_on(runtime, "prod") as session:
            settings: dict[str, Any] = {"enable_runtime_checks": True, "router": "least-loaded", "max_batch_size": 8}
            PagedKVCacheManager(params(), session, 32, **settings).claim("a", 0)
            runtime.actor("scheduler").hung = True
        assert runtime.time - began <= CLOSING_SECONDS + 1
        runtime.actor("scheduler").go_on()


def test_an_event_loop_goes_on_while_a_scheduler_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, since it is asyncio that waits."""
    runtime = FakeRuntime()
    monkeypatch.setattr(link_module, "SLICE", 0.005)

    async def serve(manager: AsyncPagedKVCacheManager) -> None:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(turn())
        runtime.actor("scheduler").hung = True
        manager.sync._calls.scheduler.quiet = 0.02  # type: ignore[attr-defined]
        for _ in range(2):
            [admission] = await manager.try_admit([ctx("a")])
            assert isinstance(admission.error, CallTimeoutError) and admission.error.target == "the scheduler"
        assert turns > 1
        other.cancel()
        runtime.actor("scheduler").go_on()
        assert (await manager.try_admit([ctx("b")]))[0].error is None
        assert [await manager.contains("a", r) for r in range(2)] == [False, False], "given back"

    with session_on(runtime) as session:
        asyncio.run(serve(AsyncPagedKVCacheManager(params(2), session, 32, max_batch_size=8, router="least-loaded")))


def test_attaching_and_renewing_do_not_wait_for_a_lane_that_is_at_work(
    runtime: FakeRuntime, manager: PagedKVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_actor, "ROSTER_SECONDS", 0.01)
    scheduler = runtime.actor("scheduler").instance
    known, took = scheduler.roster(), list[Any]()
    with scheduler._core_lock:  # a long step
        lane = Thread(target=lambda: took.extend([scheduler.roster(), scheduler.ping(), scheduler.renew("nobody")]))
        lane.start()
        lane.join(20)
    assert took == [known, scheduler.ping(), False]
