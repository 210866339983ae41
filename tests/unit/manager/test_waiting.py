"""Managers whose requests wait for room: the blocking, the looking and the awaiting form, and several drivers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rayk import AdmissionPolicy, AsyncPagedKVCacheManager, InferenceSession, PagedKVCacheManager, TextContext
from rayk.actors.describe import describe
from rayk.errors import (
    AlreadyClaimedError,
    ClosedError,
    ConfigError,
    OverloadedError,
    SchedulerLostError,
)
from rayk.kvcache.tick import Tick

from ..actors.fake import FakeRuntime, params, session_on  # noqa: TID252  # tests/ is no package that has an absolute name

RUNTIMES = ["inline", "ray"]
POLICY = AdmissionPolicy(high=0.75, low=0.75, patience=5.0)  # 6 of 8 pages: two requests of 3 pages on each replica


def context(name: str, **traits: Any) -> TextContext:
    return TextContext(name, range(ord(name[0]), ord(name[0]) + 9), 100, **traits)


@contextmanager
def manager_of(
    kind: str, runtime: FakeRuntime | None = None, name: str | None = None, policy: AdmissionPolicy | None = POLICY
) -> Iterator[PagedKVCacheManager]:
    options: dict[str, Any] = {"enable_runtime_checks": True, "max_batch_size": 8, "admission": policy}
    with (
        session_on(runtime or FakeRuntime(), name) if kind == "ray" else InferenceSession() as session,
        PagedKVCacheManager(params(2), session, 8, **options) as manager,
    ):
        yield manager


def settled(became: list[tuple[TextContext, Any]]) -> dict[str, Any]:
    return {ctx.request_id: a.replica if a.error is None else type(a.error) for ctx, a in became}


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_loop_offers_and_looks(kind: str) -> None:
    with manager_of(kind) as manager:
        ctxs = [context(name) for name in "abcdef"]
        placed = settled(manager.enter(ctxs))
        assert sorted(placed) == list("abcd") and manager.enter() == []
        manager.release("a", placed["a"])
        assert settled(manager.enter()) == {"e": placed["a"]}
        assert settled(manager.enter([context("f"), context("b")])) == dict.fromkeys("fb", AlreadyClaimedError)
        assert settled(manager.enter(give_up=["f", "b"])) == {"f": OverloadedError}, "b has its place"
        again = context("f")
        assert manager.enter([again]) == []
        manager.tick([Tick(release=[i for i in "bcd" if placed[i] == r]) for r in range(2)])
        assert settled(manager.enter()).keys() == {"f"}
        assert again.tokens.end == 9 and manager.get_num_used_pages(0) + manager.get_num_used_pages(1) == 6
        manager.check_integrity()


@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_blocking_form_waits_until_another_leaves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_of(kind) as manager:
        placed = manager.admit([context(name) for name in "abcd"])
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                manager.release("b", placed[1])

        assert manager._admission is not None
        monkeypatch.setattr(manager._admission, "_sleep", sleep)
        assert manager.admit([context("e")]) == [placed[1]]
        assert pauses == [0.002, 0.004, 0.008], "seldom, and more and more so"
        twice = context("g")
        manager.release("a", placed[0])
        [first, second] = manager.try_admit([twice, twice])
        assert first.error is None and isinstance(second.error, AlreadyClaimedError)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_blocking_form_gives_up_at_the_deadline_and_all_or_none_holds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of(kind, policy=AdmissionPolicy(high=0.75, low=0.75, patience=0.02)) as manager:
        manager.admit([context(name) for name in "abc"])
        d, e = context("d"), context("e")
        with pytest.raises(OverloadedError, match="'e' is turned away: it waited"):
            manager.admit([d, e])
        assert not any(manager.contains("d", r) for r in range(2)) and d.tokens.processed == 0
        assert manager.enter() == []
        manager.check_integrity()


@pytest.mark.parametrize("kind", RUNTIMES)
def test_an_interrupted_wait_leaves_nobody_in_the_queue(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_of(kind) as manager:
        placed = manager.admit([context(name) for name in "abcd"])

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        assert manager._admission is not None
        monkeypatch.setattr(manager._admission, "_sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            manager.admit([context("e")])
        manager.release("a", placed[0])
        assert settled(manager.enter()) == {"e": OverloadedError}
        assert manager.get_num_used_pages(placed[0]) == 3


@pytest.mark.parametrize("kind", RUNTIMES)
def test_without_a_policy_there_is_nothing_to_wait_in(kind: str) -> None:
    with manager_of(kind, policy=None) as manager, pytest.raises(ConfigError, match="admission=AdmissionPolicy"):
        manager.enter([context("a")])


def test_drivers_of_one_cluster_share_the_queue_and_its_policy() -> None:
    runtime = FakeRuntime()
    with manager_of("ray", runtime, "prod") as first:
        with pytest.raises(ConfigError, match="admission"), manager_of("ray", runtime, "prod", AdmissionPolicy()):
            pass
        with session_on(runtime, "prod") as session:
            second = PagedKVCacheManager(
                params(2), session, 8, enable_runtime_checks=True, max_batch_size=8, admission=POLICY
            )
            placed = first.admit([context(name, tenant="one") for name in "abcd"])
            assert second.enter([context("x", tenant="two")]) == []
            first.release("c", placed[2])  # said at once, and that lets x in
            [state] = describe(runtime, "prod")
            assert state.admission is not None and state.admission.waiting == 0
            assert state.admission.tenants["two"].held_pages == 3
            assert [r.promised_pages for r in state.replicas] == [6, 6]
            assert first.enter([context("c", tenant="one")]) == [], "the same id again, right after its release"
            assert settled(second.enter()) == {"x": placed[2]}
            second.release("x", placed[2])
            assert settled(first.enter()) == {"c": placed[2]}
            assert second.enter([context("y")]) == []
        [state] = describe(runtime, "prod")
        assert state.admission is not None and state.admission.waiting == 0, "it left with its session"


@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_scheduler_that_is_lost_is_heard_of_by_those_who_wait(form: str) -> None:
    runtime = FakeRuntime()
    with session_on(runtime) as session:
        if form == "sync":
            manager = PagedKVCacheManager(params(2), session, 8, max_batch_size=8, admission=POLICY)
            manager.admit([context(name) for name in "abcd"])
            assert manager.enter([context("e")]) == []
            runtime.kill("scheduler")
            with pytest.raises(SchedulerLostError):
                manager.enter()
            return

        async def wait(m: AsyncPagedKVCacheManager) -> None:
            await m.admit([context(name) for name in "abcd"])
            waiting = asyncio.ensure_future(m.admit([context("e")]))
            await asyncio.sleep(0)
            runtime.kill("scheduler")
            with pytest.raises(SchedulerLostError):
                await waiting
            await m.shutdown()

        asyncio.run(wait(AsyncPagedKVCacheManager(params(2), session, 8, max_batch_size=8, admission=POLICY)))


def test_the_pages_of_a_lost_replicas_requests_are_nobodys_any_more() -> None:
    runtime = FakeRuntime()
    with manager_of("ray", runtime, "prod") as manager:
        placed = manager.admit([context(name) for name in "abcd"])
        runtime.kill("replica-1")
        manager.get_metrics_aggregated()  # all are asked, and the scheduler finds it dead
        assert manager.enter([context("x"), context("y")]) == []
        manager.release("abcd"[placed.index(0)], 0)
        assert list(settled(manager.enter()).values()) == [0]
        [state] = describe(runtime, "prod")
        assert state.admission is not None and state.admission.held_pages == 6 and state.admission.waiting == 1


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_cancelled_wait_leaves_nothing_claimed(kind: str) -> None:
    async def wait(m: AsyncPagedKVCacheManager) -> None:
        placed = await m.admit([context(name) for name in "abcd"])
        waiting = asyncio.ensure_future(m.admit([context("e")]))
        while m._admission is None or not m._admission._waiters or m._admission._offers:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await m.release("a", placed[0])
        [admission] = await m.try_admit([context("f")])
        assert admission.error is None, "e was not let in before it"
        both = asyncio.ensure_future(m.admit([context("g"), context("h")]))
        await asyncio.sleep(0)
        await m.release("b", placed[1])
        while await m.get_num_used_pages(placed[1]) < 6:
            await asyncio.sleep(0)
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        while await m.get_num_used_pages(placed[1]) > 3:
            await asyncio.sleep(0)
        assert not any([await m.contains(name, r) for name in "gh" for r in range(2)])
        await m.check_integrity()
        await m.shutdown()

    with session_on(FakeRuntime()) if kind == "ray" else InferenceSession() as session:
        asyncio.run(wait(AsyncPagedKVCacheManager(params(2), session, 8, max_batch_size=8, admission=POLICY)))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_those_who_wait_at_the_end_are_told(kind: str) -> None:
    async def wait(m: AsyncPagedKVCacheManager) -> None:
        await m.admit([context(name) for name in "abcd"])
        waiting = asyncio.ensure_future(m.admit([context("e")]))
        await asyncio.sleep(0)
        await m.shutdown()
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            await m.admit([context("f")])

    with session_on(FakeRuntime()) if kind == "ray" else InferenceSession() as session:
        asyncio.run(wait(AsyncPagedKVCacheManager(params(2), session, 8, max_batch_size=8, admission=POLICY)))
