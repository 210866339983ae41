"""Replicas that come and go on a real cluster, while requests run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import ray
from ray.util import placement_group_table

from rayk import InferenceSession, PagedKVCacheManager, Removed, TextContext
from rayk.errors import NotClaimedError, PlanError, ReplicaLostError, ReplicaRemovedError

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import chain, contents, params, pid, running, stamp


@pytest.fixture
def manager(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    """Two replicas of a test's own, which are replaced by nobody but the test."""
    with PagedKVCacheManager(
        params(), session, 64, enable_runtime_checks=True, max_batch_size=8, replace=False
    ) as manager:
        yield manager
        manager.check_integrity()


def groups() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def serve(manager: PagedKVCacheManager, ctx: TextContext, replica: int, tokens: int = 1) -> None:
    batches = [[ctx] if r == replica else [] for r in range(manager.num_replicas)]
    for _ in range(tokens):
        manager.alloc(ctx, replica)
        manager.execute(batches, stamp)
        ctx.update(7)
        manager.step(batches)


def test_add_use_and_remove(manager: PagedKVCacheManager) -> None:
    before = groups()
    old = TextContext("old", range(40), 200)
    [there] = manager.admit([old])
    serve(manager, old, there, 2)
    assert manager.add_replicas(2) == [2, 3]
    assert groups() == before + 2, "each has a placement group of its own"
    assert manager.replica_states() == ["ready"] * 4
    new = TextContext("new", range(40), 200)
    [admission] = manager.try_admit([new], [3])
    assert admission.error is None and admission.peer_tokens == 32, "what others have is copied to it"
    serve(manager, new, 3, 2)
    assert contents(manager, "new", 3, 40) == contents(manager, "old", there, 40)
    pids = manager.execute([[], [], [], []], pid)
    assert len(set(pids)) == 4
    manager.release("new", 3)
    manager.drain_replica(3)
    manager.remove_replica(3)
    until(lambda: not running([pids[3]]))
    assert groups() == before + 1 and manager.replica_states()[3] == "removed"
    with pytest.raises(ReplicaRemovedError):
        manager.claim("x", 3)
    serve(manager, old, there, 2)
    manager.release("old", there)


def test_a_place_that_is_not_there_is_asked_for_and_given_up(manager: PagedKVCacheManager) -> None:
    """Ray's autoscaler would see the request for as long as it waits."""
    before = groups()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayk.actors.launch.SLIVER", 1000.0)
        with pytest.raises(PlanError, match=r"no place for 1 replica\(s\) of {'CPU': 1000.0} within 1 s"):
            manager.add_replicas(timeout=1.0)
    assert groups() == before and manager.num_replicas == 2
    assert manager.add_replicas() == [2]


def test_a_killed_replica_is_replaced(manager: PagedKVCacheManager) -> None:
    ctxs = [TextContext(name, range(20), 100) for name in "ab"]
    assert [a.error for a in manager.try_admit(ctxs, [0, 1])] == [None, None]
    pids = manager.execute([[], []], pid)
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: not running([pids[1]]))
    with pytest.raises(ReplicaLostError):
        manager.step([[ctxs[0]], [ctxs[1]]])
    before = groups()
    assert manager.add_replicas() == [1] and groups() == before, "in the bundle of the one before"
    with pytest.raises(NotClaimedError):
        manager.alloc(ctxs[1], 1)
    assert [a.error for a in manager.try_admit([ctxs[1]], [1])] == [None]
    assert manager.execute([[ctxs[0]], [ctxs[1]]], stamp)[0] == 20
    assert contents(manager, "a", 0, 20) == contents(manager, "b", 1, 20)
    assert len(ray.nodes()) == 1


def test_running_requests_are_handed_over_and_the_replica_goes(manager: PagedKVCacheManager) -> None:
    past = TextContext("past", range(500, 570), 200)
    manager.try_admit([past], [1])
    serve(manager, past, 1)
    manager.release("past", 1)
    ctxs = [TextContext(name, range(20 * i, 20 * i + 40), 200) for i, name in enumerate("abc")]
    manager.try_admit(ctxs, [1, 1, 0])
    for ctx, r in zip(ctxs, [1, 1, 0], strict=True):
        serve(manager, ctx, r, 12)
    [_, gone] = manager.execute([[], []], pid)
    assert manager.drain_replica(1).left == ["a", "b"]
    assert manager.drain_replica(1, 0.0).moved == {"a": 0, "b": 0}
    with pytest.raises(NotClaimedError, match="claimed on replica 0"):
        manager.step([[], [ctxs[0]]])
    assert manager.remove_replica(1) == Removed(cached=10, known=6, taken=4), "the others got what was cached there"
    until(lambda: not running([gone]))
    again = TextContext("again", [*past.tokens.all.tolist(), 8], 200)
    assert manager.admit([again]) == [0] and again.cached_prefix_length == 64, "so a conversation goes on"
    serve(manager, again, 0)
    assert contents(manager, "again", 0, 72) == chain(again.tokens.all.tolist()[:72])
    manager.release("again", 0)
    for ctx in ctxs:
        serve(manager, ctx, 0)
        length = ctx.tokens.length - 1
        assert contents(manager, ctx.request_id, 0, length) == chain(ctx.tokens.all.tolist()[:length])
    assert ctxs[0].tokens.processed == 52, "48 tokens came along, the rest was computed again"
    assert manager.add_replicas() == [2]


def test_a_replica_is_killed_while_it_drains(manager: PagedKVCacheManager) -> None:
    ctx = TextContext("a", range(40), 200)
    manager.try_admit([ctx], [1])
    serve(manager, ctx, 1, 2)
    manager.drain_replica(1)
    pids = manager.execute([[], []], pid)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(ReplicaLostError, match="died while it drained") as lost:
        manager.drain_replica(1, 0.0)
    assert lost.value.requests == ["a"] and manager.replica_states() == ["ready", "lost"]
    manager.remove_replica(1)
    assert manager.holder("a") is None
    assert manager.admit([ctx]) == [0] and ctx.tokens.processed == 0, "its tokens are the driver's: it starts again"
    serve(manager, ctx, 0, 2)
