"""Sessions from birth to death, each in a driver process of its own: what is started is ended, files included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .forwards import running, until

ONCE = """
import os, rayk
from rayk import *
p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 2,
                     data_parallel_degree=2, enable_prefix_caching=True)
ray_options = dict(num_cpus=1, object_store_memory=80_000_000)
def use(session):
    m = PagedKVCacheManager(p, session, 16, max_batch_size=4)
    m.admit([TextContext("a", range(9), 100), TextContext("b", range(9), 100)])
    assert m.execute([[], []], lambda inputs, batch: 1 + 1) == [2, 2]
    return m
"""


def driver(code: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A driver script, the way a user would run it, in the middle of nowhere."""
    script = folder / "driver_script.py"
    script.write_text(ONCE + code)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", str(script), *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err, err
    return out


def left_in(folder: Path) -> list[str]:
    """Files that Ray or rayk left, the script itself apart."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "driver_script.py")


@pytest.fixture
def place(ray_tmpdir: Path, request: pytest.FixtureRequest) -> Path:
    folder = ray_tmpdir / f"d{abs(hash(request.node.name)) % 10_000}"
    folder.mkdir()
    return folder


def test_two_sessions_after_each_other_leave_no_process_and_no_file(place: Path) -> None:
    code = """
import psutil
before = dict(os.environ)
for _ in range(2):
    with InferenceSession(runtime="ray", address="local", **ray_options) as session:
        first, second = use(session), use(session)
        first.shutdown()
        started = [c.pid for c in psutil.Process().children(recursive=True)]
        assert started
    assert dict(os.environ) == before, set(os.environ) ^ set(before)
    psutil.wait_procs([psutil.Process(p) for p in started if psutil.pid_exists(p)], timeout=20)
    left = [p for p in started if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]
    assert not left, left
    try:
        second.claim("x", 0)
    except rayk.RaykError as error:
        print(type(error).__name__)
"""
    assert finish(driver(code, place)) == "ClosedError\nClosedError\n"
    assert left_in(place) == []


@pytest.mark.parametrize("ending", ["falls off the end", "sys.exit", "exception"])
def test_a_driver_that_just_ends_leaves_nothing(place: Path, ending: str) -> None:
    code = """
import psutil, sys
use(InferenceSession(runtime="ray", address="local", **ray_options))
print(*[c.pid for c in psutil.Process().children(recursive=True)], flush=True)
""" + {"falls off the end": "", "sys.exit": "sys.exit(0)", "exception": "raise RuntimeError('the users own')"}[ending]
    process = driver(code, place)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (ending == "exception")
    assert err.count("Traceback") == (ending == "exception"), err
    pids = [int(word) for word in out.split()]
    assert pids
    until(lambda: not running(pids))
    assert left_in(place) == []


def test_ctrl_c_leaves_nothing(place: Path) -> None:
    code = """
import psutil, time
use(InferenceSession(runtime="ray", address="local", **ray_options))
print(*[c.pid for c in psutil.Process().children(recursive=True)], flush=True)
time.sleep(60)
"""
    process = driver(code, place)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    until(lambda: not running(pids))
    assert left_in(place) == []


def test_a_killed_driver_takes_its_embedded_cluster_with_it(place: Path) -> None:
    """Its files stay, since nobody is left to remove them; its processes do not."""
    code = """
import psutil, time
use(InferenceSession(runtime="ray", address="local", **ray_options))
print(*[c.pid for c in psutil.Process().children(recursive=True)], flush=True)
time.sleep(60)
"""
    process = driver(code, place)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) > 4
    process.kill()
    process.communicate(timeout=30)
    until(lambda: not running(pids))


def test_a_failed_start_ends_the_session_cleanly(place: Path) -> None:
    code = """
from rayk.errors import PlanError, ConfigError
with InferenceSession(runtime="ray", address="local", **ray_options) as session:
    try:
        PagedKVCacheManager(p, session, 10**12, max_batch_size=4)
    except PlanError as error:
        print("PlanError", "do not fit on node" in str(error))
    use(session)
try:
    InferenceSession(runtime="ray", address="127.0.0.1:1", **{})
except ConfigError as error:
    print("ConfigError", error)
"""
    out = finish(driver(code, place)).splitlines()
    assert out[0] == "PlanError True"
    assert out[1].startswith("ConfigError no Ray cluster answers at '127.0.0.1:1'")
    assert left_in(place) == []


