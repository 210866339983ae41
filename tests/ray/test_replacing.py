"""A manager's target on Ray: replicas that die, hang or are unfit are noticed and replaced though nobody calls."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rayk import InferenceSession, PagedKVCacheManager, TextContext
from rayk import protocol as m
from rayk.actors import scale_out
from rayk.errors import NotClaimedError, RaykError, RemoteError, ReplicaLostError
from rayk.scheduler.membership import State

from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import BrokenReplica, chain, contents, params, pid, running, stamp


@pytest.fixture(scope="module")
def manager(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    with PagedKVCacheManager(params(), session, 64, enable_runtime_checks=True, max_batch_size=8) as manager:
        yield manager


def states(manager: PagedKVCacheManager) -> list[str]:
    """Of the scheduler's own knowledge: no replica is asked anything."""
    calls: Any = manager._calls
    found = calls._runtime.get(calls.scheduler.actor.call("roster", control=True), "the scheduler", 10)
    return list(found.states)


def whole(manager: PagedKVCacheManager) -> None:
    until(lambda: states(manager) == ["ready", "ready"], 40)
    assert manager.replacements() == []


def hang(inputs: Any, batch: Any) -> None:
    """It waits for a lock that nobody releases."""
    import threading

    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=300)


def cuda_error(inputs: Any, batch: Any) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_killed_replica_is_noticed_and_replaced_though_nobody_calls(manager: PagedKVCacheManager) -> None:
    whole(manager)
    ctxs = [TextContext(name, range(20), 100) for name in "ab"]
    assert [a.error for a in manager.try_admit(ctxs, [0, 1])] == [None, None]
    pids = manager.execute([[], []], pid)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: states(manager)[1] != State.ready)
    assert time.monotonic() - began < scaled(5), "it takes a second where the cores are free"
    whole(manager)
    with pytest.raises((ReplicaLostError, NotClaimedError)):
        manager.alloc(ctxs[1], 1)
    assert [a.error for a in manager.try_admit([ctxs[1]], [1])] == [None], "at the same index, empty"
    assert manager.execute([[ctxs[0]], [ctxs[1]]], stamp) == [20, 20]
    assert contents(manager, "a", 0, 20) == contents(manager, "b", 1, 20) == chain(range(20))
    for r, ctx in enumerate(ctxs):
        manager.release(ctx.request_id, r)


def test_a_stopped_replica_is_taken_out_and_replaced(manager: PagedKVCacheManager) -> None:
    whole(manager)
    pids = manager.execute([[], []], pid)
    began = time.monotonic()
    os.kill(pids[0], signal.SIGSTOP)
    until(lambda: states(manager)[0] == State.silent, 15)
    noticed = time.monotonic() - began
    until(lambda: not running([pids[0]]), 15)
    assert 3.0 < noticed < 10
    whole(manager)
    assert pids[0] not in manager.execute([[], []], pid)


def test_an_unfit_replica_is_replaced(manager: PagedKVCacheManager) -> None:
    whole(manager)
    before = manager.execute([[], []], pid)
    with pytest.raises(RemoteError, match="illegal memory access"):
        manager.execute([[], []], cuda_error)
    until(lambda: not running(before))
    whole(manager)
    assert not set(before) & set(manager.execute([[], []], pid))


def test_work_that_hangs_is_told_from_work_that_takes_long(manager: PagedKVCacheManager) -> None:
    """Its process answers, and the scheduler says that nothing gets on; it goes on waiting for a caller's function."""
    whole(manager)
    calls: Any = manager._calls
    link = calls.link(1)
    for forward, silent in ((compute, False), (hang, True)):
        sent = link.send(m.Execute([], calls._runtime.dumps(forward)))
        end = time.monotonic() + 7
        seen = set()
        while time.monotonic() < end:
            seen.add(states(manager)[1])
            time.sleep(0.1)
        assert (State.silent in seen) == silent
        if not silent:
            sent.wait()
    os.kill(calls.replica_pids()[1], signal.SIGKILL)
    whole(manager)


def compute(inputs: Any, batch: Any) -> int:
    end = time.monotonic() + 7
    while time.monotonic() < end:
        sum(range(10_000))
    return 1


def test_what_cannot_be_started_is_given_up_with_its_reason(session: InferenceSession) -> None:
    with PagedKVCacheManager(params(), session, 64, max_batch_size=8) as manager:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scale_out, "ReplicaActor", BrokenReplica)
            os.kill(manager.execute([[], []], pid)[1], signal.SIGKILL)
            until(lambda: any(each.failures for each in manager.replacements()), 60)
        [told] = manager.replacements()
        assert told.replica == 1 and "could not start" in told.reason
        whole(manager)
        with pytest.raises(RaykError):
            manager.get_req_blocks("never", 7)
