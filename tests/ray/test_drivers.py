"""Drivers that come and go, or are killed, on a cluster that somebody else started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .forwards import running, until

ONCE = """
import json, os, sys, time, rayk
import rayk.manager.ray_backend as client
from rayk import *

client.LEASE_SECONDS = 1.0
p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 2,
                     data_parallel_degree=2, enable_prefix_caching=True)
ADDRESS, NAME = sys.argv[1], sys.argv[2] or None

def join():
    return InferenceSession(runtime="ray", address=ADDRESS, name=NAME, log_to_driver=False)

def manage(session):
    return PagedKVCacheManager(p, session, 16, max_batch_size=4, fast_lane=NAME is None)

def pid(inputs, batch):
    return os.getpid()

def say(**what):
    print(json.dumps(what), flush=True)

def groups():
    from ray.util import placement_group_table
    return sum(g["state"] != "REMOVED" for g in placement_group_table().values())
"""
SERVE = """
manager = manage(join())
placed = manager.admit([TextContext(n, [ord(n)] * 9, 100) for n in "abcd"])
while NAME is None and {each.state for each in manager.lane_states()} != {"open"}:
    manager.execute([[], []], pid)
say(placed=placed, pids=manager.execute([[], []], pid))
time.sleep(120)
"""
Driver = subprocess.Popen[str]
Start = Callable[..., Driver]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster(ray_tmpdir: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and environment of a cluster of one node, started as an operator would; the processes end with it."""
    folder = Path(tempfile.mkdtemp(prefix="ext", dir=ray_tmpdir))  # test_fence.py starts one like it
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    port = free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2",
        "--object-store-memory=100000000", "--include-dashboard=false", "--metrics-export-port=0",
        "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--runtime-env-agent-port=0",
        "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
    ]  # fmt: skip
    log = folder / "ray-start.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    try:
        until(lambda: "--block" in log.read_text() or head.poll() is not None, 60)
        assert head.poll() is None, log.read_text()
        yield f"127.0.0.1:{port}", environment
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(process)
            with contextlib.suppress(AssertionError):
                until(lambda: not running([process.pid for process in family]), 5)
        head.wait(10)


@pytest.fixture
def start(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> Iterator[Start]:
    """Start a driver of that cluster; all are ended with the test."""
    address, environment = cluster
    drivers: list[Driver] = []

    def run(code: str, name: str = "") -> Driver:
        script = tmp_path / f"driver_{len(drivers)}.py"
        script.write_text(ONCE + code)
        command = [sys.executable, str(script), address, name]
        with (tmp_path / f"driver_{len(drivers)}.err").open("w") as errors:
            drivers.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
        return drivers[-1]

    yield run
    for driver in drivers:
        driver.kill()
        driver.communicate(timeout=30)


def stderr(driver: Driver) -> str:
    return Path(driver.args[1]).with_suffix(".err").read_text()  # type: ignore[index, arg-type]


def tell(driver: Driver) -> None:
    """Let it go on."""
    assert driver.stdin is not None
    driver.stdin.write("go\n")
    driver.stdin.flush()


def said(driver: Driver) -> dict[str, Any]:
    """The next line of a driver's output."""
    assert driver.stdout is not None
    line = driver.stdout.readline()
    assert line, f"it ended with {driver.wait(10)}: {stderr(driver)}"
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_killed_driver_takes_its_actors_with_it(start: Start) -> None:
    first = start(SERVE)
    found = said(first)
    assert sorted(found["placed"]) == [0, 0, 1, 1]
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    until(lambda: not running(found["pids"]))
    second = start("""
with join() as session:
    deadline = time.monotonic() + 20
    while groups() and time.monotonic() < deadline:
        time.sleep(.05)
    say(groups=groups())
    with manage(session) as manager:
        placed = manager.admit([TextContext(n, [ord(n)] * 9, 100) for n in "abcd"])
        say(placed=placed, pids=manager.execute([[], []], pid))
    say(groups=groups())
say(over=True)
""")
    assert said(second) == {"groups": 0}, "the placement of the killed one is gone"
    again = said(second)
    assert sorted(again["placed"]) == [0, 0, 1, 1] and not set(again["pids"]) & set(found["pids"])
    assert said(second) == {"groups": 0}
    assert said(second) == {"over": True} and second.wait(20) == 0
    until(lambda: not running(again["pids"]))


def test_a_named_cluster_outlives_its_drivers(start: Start) -> None:
    """One is killed: the others get its pages back. One closes its session: it is gone at once. One shuts it down."""
    first = start(SERVE, "kept")
    found = said(first)
    first.send_signal(signal.SIGKILL)
    first.wait(10)

    second = start(
        """
import ray, threading
deadline = time.monotonic() + 20
session = join()
manager = manage(session)
while True:  # nobody says anything to the scheduler: it looks at the clock by itself
    used = [manager.get_num_used_pages(r) for r in range(2)]
    if used == [0, 0] or time.monotonic() > deadline:
        break
    time.sleep(.1)
say(used=used, claimed=[n for n in "abcd" for r in range(2) if manager.contains(n, r)],
    placed=manager.admit([TextContext(n, [ord(n)] * 9, 100) for n in "abcd"]), pids=manager.execute([[], []], pid))
session.close()
while any(t.name == "rayk-lease" for t in threading.enumerate()) and time.monotonic() < deadline:
    time.sleep(.05)
say(threads=[t.name for t in threading.enumerate() if t.name == "rayk-lease"], connected=ray.is_initialized())
""",
        "kept",
    )
    again = said(second)
    assert again["used"] == [0, 0] and again["claimed"] == []
    assert again["pids"] == found["pids"], "the same actors"
    assert sorted(again["placed"]) == [0, 0, 1, 1]
    assert said(second) == {"threads": [], "connected": False} and second.wait(20) == 0
    assert running(found["pids"]) == found["pids"]

    third = start(
        """
session = join()
manager = manage(session)
say(used=[manager.get_num_used_pages(r) for r in range(2)], pids=manager.execute([[], []], pid))
manager.shutdown()
say(groups=groups())
session.close()
""",
        "kept",
    )
    assert said(third) == {"used": [0, 0], "pids": found["pids"]}
    assert said(third) == {"groups": 0} and third.wait(20) == 0
    until(lambda: not running(found["pids"]))
    for driver in (second, third):
        assert "Traceback" not in stderr(driver), stderr(driver)


def test_a_cluster_is_known_by_any_of_its_addresses(start: Start) -> None:
    """The address that joined a cluster joins it again."""
    driver = start(
        """
with join() as one, join() as two:
    say(nodes=len(one.ray.nodes()), same=one.ray.nodes() == two.ray.nodes())
"""
    )
    assert said(driver) == {"nodes": 1, "same": True}
    assert driver.wait(20) == 0


def test_two_drivers_that_start_the_same_named_cluster_at_once_share_it(start: Start) -> None:
    code = """
session = join()
session.ray.nodes()
say(ready=True)
sys.stdin.readline()
manager = manage(session)
say(pids=manager.execute([[], []], pid))
sys.stdin.readline()
manager.shutdown(force=True)
"""
    drivers = [start(code, "race") for _ in range(2)]
    for driver in drivers:
        assert said(driver) == {"ready": True}
    for driver in drivers:
        tell(driver)
    first, second = (said(driver)["pids"] for driver in drivers)
    assert first == second
    tell(drivers[0])
    assert drivers[0].wait(20) == 0
    until(lambda: not running(first))
