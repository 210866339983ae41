"""Replicas that come and go while requests run, in both runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from rayk import AsyncPagedKVCacheManager, InferenceSession, PagedKVCacheManager, TextContext, Tick
from rayk.actors.describe import describe
from rayk.errors import (
    BatchError,
    ClosedError,
    DrainError,
    NoReplicaError,
    NotClaimedError,
    PlanError,
    ReplicaIndexError,
    ReplicaLostError,
    ReplicaRemovedError,
    ReplicaStateError,
    RuntimeInputsError,
)

from ..actors.fake import FakeRuntime, chain, contents, manager_on, params, session_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

RUNTIMES = ["inline", "eager", "lazy"]


@contextmanager
def manager_of(
    kind: str, replicas: int = 2, pages: int = 16, router: str = "round-robin", **changes: Any
) -> Iterator[tuple[PagedKVCacheManager, FakeRuntime | None]]:
    runtime = None if kind == "inline" else FakeRuntime(lazy=kind == "lazy")
    with InferenceSession() if runtime is None else session_on(runtime) as session:
        manager = PagedKVCacheManager(
            params(replicas, **changes), session, pages, enable_runtime_checks=True, max_batch_size=8, router=router
        )
        yield manager, runtime
        if manager._open:
            manager.check_integrity()
            manager.shutdown()
    if runtime is not None:
        assert runtime.running == [] and runtime.placements == []


def context(request_id: str, tokens: int = 9, first: int = 0) -> TextContext:
    return TextContext(request_id, range(first, first + tokens), 1000)


def serve(manager: PagedKVCacheManager, ctx: TextContext, replica: int) -> None:
    """Prefill and one decode step's token."""
    batches = [[ctx] if r == replica else [] for r in range(manager.num_replicas)]
    manager.execute(batches, stamp)
    ctx.update(7)
    manager.step(batches)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_an_added_replica_is_used_at_once(kind: str) -> None:
    with manager_of(kind) as (manager, runtime):
        manager.admit([context("a"), context("b", first=20)])
        assert manager.add_replicas(2) == [2, 3]
        assert (manager.num_replicas, manager.replica_states()) == (4, ["ready"] * 4)
        assert [manager.total_num_blocks(r) for r in range(4)] == [16] * 4
        placed = manager.admit([context(f"c{i}", first=40 + 20 * i) for i in range(4)])
        assert sorted(placed) == [0, 1, 2, 3]
        at = {2: f"c{placed.index(2)}", 3: f"c{placed.index(3)}"}
        manager.claim("d", 3)
        for r, request_id in at.items():
            assert manager.contains(request_id, r) and manager.get_req_blocks(request_id, r)
            manager.release(request_id, r)
        assert manager.get_node_names()[3]
        if runtime is not None:
            assert [len(p.node_ids) for p in runtime.placements] == [2, 1, 1], "each has a placement of its own"


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_second_replica_makes_the_first_ones_pages_count(kind: str) -> None:
    """One replica needs no index and no copies; what it holds has to be known once there is a choice."""
    with manager_of(kind, 1, router="cost") as (manager, _):
        first = context("first", 17)
        manager.admit([first])
        serve(manager, first, 0)
        manager.release("first", 0)
        manager.add_replicas()
        again = context("again", 17)
        assert manager.admit([again]) == [0] and again.cached_prefix_length == 16
        other = context("other", 17)
        [admission] = manager.try_admit([other], [1])
        assert admission.peer_tokens == 16 and other.cached_prefix_length == 16
        serve(manager, other, 1)
        assert (
            contents(manager, "other", 1, 17)
            == contents(manager, "again", 0, 17)[:16] + contents(manager, "other", 1, 17)[16:]
        )


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_removed_replica_leaves_a_hole(kind: str) -> None:
    with manager_of(kind, 3) as (manager, runtime):
        ctx = context("a")
        manager.try_admit([ctx], [2])
        with pytest.raises(DrainError, match="'a': it was neither released nor handed over") as caught:
            manager.remove_replica(2)
        assert caught.value.left.keys() == {"a"} and manager.replica_states() == ["ready"] * 3
        before = manager.get_metrics_aggregated()
        manager.remove_replica(1)
        assert manager.replica_states() == ["ready", "removed", "ready"]
        assert manager.get_metrics_aggregated() == before, "what was counted stays counted"
        calls: list[Callable[[], Any]] = [
            lambda: manager.claim("x", 1),
            lambda: manager.contains("a", 1),
            lambda: manager.alloc(ctx, 1),
            lambda: manager.release("a", 1),
            lambda: manager.num_free_blocks(1),
            lambda: manager.get_device_buffer(1),
            lambda: manager.try_admit([context("x")], [1]),
            lambda: manager.step([[], [ctx], []]),
            lambda: manager.execute([[], [ctx], []], stamp),
            lambda: manager.runtime_inputs([[], [ctx], []]),
            lambda: manager.tick([Tick(), Tick(step=[ctx]), Tick()]),
            lambda: manager.remove_replica(1),
            lambda: manager.drain_replica(1),
        ]
        for call in calls:
            with pytest.raises(ReplicaRemovedError) as gone:
                call()
            assert isinstance(gone.value, IndexError) and isinstance(gone.value, ValueError)
        with pytest.raises(ReplicaIndexError, match="3 is out of range"):
            manager.claim("x", 3)
        assert manager.execute([[], [], [ctx]], stamp) == [0, None, 9]
        ctx.update(7)
        manager.step([[], [], [ctx]])
        inputs = manager.runtime_inputs([[], [], [ctx]]) if manager.alloc(ctx, 2) is None else None
        assert inputs is not None and [entry.shards[0].lookup_table.shape[0] for entry in inputs] == [0, 0, 1]  # type: ignore[union-attr]
        assert manager.get_prefix_cache_hit_counts(ctx)[1].device_blocks == 0
        assert len(manager.get_node_names()) == 3 and manager.get_node_names()[1] == ""
        assert set(manager.admit([context(f"n{i}", first=50 * i) for i in range(4)])) == {0, 2}
        assert manager.add_replicas() == [3], "its index is not used again"
        if runtime is not None:
            assert [a.label for a in runtime.actors if a.stopped] == ["replica-1"]
            assert [len(p.node_ids) for p in runtime.placements] == [3, 1]
        manager.remove_replica(3)
        if runtime is not None:
            assert [len(p.node_ids) for p in runtime.placements] == [3], "an added one's place is given back"


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_replica_that_joins_after_the_weights_changed_copies_what_came_after(kind: str) -> None:
    with manager_of(kind) as (manager, _):
        running = context("running")
        manager.try_admit([running], [0])
        serve(manager, running, 0)
        assert manager.reset_prefix_cache(weights_changed=True) == ({0: 3, 1: 0}, False)
        new = context("new")
        manager.try_admit([new], [1])
        assert new.cached_prefix_length == 0, "the other one's pages are old"
        serve(manager, new, 1)
        [joined] = manager.add_replicas()
        late = context("late")
        [admission] = manager.try_admit([late], [joined])
        assert admission.peer_tokens == 8


