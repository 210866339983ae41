"""A scheduler that is killed begins anew: claims are there, calls made meanwhile wait and succeed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from rayk import AsyncPagedKVCacheManager, InferenceSession, PagedKVCacheManager, TextContext
from rayk.actors.interface import ActorGoneError
from rayk.errors import AlreadyClaimedError, RaykError
from rayk.protocol.admission import AdmissionPolicy

from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import chain, contents, params, pid, running, stamp


@pytest.fixture(scope="module")
def manager(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    with PagedKVCacheManager(params(), session, 64, enable_runtime_checks=True, max_batch_size=16) as manager:
        yield manager
        manager.check_integrity()


def kill_scheduler(manager: PagedKVCacheManager) -> int:
    calls: Any = manager._calls
    process: int = calls.scheduler_pid()
    os.kill(process, signal.SIGKILL)
    until(lambda: not running([process]))
    return process


def serve(manager: PagedKVCacheManager, ctx: TextContext, replica: int, tokens: int) -> None:
    batches = [[ctx] if r == replica else [] for r in range(manager.num_replicas)]
    for _ in range(tokens):
        manager.alloc(ctx, replica)
        manager.execute(batches, stamp)
        ctx.update(7)
        manager.step(batches)


def test_claims_are_there_and_the_next_call_succeeds(manager: PagedKVCacheManager) -> None:
    ctxs = [TextContext(name, range(20 * i, 20 * i + 20), 200) for i, name in enumerate("ab")]
    assert [a.error for a in manager.try_admit(ctxs, [0, 1])] == [None, None]
    for r, ctx in enumerate(ctxs):
        serve(manager, ctx, r, 2)
    pids = manager.execute([[], []], pid)
    first = kill_scheduler(manager)
    manager.claim("next", 0)
    calls: Any = manager._calls
    assert calls.scheduler_pid() != first and manager.execute([[], []], pid) == pids, "replicas go on as they are"
    until(lambda: calls.scheduler.path(-1).kind != "calls")  # its new process listens, too
    assert [manager.holder(name) for name in "ab"] == [0, 1]
    for name, r in (("a", 0), ("b", 1), ("next", 0)):
        with pytest.raises(AlreadyClaimedError):
            manager.claim(name, 1 - r)
    for r, ctx in enumerate(ctxs):
        serve(manager, ctx, r, 20)  # also what needs another page
        length = ctx.tokens.length - 1
        assert contents(manager, ctx.request_id, r, length) == chain(ctx.tokens.all.tolist()[:length])
    again = TextContext("again", [*range(20), 7, 7, 1], 200)
    [admission] = manager.try_admit([again], [1])
    assert admission.error is None and admission.peer_tokens == 16, "it learned anew what replicas have cached"
    for name, r in (("a", 0), ("b", 1), ("next", 0), ("again", 1)):
        manager.release(name, r)
    assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0]


def test_one_that_hangs_is_ended_and_begins_anew(manager: PagedKVCacheManager) -> None:
    manager.claim("held", 1)
    calls: Any = manager._calls
    process: int = calls.scheduler_pid()
    os.kill(process, signal.SIGSTOP)
    began = time.monotonic()
    [admission] = manager.try_admit([TextContext("meanwhile", range(20), 100)], [0])
    assert admission.error is None and time.monotonic() - began < 20, "not after 30 s"
    assert calls.scheduler_pid() != process and manager.holder("held") == 1 and manager.contains("held", 1)
    until(lambda: not running([process]))
    manager.release("held", 1)
    manager.release("meanwhile", 0)


def test_it_may_be_killed_again_and_again_while_requests_come(manager: PagedKVCacheManager) -> None:
    """Whenever it dies in a call, that is carried out once."""
    over = threading.Event()

    def kill() -> None:
        calls: Any = manager._calls
        handle, runtime = calls.scheduler.actor, calls._runtime
        killed = 0
        while killed < 3:
            time.sleep(0.3)
            with suppress(ActorGoneError, RaykError):  # it is away
                os.kill(runtime.get(handle.call("pid", control=True), "the scheduler", 20), signal.SIGKILL)
                killed += 1
        over.set()

    killer = threading.Thread(target=kill)
    killer.start()
    rounds = 0
    while not over.is_set() or rounds < 5:
        batch = [TextContext(f"r{rounds}-{i}", [rounds * 50 + i * 7 + k for k in range(17)], 100) for i in range(6)]
        admissions = manager.try_admit(batch)
        assert [a.error for a in admissions] == [None] * 6
        for ctx, admission in zip(batch, admissions, strict=True):
            assert manager.contains(ctx.request_id, admission.replica)
            manager.release(ctx.request_id, admission.replica)
        rounds += 1
    killer.join(60)
    assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0], "nothing was placed twice"


def test_what_was_added_before_is_known_after(manager: PagedKVCacheManager) -> None:
    assert manager.add_replicas() == [2]
    manager.drain_replica(1)
    kill_scheduler(manager)
    assert manager.replica_states() == ["ready", "draining", "ready"]
    manager.claim("there", 2)
    manager.release("there", 2)
    manager.resume_replica(1)
    kill_scheduler(manager)
    doomed = manager.execute([[], [], []], pid)[2]
    os.kill(doomed, signal.SIGKILL)
    until(lambda: manager.replica_states() != ["ready"] * 3)
    until(lambda: manager.replica_states() == ["ready"] * 3, 60)  # the target outlived it, too
    manager.remove_replica(2)
    kill_scheduler(manager)
    assert manager.replica_states() == ["ready", "ready", "removed"]


def test_requests_that_wait_keep_their_places(session: InferenceSession) -> None:
    policy = AdmissionPolicy(max_running=1)
    with PagedKVCacheManager(params(1), session, 64, max_batch_size=8, admission=policy) as manager:
        ctxs = [TextContext(f"w{i}", range(9 * i, 9 * i + 9), 60) for i in range(4)]
        [(first, admission)] = manager.enter(ctxs)
        assert first is ctxs[0] and admission.error is None
        kill_scheduler(manager)
        for at in (1, 2, 3):
            manager.release(ctxs[at - 1].request_id, 0)
            [(ctx, admission)] = until(manager.enter)
            assert ctx is ctxs[at] and admission.error is None
        manager.release("w3", 0)


def test_calls_of_an_event_loop_wait_for_it_together(session: InferenceSession) -> None:
    async def run() -> None:
        manager = AsyncPagedKVCacheManager(params(), session, 64, max_batch_size=16)
        try:
            kill_scheduler(manager.sync)
            names = [f"e{i}" for i in range(12)]
            began = time.monotonic()
            await asyncio.gather(*(manager.claim(name, i % 2) for i, name in enumerate(names)))
            assert time.monotonic() - began < scaled(30)
            assert all([await manager.contains(name, i % 2) for i, name in enumerate(names)])
            results = await asyncio.gather(*(manager.claim(name, 0) for name in names), return_exceptions=True)
            assert all(isinstance(each, AlreadyClaimedError) for each in results), "each was made once"
            await asyncio.gather(*(manager.release(name, i % 2) for i, name in enumerate(names)))
        finally:
            await manager.shutdown()

    asyncio.run(run())


def test_one_that_is_gone_for_good_says_so(session: InferenceSession) -> None:
    manager = PagedKVCacheManager(params(1), session, 64, max_batch_size=8)
    calls: Any = manager._calls
    calls._runtime.stop([calls.scheduler.actor], None)

    def refused() -> bool:
        """Its process may live for a moment, and answer."""
        try:
            manager.claim("x", 0)
        except RaykError as error:
            return "the scheduler is gone" in str(error)
        manager.release("x", 0)
        return False

    until(refused, 10)
    manager.shutdown()
