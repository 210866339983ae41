"""Calls that are left: cancelled, interrupted, late, dropped. Nothing of them stays behind. Large ones wait in line."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

import rayk.cluster
from rayk.cluster import Cluster
from rayk.dispatch.dispatcher import Dispatcher
from rayk.dispatch.output import Handle
from rayk.errors import ConfigError
from rayk.request_errors import RequestCancelledError
from rayk.scheduler.router.router import Router

from ..engine.fake import PageModel, expected  # noqa: TID252  # tests/ is no package
from .conftest import Gated, idle

# -- leaving ---------------------------------------------------------------------------------------------------


def agenerate(cluster: Cluster) -> None:
    async def run() -> None:
        async with asyncio.timeout(0.02):
            await cluster.agenerate([[i, 1] for i in range(30)], max_new_tokens=200)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def agenerate_in_a_task(cluster: Cluster) -> None:
    async def run() -> None:
        task = asyncio.create_task(cluster.agenerate([[i, 1] for i in range(30)], max_new_tokens=200))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def agenerate_in_a_loop_that_ends(cluster: Cluster) -> None:
    async def run() -> None:
        asyncio.create_task(cluster.agenerate([[i, 1] for i in range(30)], max_new_tokens=200))  # noqa: RUF006  # dropped
        await asyncio.sleep(0)

    asyncio.run(run())


def generate_interrupted(cluster: Cluster) -> None:
    def interrupted(self: Handle, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handle, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cluster.generate([[i, 1] for i in range(30)], max_new_tokens=200)


def submit_interrupted(cluster: Cluster) -> None:
    """In the middle of the placing: some have a place and were not sent."""
    place, left = Router.place, [5]

    def interrupted(self: Router, *given: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        place(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "place", interrupted)
        for call in (cluster.generate, cluster.submit_all):
            left[0] = 5
            with pytest.raises(KeyboardInterrupt):
                call([[i, 1] for i in range(30)], max_new_tokens=200)


def stream_left(cluster: Cluster) -> None:
    for _ in cluster.stream([[i, 1] for i in range(30)], max_new_tokens=200):
        break


def stream_dropped(cluster: Cluster) -> None:
    updates = cluster.stream([[i, 1] for i in range(30)], max_new_tokens=200)
    next(updates)
    del updates


def stream_in_a_cycle(cluster: Cluster) -> None:
    cycle: list[Any] = [cluster.stream([[i, 1] for i in range(30)], max_new_tokens=200)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()


def stream_never_begun(cluster: Cluster) -> None:
    cluster.stream([[i, 1] for i in range(30)], max_new_tokens=200)
    cluster.astream([[i, 1] for i in range(30)], max_new_tokens=200)


def astream_left(cluster: Cluster) -> None:
    async def run() -> None:
        async for _ in cluster.astream([[i, 1] for i in range(30)], max_new_tokens=200):
            break

    asyncio.run(run())


def astream_of_a_closed_loop(cluster: Cluster) -> None:
    """Nobody can run what an async generator has to do at its end."""
    loop = asyncio.new_event_loop()
    updates = cluster.astream([[i, 1] for i in range(30)], max_new_tokens=200)
    loop.run_until_complete(anext(updates))
    loop.close()
    del updates
    gc.collect()


def handles_cancelled(cluster: Cluster) -> None:
    for handle in cluster.submit_all([[i, 1] for i in range(30)], max_new_tokens=200):
        handle.cancel()
        handle.future.cancel()


def timed_out(cluster: Cluster) -> None:
    outputs = cluster.generate([[i, 1] for i in range(30)], max_new_tokens=200, timeout=0.02)
    assert {output.finish_reason for output in outputs} <= {"timeout", "length"}


@pytest.mark.parametrize(
    "leave",
    [
        agenerate,
        agenerate_in_a_task,
        agenerate_in_a_loop_that_ends,
        generate_interrupted,
        submit_interrupted,
        stream_left,
        stream_dropped,
        stream_in_a_cycle,
        stream_never_begun,
        astream_left,
        astream_of_a_closed_loop,
        handles_cancelled,
        timed_out,
    ],
)
def test_who_leaves_leaves_nothing_behind(cluster: Cluster, leave: Callable[[Cluster], None]) -> None:
    finished = [cluster.stats(replica).generated_tokens for replica in (0, 1)]
    leave(cluster)
    idle(cluster)
    made = sum(cluster.stats(replica).generated_tokens for replica in (0, 1)) - sum(finished)
    assert made < 30 * 200, "they were ended, and did not come to their end"
    assert cluster.generate([[1, 2]], max_new_tokens=5)[0].tokens == expected([1, 2], 5)


def test_leaving_while_the_dispatcher_is_busy(cluster: Cluster) -> None:
    """A generator that is collected in the thread that holds the lock, or while another one does."""
    dispatcher: Dispatcher = cluster._dispatcher
    for held_here in (True, False):
        updates = cluster.stream([[i, 1] for i in range(30)], max_new_tokens=200)
        next(updates)
        if held_here:
            with dispatcher._turn():
                updates.close()
        else:
            with dispatcher._lock:
                closing = threading.Thread(target=updates.close)
                closing.start()
                closing.join(20)
                assert not closing.is_alive()
        idle(cluster)


def test_a_closed_cluster_answers_who_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(lambda device: PageModel(), page_size=4, pages=64)
    monkeypatch.setattr(Cluster, "_check_open", lambda self: None)  # it was open when they looked
    cluster.close()
    assert isinstance(cluster.submit([1, 2]).result(5).error, RequestCancelledError)
    assert [output.finish_reason for output in cluster.generate([[1], [2]])] == ["cancelled", "cancelled"]


# -- many at once ------------------------------------------------------------------------------------------------


def test_a_large_call_is_sent_on_as_it_ends(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    monkeypatch.setattr(rayk.cluster, "AHEAD", 20)
    alive = 0

    def count(update: Any) -> Any:
        nonlocal alive
        alive = max(alive, len(cluster._dispatcher._handles))
        return update

    asked = [[i % 90, i % 7] for i in range(100)]
    found = [count(update).output for update in cluster.stream(asked, max_new_tokens=2) if update.output is not None]
    assert sorted(map(repr, found)) and len(found) == 100 and alive <= 40
    outputs = cluster.generate(asked, max_new_tokens=2)
    assert [output.tokens for output in outputs] == [expected(prompt, 2) for prompt in asked]
    assert asyncio.run(cluster.agenerate(asked, max_new_tokens=2))[99].tokens == expected(asked[99], 2)


def test_a_large_call_holds_up_no_other(cluster: Cluster) -> None:
    Gated.watermarks.clear()
    many = cluster.submit_all([[i % 90, i % 7] for i in range(2000)], max_new_tokens=2)
    one = cluster.submit([1, 2], max_new_tokens=2)
    Gated.watermarks.set()
    assert one.result(30).tokens == expected([1, 2], 2)
    assert sum(handle.done for handle in many) < 500
    cluster._dispatcher.cancel(*many)
    assert all(handle.result(20).finish_reason in ("length", "cancelled") for handle in many)


def test_handles_are_bounded(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    monkeypatch.setattr(rayk.cluster, "AT_ONCE", 10)
    with pytest.raises(ConfigError, match="11 prompts in one call, which takes 10"):
        cluster.submit_all([[1]] * 11)