@pytest.mark.parametrize("kind", RUNTIMES)
def test_lists_for_replicas_that_came_later_may_be_left_out(kind: str) -> None:
    with manager_of(kind) as (manager, _):
        ctx = context("a")
        manager.try_admit([ctx], [1])
        manager.add_replicas()
        assert manager.execute([[], [ctx]], stamp) == [0, 9]
        assert len(manager.execute([[], [ctx], []], stamp)) == 3
        ctx.update(7)
        manager.step([[], [ctx]])
        assert manager.alloc_many([[], [ctx]]) == [{}, {}]
        assert len(manager.tick([Tick(), Tick(step=[ctx])])) == 2
        assert len(manager.runtime_inputs([[], [ctx]])) == 2
        for wrong in ([[]], [[]] * 4):
            with pytest.raises(BatchError, match="2 to 3"):
                manager.step(wrong)
            with pytest.raises(RuntimeInputsError, match="2 to 3"):
                manager.runtime_inputs(wrong)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new(kind: str) -> None:
    with manager_of(kind) as (manager, _):
        ctx = context("a")
        manager.try_admit([ctx], [1])
        manager.drain_replica(1)
        manager.drain_replica(1)
        assert manager.replica_states() == ["ready", "draining"]
        assert manager.admit([context(f"n{i}", 4, 30 * i) for i in range(3)]) == [0, 0, 0]
        with pytest.raises(ReplicaStateError, match="replica 1 is draining: it cannot take new requests"):
            manager.claim("x", 1)
        [refused] = manager.try_admit([context("x")], [1])
        assert isinstance(refused.error, ReplicaStateError)
        assert not manager.contains("x", 1)
        serve(manager, ctx, 1)
        manager.alloc(ctx, 1)
        serve(manager, ctx, 1)
        with pytest.raises(DrainError):
            manager.remove_replica(1)
        manager.release("a", 1)
        manager.remove_replica(1)
        manager.drain_replica(0)
        with pytest.raises(NoReplicaError, match="lost or draining"):
            manager.admit([context("y")])
        manager.resume_replica(0)
        assert manager.admit([context("y")]) == [0]


