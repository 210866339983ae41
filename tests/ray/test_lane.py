"""Fast lanes on a real cluster: the same results as calls, beside calls, and nothing left of them."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayk import InferenceSession, PagedKVCacheManager, ReplicaLostError, TextContext, Tick
from rayk import protocol as m
from rayk.actors import graph as life
from rayk.actors.channel import ActorChannel, new_client_id
from rayk.errors import RemoteError
from rayk.manager.calls import Calls
from rayk.manager.cluster_view import ClusterView

from .forwards import contents, params, pid, running, stamp, until, wait_for_file

SECONDS = 10.0
SEMAPHORES = Path("/dev/shm")
Batch = list[list[TextContext]]


@contextmanager
def manager_on(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    """Two replicas with lanes."""
    with PagedKVCacheManager(params(), session, 256, max_batch_size=16, fast_lane=True, replace=False) as manager:
        yield manager


@pytest.fixture
def manager(session: InferenceSession, caplog: pytest.LogCaptureFixture) -> Iterator[PagedKVCacheManager]:
    with manager_on(session) as manager:
        yield manager


@pytest.fixture(scope="module")
def shared_lanes(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    """For tests that break no lane and leave nothing claimed."""
    with manager_on(session) as manager:
        yield manager


def roster(manager: PagedKVCacheManager) -> ClusterView:
    assert isinstance(manager._calls, Calls)
    return manager._calls


def states(manager: PagedKVCacheManager) -> list[str]:
    return [each.state for each in manager.lane_states()]


def pids(manager: PagedKVCacheManager) -> list[int]:
    """Those of the replicas, once all lanes are open."""

    def found() -> list[int] | None:
        said = manager.execute([[], []], pid)
        return said if states(manager) == ["open"] * 2 else None

    opened: list[int] = until(found)
    return opened


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "fast lane" in r.getMessage()]


def semaphores() -> set[Path]:
    """Those of channels between processes."""
    return set(SEMAPHORES.glob("sem.hdr*")) | set(SEMAPHORES.glob("sem.obj*"))


def admit(manager: PagedKVCacheManager, name: str = "r", count: int = 4) -> Batch:
    """So many requests on each replica."""
    batches = [
        [TextContext(f"{name}{r}-{i}", range(40 * i, 40 * i + 20 + r), 200) for i in range(count)] for r in (0, 1)
    ]
    ctxs = [ctx for batch in batches for ctx in batch]
    admissions = manager.try_admit(ctxs, [r for r, batch in enumerate(batches) for _ in batch])
    assert [each.error for each in admissions] == [None] * len(ctxs)
    return batches


def iterate(manager: PagedKVCacheManager, batches: Batch, forward: Any = stamp) -> list[Any]:
    values = [result.value for result in manager.tick([Tick(alloc=b, execute=b) for b in batches], forward)]
    for batch in batches:
        for ctx in batch:
            ctx.update(len(ctx.tokens.all) % 97)
    manager.tick([Tick(step=b) for b in batches])
    return values


def release(manager: PagedKVCacheManager, batches: Batch) -> None:
    """And what is cached of them."""
    manager.tick([Tick(release=[ctx.request_id for ctx in batch]) for batch in batches])
    manager.reset_prefix_cache()


def story(manager: PagedKVCacheManager) -> list[Any]:
    """A decode loop in which requests come and go by calls, and all that can be seen of it."""
    first, seen = admit(manager), list[Any]()
    seen += [iterate(manager, first) for _ in range(10)]
    later = admit(manager, "later", 2)
    seen += [iterate(manager, [a + b for a, b in zip(first, later, strict=True)]) for _ in range(10)]
    for r, batch in enumerate(first):
        manager.release(batch.pop().request_id, r)
        assert not manager.contains(f"r{r}-3", r)
    manager.tick([Tick(release=[batch.pop().request_id]) for batch in first])
    manager.execute(first, stamp)
    both = [a + b for a, b in zip(first, later, strict=True)]
    seen += [iterate(manager, both) for _ in range(10)]
    for r, batch in enumerate(both):
        for ctx in batch:
            seen += [ctx.request_id, ctx.tokens.all.tolist(), manager.get_req_blocks(ctx.request_id, r)]
            seen.append(contents(manager, ctx.request_id, r, ctx.tokens.processed_length))
    seen += [manager.get_metrics_aggregated(), [manager.get_num_used_pages(r) for r in (0, 1)]]
    manager.check_integrity()
    release(manager, both)
    return seen


def test_tokens_pages_and_metrics_are_those_of_one_process(
    shared_lanes: PagedKVCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = shared_lanes
    pids(manager)
    manager.reset_metrics()
    before = [each.messages for each in manager.lane_states()]
    told = story(manager)
    went = [each.messages - b for each, b in zip(manager.lane_states(), before, strict=True)]
    assert went == [63, 63] and warnings(caplog) == []
    with PagedKVCacheManager(params(), InferenceSession(), 256, max_batch_size=16) as inline:
        assert story(inline) == told


def test_calls_of_others_meanwhile(shared_lanes: PagedKVCacheManager) -> None:
    """A lane's messages run on a thread of their own: calls of others must not see a cache half changed."""
    manager = shared_lanes
    batches = admit(manager)
    pids(manager)
    lines, ended, asked = roster(manager), threading.Event(), [0, 0]
    errors: list[BaseException] = []

    def look(replica: int) -> None:
        seat = lines.cluster.handles[replica]
        assert seat is not None
        name, runtime = new_client_id("other"), manager._session.ray
        link = ActorChannel(runtime, seat.actor, "it", seat.epoch, name, lambda reason: RuntimeError(reason))  # type: ignore[arg-type,return-value]
        try:
            while not ended.is_set():
                link.ask(m.CheckIntegrity())
                asked[replica] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look, args=(r,)) for r in (0, 1)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        iterate(manager, batches)
    until(lambda: errors or min(asked) >= 20)
    ended.set()
    for thread in threads:
        thread.join(SECONDS)
    release(manager, batches)
    assert not errors and states(manager) == ["open"] * 2


