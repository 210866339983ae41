"""Processes that die under a manager: noticed within seconds, named, and everything can still be cleaned up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util import placement_group_table

from rayk import InferenceSession, PagedKVCacheManager, ReplicaLostError, TextContext, Tick
from rayk.actors import scale_out
from rayk.errors import PlanError, RaykError

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import BrokenReplica, params, pid, running, wait_for_file

NOTICED_SECONDS = 10.0


@pytest.fixture
def manager(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    """Two replicas of a test's own."""
    with PagedKVCacheManager(params(), session, 64, max_batch_size=8, replace=False) as manager:
        yield manager


def admit(manager: PagedKVCacheManager) -> tuple[TextContext, TextContext]:
    """Request a on replica 0, b and c on replica 1; a and b are returned."""
    a, b, c = (TextContext(name, range(20), 100) for name in "abc")
    assert [x.error for x in manager.try_admit([a, b, c], [0, 1, 1])] == [None] * 3
    return a, b


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run `call` in a thread; its result or error, and when it was there, are appended to the list."""
    ended: list[Any] = []

    def run() -> None:
        try:
            result: Any = call()
        except RaykError as error:
            result = error
        ended.extend((result, time.monotonic()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended


def actors(kind: str) -> set[int]:
    """Processes of this session's Ray that run that class."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{kind}"):
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.parametrize("call", ["execute", "tick"])
def test_a_replica_is_killed_while_it_computes(manager: PagedKVCacheManager, tmp_path: Path, call: str) -> None:
    a, b = admit(manager)
    pids = manager.execute([[], []], pid)
    epochs = manager._calls.cluster.epochs  # type: ignore[attr-defined]
    forward = wait_for_file(str(tmp_path))
    work = {
        "execute": lambda: manager.execute([[a], [b]], forward),
        "tick": lambda: manager.tick([Tick(execute=[a]), Tick(step=[b], execute=[b])], forward),
    }[call]
    thread, ended = in_background(work)
    until(lambda: len(list(tmp_path.glob("*.runs"))) == 2)
    killed = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    (tmp_path / "go").touch()  # the other one comes to its end
    thread.join(NOTICED_SECONDS + 5)
    assert ended, "it hangs"
    error, when = ended
    assert when - killed < NOTICED_SECONDS
    assert isinstance(error, ReplicaLostError)
    assert (error.replica, error.epoch, sorted(error.requests)) == (1, epochs[1], ["b", "c"])
    assert "replica 1" in str(error) and "'b'" in str(error) and "add_replicas()" in str(error)

    with pytest.raises(ReplicaLostError, match="replica 1"):
        manager.step([[a], [b]])
    with pytest.raises(ReplicaLostError, match="replica 1"):
        manager.claim("d", 1)
    assert manager.contains("a", 0) and manager.num_free_blocks(0) == 62, "the other one still answers"
    a.update(3)
    manager.alloc(a, 0)
    manager.step([[a], []])
    manager.release("a", 0)
    manager.claim("d", 0)
    started = time.monotonic()
    manager.shutdown()
    assert time.monotonic() - started < NOTICED_SECONDS
    until(lambda: not running(pids))


def test_a_replica_that_died_while_nobody_looked(manager: PagedKVCacheManager) -> None:
    a, b = admit(manager)
    [first, _] = manager.execute([[], []], pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: not running([first]))
    started = time.monotonic()
    for call in (
        lambda: manager.tick([Tick(step=[a]), Tick(step=[b])]),
        lambda: manager.alloc(TextContext("a", range(20), 100), 0),
        lambda: manager.get_req_blocks("a", 0),
    ):
        with pytest.raises(ReplicaLostError) as caught:
            call()
        assert caught.value.replica == 0 and caught.value.requests == ["a"]
    assert manager.get_metrics_aggregated().input_tokens == 40, "the other's"
    assert manager.check_integrity() == [0]
    batch = [TextContext(f"n{i}", range(9 * i, 9 * i + 5), 100) for i in range(4)]
    [there, lost] = manager.try_admit(batch[:2], [1, 0])
    assert there.error is None and isinstance(lost.error, ReplicaLostError)
    assert manager.admit(batch[1:]) == [1, 1, 1], "the router knows by now"
    assert time.monotonic() - started < NOTICED_SECONDS


def test_a_replica_that_cannot_start_leaves_nothing(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that was planned is gone by the time that its constructor asks for it."""
    monkeypatch.setattr(scale_out, "ReplicaActor", BrokenReplica)
    before = {kind: actors(kind) for kind in ("ReplicaActor", "SchedulerActor")}
    groups = created_groups()
    with pytest.raises(PlanError, match="replica 0 could not start"):
        PagedKVCacheManager(params(), session, 8, max_batch_size=4)
    until(lambda: all(actors(kind) <= there for kind, there in before.items()))  # those of tests before may go
    assert created_groups() == groups


def created_groups() -> list[str]:
    return sorted(i for i, group in placement_group_table().items() if group["state"] != "REMOVED")


def test_shutdown_leaves_no_actor_placement_or_process(session: InferenceSession) -> None:
    groups, before = created_groups(), {kind: actors(kind) for kind in ("ReplicaActor", "SchedulerActor")}
    alive = {i for i, actor in ray._private.state.actors().items() if actor["State"] != "DEAD"}
    manager = PagedKVCacheManager(params(3), session, 8, max_batch_size=4)
    pids = manager.execute([[], [], []], pid)
    assert len(actors("ReplicaActor") - before["ReplicaActor"]) == 3
    assert len(created_groups()) == len(groups) + 1
    manager.shutdown()
    assert {i for i, actor in ray._private.state.actors().items() if actor["State"] != "DEAD"} == alive
    assert created_groups() == groups
    until(lambda: not running(pids) and all(actors(kind) <= there for kind, there in before.items()))
