"""AsyncPagedKVCacheManager: same results as the manager, and what is called together travels together."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rayk import AdmissionPolicy, AsyncPagedKVCacheManager, InferenceSession, PagedKVCacheManager, TextContext
from rayk.errors import (
    AlreadyClaimedError,
    BatchError,
    InsufficientBlocksError,
    NotClaimedError,
    OverloadedError,
    ReplicaIndexError,
)
from rayk.kvcache.tick import Tick

from ..actors.fake import FakeRuntime, contents, params, session_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

RUNTIMES = ["inline", "ray"]


def context(request_id: str, tokens: int = 9) -> TextContext:
    return TextContext(request_id, range(len(request_id), len(request_id) + tokens), 1000)


@contextmanager
def manager_of(
    kind: str, runtime: FakeRuntime | None = None, pages: int = 16, **options: Any
) -> Iterator[AsyncPagedKVCacheManager]:
    with session_on(runtime or FakeRuntime()) if kind == "ray" else InferenceSession() as session:
        yield AsyncPagedKVCacheManager(
            params(2), session, pages, enable_runtime_checks=True, max_batch_size=8, **options
        )


@pytest.mark.parametrize("name", [name for name in vars(AsyncPagedKVCacheManager) if not name.startswith("_")])
def test_calls_are_those_of_the_manager(name: str) -> None:
    """As help() and an editor show them."""
    call, blocking = getattr(AsyncPagedKVCacheManager, name), getattr(PagedKVCacheManager, name)
    assert call.__doc__
    if callable(call):
        assert inspect.signature(call) == inspect.signature(blocking)
        assert inspect.iscoroutinefunction(call) == (name not in ("holder", "get_device_buffer"))
        assert call.__qualname__ == f"AsyncPagedKVCacheManager.{name}"


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_life(kind: str) -> None:
    async def life(m: AsyncPagedKVCacheManager) -> None:
        a, b = context("a"), context("bb")
        await m.claim("a", 1)
        assert await m.contains("a", 1) and not await m.contains("a", 0)
        await m.alloc(a, 1)
        assert await m.admit([b]) == [0]
        assert await m.execute([[b], [a]], stamp) == [9, 9]
        inputs = await m.runtime_inputs([[b], [a]])
        assert [len(each.shards[0].lookup_table) for each in inputs] == [1, 1]
        for ctx in (a, b):
            ctx.update(7)
        await m.step([[b], [a]])
        assert await m.num_free_blocks(0) + await m.get_num_used_pages(0) == await m.total_num_blocks(0) == 16
        blocks = await m.get_req_blocks("a", 1)
        [pages] = await m.read_pages(blocks, 1)
        assert len(pages) == len(blocks)
        assert contents(m.sync, "a", 1, 9)
        [_, result] = await m.tick([Tick(), Tick(release=["a"])])
        assert result.released == 1
        await m.release("bb", 0)
        again = context("a")
        assert [c.device_blocks for c in await m.get_prefix_cache_hit_counts(again)] == [0, 2]
        assert (await m.get_metrics_aggregated()).input_tokens == 18
        assert await m.get_pct_used_blocks_after_allocation(again, 1) == pytest.approx(3 / 16)
        await m.alloc_dummy("pad", 0)
        assert await m.get_req_blocks("pad", 0) == [16]
        await m.release("pad", 0)
        await m.reset_metrics()
        await m.reset_prefix_cache()
        await m.check_integrity()

    with manager_of(kind) as manager:
        asyncio.run(life(manager))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_errors_are_those_of_the_manager(kind: str) -> None:
    async def errors(m: AsyncPagedKVCacheManager) -> None:
        await m.claim("a", 1)
        for call, error in (
            (m.claim("a", 0), AlreadyClaimedError),
            (m.claim("b", 2), ReplicaIndexError),
            (m.release("b", 0), NotClaimedError),
            (m.release("a", 0), NotClaimedError),
            (m.alloc(context("a"), 0), NotClaimedError),
        ):
            with pytest.raises(error):
                await call
        await m.release("a", 1)

    with manager_of(kind) as manager:
        asyncio.run(errors(manager))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_each_admission_stands_for_itself(kind: str) -> None:
    """Of calls that travel together one is refused: the others are not, and its own requests are all given back."""

    async def admissions(m: AsyncPagedKVCacheManager) -> list[Any]:
        small = [context(f"small-{i}") for i in range(3)]
        big, beside = context("big", 500), context("beside")
        results = await asyncio.gather(
            m.admit([small[0]]), m.admit([beside, big]), m.admit(small[1:]), return_exceptions=True
        )
        assert isinstance(results[1], InsufficientBlocksError)
        assert (beside.tokens.processed, beside.cached_prefix_length) == (0, None)
        assert not any([await m.contains("beside", r) for r in range(2)])
        await asyncio.gather(
            m.release("small-0", results[0][0]), *(m.release(f"small-{i}", results[2][i - 1]) for i in (1, 2))
        )
        assert [await m.get_num_used_pages(r) for r in range(2)] == [0, 0]
        return results

    with manager_of(kind) as manager:
        asyncio.run(admissions(manager))


def test_calls_of_one_turn_travel_together() -> None:
    runtime = FakeRuntime()

    async def calls(m: AsyncPagedKVCacheManager) -> None:
        ctxs = [context(f"r{i}") for i in range(6)]
        with runtime.watch() as sent:
            replicas = [r for [r] in await asyncio.gather(*(m.admit([ctx]) for ctx in ctxs))]
        assert [what for what in sent if what[0] == "scheduler"] == [("scheduler", "PlaceMany")]
        assert sorted(what for what in sent if what[1] == "Admit") == [("replica-0", "Admit"), ("replica-1", "Admit")]
        for ctx in ctxs:
            ctx.update(1)
        batches = [[[c], []] if r == 0 else [[], [c]] for c, r in zip(ctxs, replicas, strict=True)]
        with runtime.watch() as sent:
            await asyncio.gather(*(m.step(each) for each in batches))
        assert sorted(sent) == [("replica-0", "Step"), ("replica-1", "Step")]
        with runtime.watch() as sent:
            await asyncio.gather(*(m.release(c.request_id, r) for c, r in zip(ctxs, replicas, strict=True)))
        assert sorted(sent) == [("replica-0", "Release"), ("replica-1", "Release")]

    with manager_of("ray", runtime) as manager:
        asyncio.run(calls(manager))


POLICIES = {"no policy": {}, "policy": {"admission": AdmissionPolicy()}}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_cancelled_admission_leaves_nothing_claimed(kind: str, policy: str) -> None:
    """Wherever it is cancelled: the ids are nobody's at once, and can be used again at once."""

    async def cancelled(m: AsyncPagedKVCacheManager) -> None:
        loop, caught = asyncio.get_running_loop(), 0
        for turns in range(14):
            for targets in (None, [1, 0]):
                ctxs = [context(f"a{turns}"), context(f"bb{turns}")]
                task = loop.create_task(m.try_admit(ctxs, targets))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if task.done():
                    for ctx, admission in zip(ctxs, task.result(), strict=True):
                        await m.release(ctx.request_id, admission.replica)
                    continue
                task.cancel()
                caught += 1
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert [m.holder(ctx.request_id) for ctx in ctxs] == [None, None]
                again = await m.admit(ctxs)
                assert sorted(again) == [0, 1]
                await m.execute([[c for c, r in zip(ctxs, again, strict=True) if r == at] for at in (0, 1)], stamp)
                for ctx, replica in zip(ctxs, again, strict=True):
                    assert contents(m.sync, ctx.request_id, replica, 9)
                    await m.release(ctx.request_id, replica)
        assert caught > 4
        while m._undoing:
            await asyncio.sleep(0)
        assert [await m.get_num_used_pages(r) for r in range(2)] == [0, 0]
        await m.check_integrity()

    with manager_of(kind, **POLICIES[policy]) as manager:
        asyncio.run(cancelled(manager))