def test_other_drivers_follow(fake: FakeRuntime) -> None:
    """Drivers of a named cluster hear of it with the scheduler's answers, or when they name what they do not know."""
    settings: dict[str, Any] = {"max_batch_size": 8, "router": "round-robin"}
    with manager_on(fake, name="prod", router="round-robin") as first, session_on(fake, "prod") as session:
        second = PagedKVCacheManager(params(), session, 16, **settings)
        assert first.add_replicas() == [2]
        second.claim("b", 2)
        assert second.contains("b", 2) and second.num_replicas == 3
        assert second.add_replicas() == [3]
        assert sorted(first.admit([context(f"n{i}", 4, 30 * i) for i in range(4)])) == [0, 1, 2, 3]
        ctx = context("mine")
        assert first.try_admit([ctx], [0])[0].error is None
        for request_id in [i for i, r in first._calls._placed.items() if r == 1]:  # type: ignore[attr-defined]
            first.release(request_id, 1)
        first.get_metrics_aggregated()  # the scheduler hears of releases with the next message
        first.admit([context("tells", 4, 900)])
        second.drain_replica(1)
        for request_id in [i for i, r in first._calls._placed.items() if r == 1]:  # type: ignore[attr-defined]
            first.release(request_id, 1)
        first.claim("tells more", 0)
        second.remove_replica(1)
        with pytest.raises(ReplicaRemovedError):
            first.num_free_blocks(1)
        assert first.execute([[ctx], [], [], []], stamp) == [9, None, 0, 0]
        assert second.replica_states() == first.replica_states() == ["ready", "removed", "ready", "ready"]
        [state] = describe(fake, "prod")
        assert [r.index for r in state.replicas] == [0, 2, 3] and state.coming == {}
    assert fake.running == [] and fake.placements == [], "the one that ends it knows of all"


@pytest.fixture
def fake() -> FakeRuntime:
    return FakeRuntime()


