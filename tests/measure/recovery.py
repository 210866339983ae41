"""How long it takes to come back: `python tests/measure/recovery.py [KILLS [PART ..]]`.

Medians and the worst of so many kills (10), in seconds from the signal on, printed as the table of
docs/measurements/recovery.md; of all parts, or of those that are named. A manager with two replicas and one driver
that asks as a caller would (replicas, scheduler), and one with a name, of which another driver is killed (driver); a
Cluster of two replicas with the example checkpoint, whose streams are followed token by token (cluster); one with a
name, whose scheduler is killed (named); one on two simulated nodes, of which one is killed (node).
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rayk import InferenceSession, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk.bench.chaos.neighbour import Neighbour
from rayk.bench.chaos.nodes import simulated_nodes
from rayk.bench.chaos.targets import ClusterTarget
from rayk.bench.settings import BenchSettings
from rayk.cli.example_model import write_example_model
from rayk.cluster import Cluster
from rayk.dispatch.output import Handle
from rayk.errors import RaykError
from rayk.manager.lease import LEASE_SECONDS

LOOK = 0.01  # seconds between two looks
PATIENCE = 60.0
STREAMS, LENGTH = 8, 400
SHAPE: dict[str, Any] = {"replicas": 2, "page_size": 16, "pages": 400, "max_batch_size": 8, "device": "cpu"}
PARTS = ["replicas", "scheduler", "driver", "cluster", "named", "node"]


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    arguments = sys.argv[1:] if argv is None else argv
    kills, parts = int(arguments[0]) if arguments else 10, arguments[1:] or PARTS
    what = f"Python {platform.python_version()}, Ray {version('ray')}, {psutil.cpu_count()} cores"
    with (
        InferenceSession(runtime="ray", address="local", log_to_driver=False) as session,
        tempfile.TemporaryDirectory() as folder,
    ):
        print(f"{datetime.now(UTC):%Y-%m-%d}, {what}, load {_load()} at the start\n")
        print("| fault, and what came back | kills | median, s | worst, s |")
        print("|---|---:|---:|---:|", flush=True)
        if {"replicas", "scheduler"} & set(parts):
            for name, seconds in _manager(session, kills, parts).items():
                _show(f"manager: {name}", seconds)
        if "driver" in parts:
            for name, seconds in _driver(session, kills).items():
                _show(f"manager: {name}", seconds)
        model = Path(folder) / "model"
        write_example_model(model, steps=1)
        for part, measure in {"cluster": _cluster, "named": _named, "node": _node}.items():
            if part in parts:
                for name, seconds in measure(session, model, kills).items():
                    _show(f"Cluster: {name}", seconds)
        print(f"\nload {_load()} at the end")
    return 0


def _show(name: str, seconds: list[float]) -> None:
    row = f"{len(seconds)} | {statistics.median(seconds):.2f} | {max(seconds):.2f}"
    print(f"| {name} | {row} |", flush=True)


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def _until(condition: Callable[[], Any]) -> float:
    """Seconds (monotonic) at which it was true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came back within {PATIENCE:.0f} s")
        time.sleep(LOOK)
    return time.monotonic()


def _manager(session: InferenceSession, kills: int, parts: Sequence[str]) -> dict[str, list[float]]:
    params = MHAKVCacheParams(
        dtype="float32",
        head_dim=4,
        num_layers=1,
        n_kv_heads=1,
        page_size=16,
        enable_prefix_caching=True,
        data_parallel_degree=2,
        devices=["cpu", "cpu"],
    )
    found: dict[str, list[float]] = {}
    with PagedKVCacheManager(params, session, 256, max_batch_size=16) as manager:
        calls: Any = manager._calls
        names = iter(range(1 << 30))

        def states() -> list[str]:
            roster = calls.scheduler.actor.call("roster", control=True)
            return list(calls._runtime.get(roster, "the scheduler", PATIENCE).states)

        def serves(replica: int) -> bool:
            name = f"probe{next(names)}"
            try:
                [admission] = manager.try_admit([TextContext(name, range(9), 60)], [replica])
                if admission.error is None:
                    manager.release(name, replica)
                return admission.error is None
            except RaykError:
                return False

        for at in range(kills if "replicas" in parts else 0):
            for stop, what in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")):
                replica = at % 2
                began = time.monotonic()
                os.kill(calls.replica_pids()[replica], stop)
                noticed = _until(lambda r=replica: states()[r] != "ready")  # type: ignore[misc]  # mypy does not infer defaults
                gone = _until(lambda r=replica: states()[r] not in ("ready", "silent"))  # type: ignore[misc]  # as above
                back = _until(lambda r=replica: states()[r] == "ready" and serves(r))  # type: ignore[misc]  # as above
                found.setdefault(f"replica {what}, noticed though nobody calls", []).append(noticed - began)
                if stop == signal.SIGSTOP:
                    found.setdefault("replica stopped, ended", []).append(gone - began)
                found.setdefault(f"replica {what}, replaced and serving", []).append(back - began)
                _rest()
        for _ in range(kills if "scheduler" in parts else 0):
            process = calls.scheduler_pid()
            began = time.monotonic()
            os.kill(process, signal.SIGKILL)
            name = f"claim{next(names)}"
            manager.claim(name, 0)
            found.setdefault("scheduler killed, first claim answered", []).append(time.monotonic() - began)
            manager.release(name, 0)
            _rest()
    return found


