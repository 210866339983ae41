"""Conversations keep their prefix when their replica goes, in both runtimes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayk import AsyncPagedKVCacheManager, PagedKVCacheManager, Removed, TextContext
from rayk.actors.describe import describe
from rayk.errors import DrainError

from ..actors.fake import FakeRuntime, chain, contents, manager_on, params, session_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name
from .test_elastic import RUNTIMES, context, manager_of, serve


def talk(manager: PagedKVCacheManager, name: str, replica: int, tokens: list[int]) -> None:
    """A turn of a conversation, on that replica."""
    ctx = TextContext(name, tokens, 1000)
    [admission] = manager.try_admit([ctx], [replica])
    assert admission.error is None
    serve(manager, ctx, replica)
    manager.release(name, replica)


def turns(name: int) -> list[int]:
    """A system prompt of two pages, and two pages of its own."""
    return [*range(8), *[100 + name] * 8, 5]


@pytest.mark.parametrize("router", ["cost", "prefix"])
@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_next_turn_is_a_hit_elsewhere(kind: str, router: str) -> None:
    with manager_of(kind, 3, pages=32, router=router) as (manager, _):
        for name in range(4):
            talk(manager, f"c{name}", 2, turns(name))
        before = manager.get_metrics_aggregated()
        assert manager.remove_replica(2) == Removed(10, 0, 10)
        after = manager.get_metrics_aggregated() - before
        assert after.cross_replica_blocks_copied == 10 and after.prompt_tokens == 0
        for name in range(4):
            ctx = TextContext(f"again{name}", [*turns(name), 6, 7], 1000)
            [at] = manager.admit([ctx])
            assert ctx.cached_prefix_length == 16, "the router has heard of them"
            serve(manager, ctx, at)
            assert contents(manager, ctx.request_id, at, 19) == chain(ctx.tokens.all.tolist()[:19])
        assert manager.get_metrics_aggregated().cross_replica_blocks_copied == 10, "and sent each to where they are"


@pytest.mark.parametrize("kind", RUNTIMES)
def test_what_was_drained_first_is_offered_too(kind: str) -> None:
    with manager_of(kind, 2, pages=32) as (manager, _):
        ctx = context("a", 18)
        manager.try_admit([ctx], [1])
        serve(manager, ctx, 1)
        assert manager.drain_replica(1, 0.0).moved == {"a": 0}, "with four pages"
        talk(manager, "b", 0, turns(1))
        assert manager.remove_replica(1) == Removed(4, 4, 0)
        manager.release("a", 0)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_only_empty_pages_are_filled(kind: str) -> None:
    with manager_of(kind, 2, pages=12) as (manager, _):
        for name in range(2):
            talk(manager, f"own{name}", 0, [50 + name] * 17)
        for name in range(2):
            talk(manager, f"c{name}", 1, turns(name))
        assert manager.remove_replica(1) == Removed(6, 0, 4)
        assert manager.get_metrics_aggregated().evicted_blocks == 0
        for tokens, hit in ((turns(1), 4), (turns(0), 2), ([50] * 17, 4), ([51] * 17, 4)):
            [count] = manager.get_prefix_cache_hit_counts(TextContext("q", tokens, 99))[:1]
            assert count.device_blocks == hit


@pytest.mark.parametrize("kind", RUNTIMES)
def test_while_requests_are_there_it_stays_as_it_was(kind: str) -> None:
    with manager_of(kind, 2) as (manager, _):
        talk(manager, "old", 1, turns(1))
        manager.claim("a", 1)
        with pytest.raises(DrainError):
            manager.remove_replica(1)
        assert manager.replica_states() == ["ready", "ready"]
        manager.drain_replica(1)
        with pytest.raises(DrainError):
            manager.remove_replica(1)
        assert manager.replica_states() == ["ready", "draining"]
        manager.release("a", 1)
        assert manager.get_metrics_aggregated().cross_replica_blocks_copied == 0
        assert manager.remove_replica(1) == Removed(4, 0, 4)


OFF: list[dict[str, Any]] = [
    {"enable_prefix_caching": False},
    {"enable_dp_cross_replica_prefix_copy": False},
    {"kv_connector": "local", "host_kvcache_swap_space_gb": 0.001},
]


@pytest.mark.parametrize("changes", OFF, ids=["no caching", "no copies", "a tier"])
@pytest.mark.parametrize("kind", RUNTIMES)
def test_where_nothing_is_offered(kind: str, changes: dict[str, Any]) -> None:
    with manager_of(kind, 2, pages=32, **changes) as (manager, _):
        talk(manager, "old", 1, turns(1))
        assert manager.remove_replica(1) == Removed()
        assert manager.get_metrics_aggregated().cross_replica_blocks_copied == 0


@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_last_one_has_nobody_to_offer_to(kind: str) -> None:
    with manager_of(kind, 2, pages=32) as (manager, _):
        talk(manager, "old", 1, turns(1))
        manager.drain_replica(0)
        assert manager.remove_replica(1) == Removed()
        manager.resume_replica(0)


@pytest.mark.parametrize("when", ["GetPrefixes", "Lookup", "Export", "Keep", "Acknowledge", "GetMetrics"])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_replica_that_dies_meanwhile(when: str, who: int, lazy: bool) -> None:
    """The source or a target: the removal goes on, and what was lost is named to whoever asks for it."""
    fake = FakeRuntime(lazy=lazy)
    with manager_on(fake, 3, pages=32, router="round-robin") as manager:
        for name in range(3):
            talk(manager, f"c{name}", 1, turns(name))
        running = context("r", 9, 300)
        manager.try_admit([running], [2])
        serve(manager, running, 2)
        fake.fail = lambda event: RuntimeError("it died") if event == ("run", f"replica-{who}", when) else None
        removed = manager.remove_replica(1)
        fake.fail = None
        assert manager.replica_states()[1] == "removed" and removed.taken <= 8
        assert manager.replica_states()[2] == "ready"
        for r in [r for r, state in enumerate(manager.replica_states()) if state == "lost"]:
            assert manager.remove_replica(r) == Removed()
        manager.alloc(running, 2)
        serve(manager, running, 2)
        manager.release("r", 2)
        manager.check_integrity()


def test_describe_says_what_became_of_the_pages() -> None:
    fake = FakeRuntime()
    with manager_on(fake, pages=32, name="prod") as manager:
        talk(manager, "old", 1, turns(1))
        manager.remove_replica(1)
        [state] = describe(fake, "prod")  # type: ignore[arg-type]  # a fake
        assert state.removed == {1: {"cached": 4, "known": 0, "taken": 4}}


def test_async() -> None:
    with session_on(FakeRuntime()) as session:
        manager = AsyncPagedKVCacheManager(params(), session, 32, max_batch_size=8, router="round-robin")

        async def go() -> None:
            ctx = TextContext("a", turns(1), 99)
            await manager.try_admit([ctx], [1])
            await manager.execute([[], [ctx]], stamp)
            ctx.update(7)
            await manager.step([[], [ctx]])
            await manager.release("a", 1)
            assert await manager.remove_replica(1) == Removed(4, 0, 4)

        asyncio.run(go())
        manager.sync.shutdown()