STAGES = [
    ("nodes",), ("measure", "node-b"), ("place",), ("start", "replica-2"), ("start", "replica-3"),
    ("construct", "replica-2"), ("construct", "replica-3"),
    ("run", "scheduler", "Starting"), ("run", "scheduler", "Join"),
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids="-".join)
def test_a_failure_leaves_nothing_behind_and_the_next_try_gets_the_same_indices(
    fake: FakeRuntime, stage: tuple[str, ...]
) -> None:
    with manager_on(fake) as manager:
        ctx = context("a")
        manager.admit([ctx])
        places = list(fake.placements)
        boom = RuntimeError("injected")
        if stage[0] == "run":
            scheduler = fake.actor("scheduler").instance
            real = scheduler.handle
            kind = stage[2].encode()
            scheduler.handle = lambda wire, *rest: (_ for _ in ()).throw(boom) if kind in wire else real(wire, *rest)
        else:
            fake.fail = lambda event: boom if event[: len(stage)] == stage else None
        with pytest.raises((RuntimeError, PlanError), match="injected"):
            manager.add_replicas(2)
        fake.fail = None
        if stage[0] == "run":
            scheduler.handle = real
        assert fake.running == ["replica-0", "replica-1", "scheduler"] and fake.placements == places
        assert manager.replica_states() == ["ready", "ready", "removed", "removed"] or manager.num_replicas == 2
        assert manager.num_replicas == 2
        assert manager.add_replicas(2) == [2, 3]
        serve(manager, ctx, 0)


def test_a_lost_replica_is_replaced_in_its_place(fake: FakeRuntime) -> None:
    with manager_on(fake, router="round-robin") as manager:
        ctxs = [context("a"), context("b", first=40)]
        assert manager.admit(ctxs) == [0, 1]
        fake.kill("replica-1")
        with pytest.raises(ReplicaLostError) as lost:
            manager.step([[], [ctxs[1]]])
        assert lost.value.requests == ["b"] and "add_replicas()" in str(lost.value)
        assert manager.holder("b") == 1
        assert manager.add_replicas() == [1]
        assert manager.replica_states() == ["ready", "ready"]
        assert manager.holder("b") is None, "it was lost with the one before"
        with pytest.raises(NotClaimedError, match="call claim"):
            manager.alloc(ctxs[1], 1)
        assert [a.error for a in manager.try_admit([ctxs[1]], [1])] == [None]
        assert manager.execute([[ctxs[0]], [ctxs[1]]], stamp) == [9, 9]
        assert len(fake.placements) == 1 and ("await_place",) in fake.events, "it takes the bundle of the one before"
        assert len(manager.execute([[], []], stamp)) == 2


def test_a_lost_replica_can_be_removed(fake: FakeRuntime) -> None:
    with manager_on(fake, router="round-robin") as manager:
        manager.admit([context("a"), context("b", first=40)])
        fake.kill("replica-1")
        assert manager.get_metrics_aggregated().input_tokens == 9
        with pytest.raises(ReplicaStateError, match="is lost: it cannot drain"):
            manager.drain_replica(1)
        manager.remove_replica(1)
        assert manager.replica_states() == ["ready", "removed"]
        assert manager.get_metrics_aggregated().input_tokens == 9


def test_what_does_not_fit_is_refused_with_what_is_missing() -> None:
    page = params().bytes_per_page
    fake = FakeRuntime({"a": 40 * page, "b": 100 * page})
    with manager_on(fake, 2, pages=16) as manager:
        fake.free = {"a": 20 * page, "b": 20 * page}
        with pytest.raises(PlanError, match=r"no node is left; left out: 16 page.*do not fit on node host-of-a"):
            manager.add_replicas()
        fake.free["c"] = 100 * page
        assert manager.add_replicas() == [2]
        assert manager.get_node_names()[2] == "host-of-c"


def test_the_async_manager_adds_and_removes() -> None:
    import asyncio

    async def life(session: InferenceSession) -> None:
        manager = AsyncPagedKVCacheManager(params(2), session, 16, max_batch_size=8, router="round-robin")
        ctx = context("a")
        assert await manager.admit([ctx]) == [0]
        added, inputs = await asyncio.gather(manager.add_replicas(), manager.execute([[ctx], []], stamp))
        assert added == [2] and inputs == [9, 0]
        ctx.update(7)
        await asyncio.gather(manager.step([[ctx], []]), manager.step([[], [], []]))
        await manager.drain_replica(2)
        assert await manager.replica_states() == ["ready", "ready", "draining"]
        await manager.resume_replica(2)
        await manager.remove_replica(2)
        assert manager.num_replicas == 3 and manager.holder("a") == 0
        await manager.shutdown()
        with pytest.raises(ClosedError):
            await manager.add_replicas()

    for fake in (None, FakeRuntime()):
        with InferenceSession() if fake is None else session_on(fake) as session:
            asyncio.run(life(session))