def test_long_answers_and_errors_of_forwards(shared_lanes: PagedKVCacheManager) -> None:
    manager = shared_lanes
    batches = admit(manager)
    pids(manager)

    def long(inputs: Any, batch: Any) -> bytes:
        return bytes(3_000_000)

    def wrong(inputs: Any, batch: Any) -> bytes:
        raise ValueError("not today")

    assert [len(value) for value in manager.execute(batches, long)] == [3_000_000] * 2
    with pytest.raises(RemoteError, match="not today"):
        manager.tick([Tick(execute=b) for b in batches], wrong)
    assert iterate(manager, batches) == [80, 84] and states(manager) == ["open"] * 2
    release(manager, batches)


def test_control_calls_are_answered_while_a_lane_computes(shared_lanes: PagedKVCacheManager, tmp_path: Path) -> None:
    manager = shared_lanes
    pids(manager)
    seat = roster(manager).cluster.handles[0]
    assert seat is not None
    before = manager.lane_states()[0].messages
    decoding = threading.Thread(target=manager.execute, args=([[], []], wait_for_file(str(tmp_path))))
    decoding.start()
    until(lambda: len(list(tmp_path.glob("*.runs"))) == 2)
    ray = manager._session.ray
    assert ray.get(seat.actor.call("ping", control=True), "it", SECONDS) == seat.epoch and decoding.is_alive()
    (tmp_path / "go").touch()
    decoding.join(SECONDS)
    assert manager.lane_states()[0] == (0, "open", "", before + 1)