@pytest.mark.parametrize("name", ["claim", "alloc_dummy"])
def test_a_cancelled_claim_leaves_nothing_claimed(name: str) -> None:
    async def cancelled(m: AsyncPagedKVCacheManager) -> None:
        for turns in range(1, 8):
            task = asyncio.get_running_loop().create_task(getattr(m, name)("r", 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            if not task.cancel():
                await m.release("r", 1)
                continue
            with pytest.raises(asyncio.CancelledError):
                await task
            assert m.holder("r") is None
            await m.claim("r", 0)
            await m.release("r", 0)
        await m.check_integrity()

    with manager_of("ray") as manager:
        asyncio.run(cancelled(manager))


def test_any_other_cancelled_call_is_carried_out() -> None:
    async def cancelled(m: AsyncPagedKVCacheManager) -> None:
        ctx = context("r")
        assert await m.admit([ctx]) == [0]
        for call in (m.execute([[ctx], []], stamp), m.release("r", 0)):
            task = asyncio.get_running_loop().create_task(call)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await m.shutdown()
        assert m.sync._calls.holder("r") is None

    with manager_of("ray") as manager:
        asyncio.run(cancelled(manager))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_what_no_message_can_carry_fails_alone(kind: str) -> None:
    """Of admissions of one turn, one says what cannot be written."""

    async def admissions(m: AsyncPagedKVCacheManager) -> None:
        ctxs = [context(f"r{i}") for i in range(5)]
        ctxs[2].root_key = ("\ud800", None)
        results = await asyncio.gather(*(m.admit([ctx]) for ctx in ctxs), return_exceptions=True)
        assert isinstance(results[2], BatchError) and "'r2' cannot be sent" in str(results[2])
        others = [(ctx, result) for ctx, result in zip(ctxs, results, strict=True) if ctx is not ctxs[2]]
        assert [m.holder(ctx.request_id) for ctx in ctxs] == [r[0] if isinstance(r, list) else None for r in results]
        for ctx, result in others:
            assert isinstance(result, list)
            await m.release(ctx.request_id, result[0])
        assert [await m.get_num_used_pages(r) for r in range(2)] == [0, 0]

    with manager_of(kind) as manager:
        asyncio.run(admissions(manager))


def test_a_step_that_fails_fails_alone() -> None:
    async def steps(m: AsyncPagedKVCacheManager) -> None:
        good, stranger = context("good"), context("stranger")
        [replica] = await m.admit([good])
        good.update(1)
        mine = [[good] if r == replica else [] for r in range(2)]
        results = await asyncio.gather(m.step(mine), m.step([[stranger], []]), return_exceptions=True)
        assert results[0] is None and isinstance(results[1], NotClaimedError)
        await m.release("good", replica)

    with manager_of("ray") as manager:
        asyncio.run(steps(manager))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_with_a_policy_requests_wait_for_room_in_their_order(kind: str) -> None:
    """Two replicas of 8 pages; each request takes 3, so four are in, and the others wait for them."""

    async def serve(m: AsyncPagedKVCacheManager) -> None:
        order: list[str] = []

        async def one(name: str, priority: int) -> None:
            ctx = TextContext(name, range(ord(name), ord(name) + 9), 100, priority=priority)
            [replica] = await m.admit([ctx])
            order.append(name)
            await asyncio.sleep(0)
            await m.release(name, replica)

        await asyncio.gather(*(one(name, int(name in "hij")) for name in "abcdefghij"))
        assert "".join(order) == "abcdhijefg", "the first find room, then priority counts"
        assert [await m.get_num_used_pages(r) for r in range(2)] == [0, 0]
        await m.shutdown()

    policy = AdmissionPolicy(high=0.75, low=0.75)
    with manager_of(kind, pages=8, admission=policy) as manager:
        asyncio.run(serve(manager))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_with_a_policy_too_many_are_turned_away(kind: str) -> None:
    async def serve(m: AsyncPagedKVCacheManager) -> None:
        ctxs = [TextContext(f"r{i}", range(20 * i, 20 * i + 9), 100) for i in range(12)]

        async def one(ctx: TextContext) -> Any:
            [admission] = await m.try_admit([ctx])
            if admission.error is None:
                await m.release(ctx.request_id, admission.replica)
            return admission.error

        errors = await asyncio.gather(*map(one, ctxs))
        refused = [error for error in errors if error is not None]
        assert len(refused) == 2, "four find room and six may wait"
        assert all(isinstance(error, OverloadedError) and error.retry_after > 0 for error in refused)
        assert [await m.get_num_used_pages(r) for r in range(2)] == [0, 0]
        await m.shutdown()

    policy = AdmissionPolicy(max_waiting=6, high=0.75, low=0.75)
    with manager_of(kind, pages=8, admission=policy) as manager:
        asyncio.run(serve(manager))