# -- handing over --------------------------------------------------------------------------------------


def go_on(manager: PagedKVCacheManager, ctx: TextContext, replica: int, steps: int = 1) -> None:
    """Decode steps, each checked by what is in the pages afterwards."""
    batches = [[ctx] if r == replica else [] for r in range(manager.num_replicas)]
    for _ in range(steps):
        manager.alloc(ctx, replica)
        manager.execute(batches, stamp)
        length = ctx.tokens.length
        assert contents(manager, ctx.request_id, replica, length) == chain(ctx.tokens.all.tolist())
        ctx.update(7)
        manager.step(batches)


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "computed"])
@pytest.mark.parametrize("kind", RUNTIMES)
def test_running_requests_are_handed_over(kind: str, copies: bool) -> None:
    with manager_of(kind, enable_dp_cross_replica_prefix_copy=copies) as (manager, _):
        ctx, bare = context("a", 18), context("bare", 5, 100)
        manager.try_admit([ctx], [1])
        go_on(manager, ctx, 1, 3)
        manager.claim("bare", 1)
        manager.alloc_dummy("dummy", 1)
        drained = manager.drain_replica(1)
        assert (drained.left, drained.moved) == (["a", "bare", "dummy"], {})
        with pytest.raises(DrainError, match="'a': it still runs"):
            manager.drain_replica(1, 0.0, handover=False)
        drained = manager.drain_replica(1, 0.0)
        assert (drained.left, drained.moved) == ([], {"a": 0, "bare": 0, "dummy": 0})
        assert [manager.holder(i) for i in ("a", "bare", "dummy")] == [0, 0, 0]
        assert (ctx.tokens.length, ctx.tokens.processed) == (21, 20), "nothing of it changes before the next call"
        assert manager.get_num_used_pages(1) == 0
        for call in (
            lambda: manager.alloc(ctx, 1),
            lambda: manager.step([[], [ctx]]),
            lambda: manager.tick([Tick(), Tick(alloc=[ctx], execute=[ctx])], stamp),
            lambda: manager.alloc_many([[], [ctx]]),
            lambda: manager.release("a", 1),
        ):
            with pytest.raises(NotClaimedError, match="claimed on replica 0") as caught:
                call()
            assert (caught.value.replica, caught.value.holder) == (1, 0)
        manager.step([[ctx], []])
        for batches in ([[ctx], []], [[], [ctx]]):
            with pytest.raises(RuntimeInputsError, match=r"call alloc|not claimed here"):
                manager.execute(batches, stamp)
        manager.check_integrity()
        before = manager.get_metrics_aggregated().input_tokens
        manager.alloc(ctx, 0)
        assert ctx.tokens.processed == (20 if copies else 0), "five full pages were copied"
        assert manager.get_metrics_aggregated().input_tokens - before == (1 if copies else 21)
        go_on(manager, ctx, 0, 6)
        manager.alloc(bare, 0)
        go_on(manager, bare, 0, 2)
        assert manager.get_req_blocks("dummy", 0) == [16]
        manager.remove_replica(1)
        for request_id in ("a", "bare", "dummy"):
            manager.release(request_id, 0)
        assert manager.get_num_used_pages(0) == 0