def test_a_lane_rests_and_opens_again(
    shared_lanes: PagedKVCacheManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = shared_lanes
    replicas = pids(manager)
    monkeypatch.setattr(life, "REST_SECONDS", 0.1)
    until(lambda: states(manager) == ["resting"] * 2 and not life.living())
    monkeypatch.undo()
    assert pids(manager) == replicas and warnings(caplog) == []


def test_a_replica_is_killed_under_its_lane_and_replaced(
    shared_lanes: PagedKVCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = shared_lanes
    batches = admit(manager)
    replicas = pids(manager)
    victim = replicas[1]

    def die(inputs: Any, batch: Any) -> int:
        if os.getpid() == victim:
            os.kill(victim, signal.SIGKILL)
        return len(batch)

    started = time.monotonic()
    with pytest.raises(ReplicaLostError) as caught:
        manager.tick([Tick(execute=b) for b in batches], die)
    assert caught.value.replica == 1 and sorted(caught.value.requests) == [f"r1-{i}" for i in range(4)]
    assert time.monotonic() - started < SECONDS
    assert len(warnings(caplog)) == 1 and "replica 1" in warnings(caplog)[0]
    assert states(manager) == ["open", "closed"]
    with pytest.raises(ReplicaLostError):
        manager.step(batches)
    for _ in range(5):
        iterate(manager, [batches[0], []])
    assert states(manager) == ["open", "closed"]
    assert manager.add_replicas(1) == [1]
    assert pids(manager)[0] == replicas[0], "both lanes are open"
    release(manager, [batches[0], []])
    assert len(warnings(caplog)) == 1
    assert not [r for r in caplog.records if r.name.startswith("ray.") and r.levelno >= logging.ERROR]


def test_lanes_that_carry_nothing_hold_nobody_up(
    manager: PagedKVCacheManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Replica 0 has a graph already; another one compiles, and carries nothing. Replica 1 is as if it had stopped while
    it looks for messages: it holds a channel's semaphore then, and Ray waits for that without a limit."""
    seat, batches = roster(manager).cluster.handles[0], admit(manager)
    assert seat is not None
    other = manager._session.ray.open_lane(seat.actor, seat.bundle.node_id)
    until(lambda: other.open)
    before = semaphores()
    monkeypatch.setattr(life, "OPEN_SECONDS", 2.0)
    until(lambda: iterate(manager, batches) and states(manager) == ["closed", "open"])
    assert len(warnings(caplog)) == 1 and "replica 0" in warnings(caplog)[0]

    monkeypatch.setattr(life, "SEND_SECONDS", 0.5)
    held = [hold(path) for path in semaphores() - before if path.name.startswith("sem.hdr")]
    assert iterate(manager, batches) == [4, 4]
    assert states(manager) == ["closed"] * 2 and len(warnings(caplog)) == 2
    assert manager.lane_states()[1].reason == "the replica does not take what is sent"
    for let_go in held:
        let_go()
    assert iterate(manager, batches) == [4, 4] and len(warnings(caplog)) == 2

    other.close()
    replicas = manager.execute([[], []], pid)
    os.kill(replicas[0], signal.SIGSTOP)
    started = time.monotonic()
    manager.shutdown()
    assert time.monotonic() - started < 2 * SECONDS
    until(lambda: not running(replicas) and not life.living())


def hold(path: Path) -> Any:
    """Take a semaphore, as a process that is stopped does; what gives it back."""
    library = ctypes.CDLL(None)
    library.sem_open.restype = ctypes.c_void_p
    at = ctypes.c_void_p(library.sem_open(path.name.replace("sem.", "/").encode(), 0))
    assert at.value
    until(lambda: library.sem_trywait(at) == 0)
    return lambda: library.sem_post(at)


ENDS = """
import json, sys, threading, time
from pathlib import Path

from rayk import *
from rayk import protocol as m

p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 2,
                     data_parallel_degree=2)
SIGN = Path(sys.argv[1])

def busy(inputs, batch):  # until it is killed
    SIGN.touch()
    while True:
        time.sleep(.1)

def until(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(.01)

def say(what):
    print(json.dumps(what), flush=True)

started = InferenceSession(runtime="ray", address="local", num_cpus=2, object_store_memory=100_000_000)
joined = InferenceSession(runtime="ray")
manager = PagedKVCacheManager(p, joined, 16, max_batch_size=4, fast_lane=True)
calls = manager._calls
one, two = calls.link(0), calls.link(1)
execute = m.Execute([], started.ray.dumps(busy))
two.actor.call("handle", m.encode(m.ReplicaEnvelope("another", two.epoch, 1, execute, m.NOT_ASKED, False)))
until(SIGN.exists)
assert one.lane.send(b"") is two.lane.send(b"") is None
until(lambda: one.lane.state(0).state == "open")
seat = calls.cluster.handles[0]
third = joined.ray.open_lane(seat.actor, seat.bundle.node_id)
until(lambda: third._graph._graph is not None)
say([each.state for each in manager.lane_states()])
started.close()
say([t.name for t in threading.enumerate() if t.name == "rayk-lane"])
"""


def test_no_thread_is_in_a_lane_when_ray_is_shut_down(ray_tmpdir: Path, tmp_path: Path) -> None:
    """That would abort the process. One lane is open; one compiled and opens when that one is gone; one is to a replica
    that is busy for ever. The session that started Ray ends, and they are another session's."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_TMPDIR": str(ray_tmpdir)}
    command = [sys.executable, str(script), str(tmp_path / "sign")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == [["open", "opening"], []]
    assert "shutdown" not in done.stderr and "Traceback" not in done.stderr, done.stderr