def _streams(cluster: Cluster, length: int = LENGTH) -> list[Handle]:
    """Streams that all have begun."""
    prompts = [[5 + i, 7, 9] for i in range(STREAMS)]
    handles = cluster.submit_all(prompts, max_new_tokens=length, ignore_eos=True)
    _until(lambda: all(len(handle.tokens) > 4 for handle in handles))
    return handles


def _go_on(handles: Sequence[Handle], gone: Sequence[int]) -> float:
    """Seconds (monotonic) at which all of them had a token of another replica than those that are gone."""
    _until(lambda: all(handle.replica not in gone for handle in handles))
    before = [len(handle.tokens) for handle in handles]
    return _until(lambda: all(h.done or len(h.tokens) > n for h, n in zip(handles, before, strict=True)))


def _end(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.cancel()
        handle.result(PATIENCE)


def _cluster(session: InferenceSession, model: Path, kills: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with Cluster(model, session, **SHAPE) as cluster:
        for _ in range(kills):
            for stop, what in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")):
                handles = _streams(cluster)
                doomed = handles[0].replica
                assert doomed is not None
                mine = [handle for handle in handles if handle.replica == doomed]
                began = time.monotonic()
                os.kill(cluster.facts[doomed].pid, stop)
                on = _go_on(mine, [doomed])
                back = _until(lambda: cluster.replica_states() == ["ready", "ready"])
                found.setdefault(f"replica {what}, its streams go on elsewhere", []).append(on - began)
                found.setdefault(f"replica {what}, replaced and serving", []).append(back - began)
                _end(handles)
                _rest()
    return found


def _named(session: InferenceSession, model: Path, kills: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with InferenceSession("ray", name="measured") as named, Cluster(model, named, **SHAPE) as cluster:
        target = ClusterTarget(cluster)
        for _ in range(kills):
            handles = _streams(cluster, 3 * LENGTH)
            seen, pause = {handle: (0, time.monotonic()) for handle in handles}, 0.0
            process = target.scheduler()
            assert process is not None
            began = time.monotonic()
            os.kill(process, signal.SIGKILL)
            [first] = cluster.submit_all([[7, 7]], max_new_tokens=1)
            while not first.done:
                for handle, (count, since) in list(seen.items()):
                    now, here = time.monotonic(), len(handle.tokens)
                    pause = max(pause, now - since) if not handle.done else pause
                    seen[handle] = (here, now if here > count else since)
                time.sleep(LOOK)
            assert first.result().error is None and not all(handle.done for handle in handles)
            found.setdefault("scheduler killed, first request answered", []).append(time.monotonic() - began)
            found.setdefault("scheduler killed, longest pause of a stream until then", []).append(pause)
            _end(handles)
            _rest()
        cluster.shutdown(force=True)
    return found


def _driver(session: InferenceSession, kills: int) -> dict[str, list[float]]:
    """Another driver of a manager, which always has claims, or is about to have some."""
    settings = BenchSettings(replicas=2, layers=1, kv_heads=1, head_dim=4, pages=256)
    found: list[float] = []
    with (
        InferenceSession("ray", name="shared") as named,
        PagedKVCacheManager(
            settings.params(), named, settings.pages, settings.host_pages, **settings.manager_options()
        ) as manager,
    ):

        def used() -> int:
            return sum(manager.get_num_used_pages(r) for r in range(2))

        while len(found) < kills:
            other = Neighbour(settings, session.ray.joins_at(), "shared")
            assert other.up.wait(PATIENCE)
            _until(used)
            began = time.monotonic()
            other.kill()
            if used():
                found.append(_until(lambda: not used()) - began)
        manager.shutdown(force=True)
    return {f"driver killed, its pages are back (a lease of {LEASE_SECONDS:g} s)": found}


def _node(session: InferenceSession, model: Path, kills: int) -> dict[str, list[float]]:
    """A Cluster for each, so that a replica is on either node."""
    found: dict[str, list[float]] = {}
    [head] = session.ray.nodes()
    for _ in range(kills):
        with simulated_nodes(1, session.ray.joins_at()) as nodes:
            _until(lambda: len(session.ray.nodes()) == 2)
            with Cluster(model, session, **SHAPE) as cluster:
                placed: Any = cluster._replicas
                [doomed] = [r for r, each in placed._placed.items() if each.bundle.node_id != head.node_id]
                handles = _streams(cluster)
                mine = [handle for handle in handles if handle.replica == doomed]
                began = time.monotonic()
                nodes.kill(0)
                found.setdefault("node killed, its streams go on elsewhere", []).append(_go_on(mine, [doomed]) - began)
                back = _until(lambda: cluster.replica_states() == ["ready", "ready"])
                found.setdefault("node killed, replaced on another and serving", []).append(back - began)
                _end(handles)
            _until(lambda: len(session.ray.nodes()) == 1)
    return found


def _rest() -> None:
    """A replacement that dies at once would be tried again later and later."""
    time.sleep(2.5)


if __name__ == "__main__":
    sys.exit(main())