@pytest.mark.parametrize("kind", RUNTIMES)
def test_pages_that_are_not_full_stay_behind(kind: str) -> None:
    with manager_of(kind) as (manager, _):
        ctx = context("a", 18)
        manager.try_admit([ctx], [1])
        go_on(manager, ctx, 1, 2)
        assert ctx.tokens.processed == 19
        manager.drain_replica(1, 0.0)
        [result, _] = manager.tick([Tick(alloc=[ctx], execute=[ctx]), Tick()], stamp)
        assert (result.value, ctx.tokens.processed) == (4, 16), "three tokens are computed again"
        assert contents(manager, "a", 0, 20) == chain(ctx.tokens.all.tolist())


@pytest.mark.parametrize("kind", RUNTIMES)
def test_what_finds_no_room_stays_and_is_named(kind: str) -> None:
    with manager_of(kind, 3, pages=8) as (manager, _):
        big, small = context("big", 20), context("small", 6, 100)
        fill = [context("fill0", 20, 200), context("fill2", 14, 300)]
        assert all(a.error is None for a in manager.try_admit([big, small, *fill], [1, 1, 0, 2]))
        serve(manager, big, 1)
        with pytest.raises(DrainError, match=r"'big': .* needs \d+ more page\(s\) on replica [02]") as caught:
            manager.drain_replica(1, 0.0)
        assert list(caught.value.left) == ["big"] and manager.holder("small") in (0, 2)
        assert manager.holder("big") == 1 and manager.replica_states()[1] == "draining"
        go_on(manager, big, 1)
        manager.release("fill0", 0)
        assert manager.drain_replica(1, 0.0).moved == {"big": 0}
        go_on(manager, big, 0)


def test_a_driver_that_did_not_drain_is_told_where_its_requests_are(fake: FakeRuntime) -> None:
    with manager_on(fake, name="prod", router="round-robin") as first, session_on(fake, "prod") as session:
        second = PagedKVCacheManager(params(), session, 16, max_batch_size=8, router="round-robin")
        ctx, other = context("a", 18), context("b", 9, 100)
        first.try_admit([ctx, other], [1, 1])
        go_on(first, ctx, 1, 3)
        assert second.drain_replica(1, 0.0).moved == {"a": 0, "b": 0}
        assert second.holder("a") is None, "it is not its own"
        second.remove_replica(1)
        with pytest.raises(NotClaimedError, match="claimed on replica 0"):
            first.step([[], [ctx]])
        assert first.holder("b") == 0
        go_on(first, ctx, 0, 3)
        first.release("a", 0)
        first.release("b", 0)


@pytest.mark.parametrize("when", ["GetContexts", "Export", "Admit", "Release"])
@pytest.mark.parametrize("who", ["replica-0", "replica-1"])
def test_a_replica_that_dies_in_a_handover(fake: FakeRuntime, when: str, who: str) -> None:
    """The source or the target: a request is on one replica that lives, or named as lost."""
    with manager_on(fake, 3, router="round-robin") as manager:
        ctx = context("a", 18)
        manager.try_admit([ctx], [1])
        go_on(manager, ctx, 1, 3)
        fake.fail = lambda event: RuntimeError("it died") if event == ("run", who, when) else None
        moved: dict[str, int] = {}
        with suppress(DrainError, ReplicaLostError):
            moved = manager.drain_replica(1, 0.0).moved
        fake.fail = None
        at = manager.holder("a")
        assert moved.get("a", at) == at
        if at is None or at == 1:
            assert who == "replica-1"
            with pytest.raises((ReplicaLostError, NotClaimedError)):
                manager.alloc(ctx, 1)
        for r in [r for r, state in enumerate(manager.replica_states()) if state == "lost"]:
            manager.remove_replica(r)
        if at is not None and manager.holder("a") == at:
            go_on(manager, ctx, at, 3)
        manager.check_integrity()
        if at is not None and manager.holder("a") == at:
            manager.release("a", at)
        assert sum(manager.get_num_used_pages(r) for r in range(3) if manager.replica_states()[r] != "removed") == 0
