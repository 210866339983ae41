"""How long it takes to come back: `python tests/measure/recovery.py [KILLS [PART ..]]`.

Medians and the worst of so many kills (10), in seconds from the signal on, printed as the table of
docs/measurements/recovery.md; of all parts (replicas, scheduler, cluster), or of those that are named. A manager with
two replicas and one driver that asks as a caller would; a Cluster of two replicas with the example checkpoint, whose
streams are followed token by token.
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
from rayk.cli.example_model import write_example_model
from rayk.cluster import Cluster
from rayk.errors import RaykError

LOOK = 0.01  # seconds between two looks
PATIENCE = 60.0
STREAMS, LENGTH = 8, 400
PARTS = ["replicas", "scheduler", "cluster"]


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
        if "cluster" in parts:
            for name, seconds in _cluster(session, Path(folder), kills).items():
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


def _cluster(session: InferenceSession, folder: Path, kills: int) -> dict[str, list[float]]:
    model = folder / "model"
    write_example_model(model, steps=1)
    found: dict[str, list[float]] = {}
    with Cluster(model, session, replicas=2, page_size=16, pages=400, max_batch_size=8, device="cpu") as cluster:
        for _ in range(kills):
            for stop, what in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")):
                handles = cluster.submit_all(
                    [[5 + i, 7, 9] for i in range(STREAMS)], max_new_tokens=LENGTH, ignore_eos=True
                )
                _until(lambda: all(len(handle.tokens) > 4 for handle in handles))  # noqa: B023  # called here only
                doomed = handles[0].replica
                mine = [handle for handle in handles if handle.replica == doomed]
                process = _engine(cluster, doomed)
                before = [len(handle.tokens) for handle in mine]
                began = time.monotonic()
                os.kill(process, stop)
                _until(lambda: all(handle.replica != doomed for handle in mine))  # noqa: B023  # as above
                before = [len(handle.tokens) for handle in mine]
                on = _until(
                    lambda: all(h.done or len(h.tokens) > n for h, n in zip(mine, before, strict=True))  # noqa: B023
                )
                back = _until(lambda: cluster.replica_states() == ["ready", "ready"])
                found.setdefault(f"replica {what}, its streams go on elsewhere", []).append(on - began)
                found.setdefault(f"replica {what}, replaced and serving", []).append(back - began)
                for handle in handles:
                    handle.cancel()
                    handle.result(PATIENCE)
                _rest()
    return found


def _engine(cluster: Any, replica: int | None) -> int:
    """The process of that replica's engine."""
    import ray

    actor_id = cluster._replicas._placed[replica].actor.handle._actor_id.hex()
    return int(ray._private.state.actors(actor_id)["Pid"])  # type: ignore[attr-defined]  # no public name has a pid


def _rest() -> None:
    """A replacement that dies at once would be tried again later and later."""
    time.sleep(2.5)


if __name__ == "__main__":
    sys.exit(main())
