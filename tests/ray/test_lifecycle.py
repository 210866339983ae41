"""Sessions from birth to death, each in a driver process of its own: what is started is ended, files included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import running

ONCE = """
import os, psutil, sys, time, rayk
from rayk import *
from rayk.errors import ConfigError, PlanError

p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"],
                     enable_prefix_caching=True)

def embedded():
    return InferenceSession(runtime="ray", address="local", num_cpus=1, object_store_memory=80_000_000)

def use(session):
    m = PagedKVCacheManager(p, session, 16, max_batch_size=4)
    m.admit([TextContext("a", range(9), 100), TextContext("b", range(50, 59), 100)])
    assert m.execute([[]], lambda inputs, batch: 1 + 1) == [2]
    return m

def started():
    return [c.pid for c in psutil.Process().children(recursive=True)]
"""
START = "use(embedded()); print(*started(), flush=True)\n"
Driver = subprocess.Popen[str]
Start = Callable[..., Driver]


@pytest.fixture
def place(ray_tmpdir: Path, request: pytest.FixtureRequest) -> Path:
    """Where that driver's Ray keeps its files."""
    folder = ray_tmpdir / f"d{len(list(ray_tmpdir.iterdir()))}"
    folder.mkdir()
    return folder


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Start a driver script the way a user would, in the middle of nowhere."""
    drivers: list[Driver] = []

    def run(code: str, **extra: str) -> Driver:
        script = place / "driver_script.py"
        script.write_text(ONCE + code)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_TMPDIR": str(place)}
        environment |= extra
        drivers.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                cwd=place,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return drivers[-1]

    yield run
    for driver in drivers:
        driver.kill()
        driver.communicate(timeout=30)


def numbers(driver: Driver) -> list[int]:
    """The numbers on the next line that it prints."""
    assert driver.stdout is not None
    line = driver.stdout.readline()
    while "(raylet)" in line:  # Ray shows its warnings there, such as that of a slow machine
        line = driver.stdout.readline()
    found = [int(word) for word in line.split()]
    assert found, driver.communicate(timeout=30)
    return found


def left_in(folder: Path) -> list[str]:
    """Files that Ray or rayk left, the script itself apart."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "driver_script.py")


def test_two_sessions_after_each_other_leave_no_process_and_no_file(place: Path, start: Start) -> None:
    code = """
from rayk.actors.runtime import EMBEDDED_SETTINGS
before = {name: os.environ.get(name) for name in EMBEDDED_SETTINGS}
for _ in range(2):
    with embedded() as session:
        manager, pids = use(session), started()
        assert pids
    assert {name: os.environ.get(name) for name in EMBEDDED_SETTINGS} == before
    deadline = time.monotonic() + 20
    while left := [i for i in pids if psutil.pid_exists(i) and psutil.Process(i).status() != "zombie"]:
        assert time.monotonic() < deadline, left
        time.sleep(.05)
    session.close()
    for call in (lambda: manager.claim("x", 0), lambda: use(session)):
        try:
            call()
        except rayk.RaykError as error:
            print(error)
"""
    out, err = start(code).communicate(timeout=120)
    assert err.count("Traceback") == 0, err
    closed = ["this PagedKVCacheManager was shut down; make a new one", "this session was shut down; make a new one"]
    assert out.splitlines() == closed * 2
    assert left_in(place) == []


def test_ctrl_c_leaves_nothing(place: Path, start: Start) -> None:
    # A test run in the background of a shell has SIGINT ignored, and its children inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    driver = start(heed + START + "time.sleep(60)\n")
    pids = numbers(driver)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=120)  # Ray takes its time to go where the cores are busy
    assert driver.returncode != 0
    until(lambda: not running(pids))
    assert left_in(place) == []


def test_a_killed_driver_takes_its_embedded_cluster_with_it(start: Start) -> None:
    """Files stay: nobody is left to remove them. Ray's own agents follow within a minute or two."""
    code = """
use(embedded())
kinds = ("gcs_server", "raylet/raylet", "ray::ReplicaActor", "ray::SchedulerActor")
found = [i for i in started() if any(kind in " ".join(psutil.Process(i).cmdline()[:1]) for kind in kinds)]
assert len(found) == 4, found
print(*found, flush=True)
time.sleep(60)
"""
    driver = start(code)
    pids = numbers(driver)
    driver.kill()
    driver.communicate(timeout=30)
    until(lambda: not running(pids))


def test_after_a_failed_start_the_session_goes_on(place: Path, start: Start) -> None:
    code = """
session = embedded()
try:
    PagedKVCacheManager(p, session, 10**12, max_batch_size=4)
except PlanError as error:
    print(error)
use(session)  # and ends without closing anything
"""
    out, err = start(code).communicate(timeout=120)
    assert "Traceback" not in err, err
    assert "do not fit on node" in out
    assert left_in(place) == []


def test_an_address_where_nobody_answers_is_refused_soon(start: Start) -> None:
    code = """
try:
    InferenceSession(runtime="ray", address="127.0.0.1:1")
except ConfigError as error:
    print(error)
"""
    out, _ = start(code).communicate(timeout=30)
    assert out.startswith("no Ray cluster answers at '127.0.0.1:1'")


def test_a_named_address_where_nobody_answers_is_refused_soon(start: Start) -> None:
    code = """
try:
    InferenceSession(runtime="ray")
except ConfigError as error:
    print(error)
"""
    out, _ = start(code, RAY_ADDRESS="127.0.0.1:1").communicate(timeout=30)
    assert "127.0.0.1:1" in out


def test_the_record_of_a_cluster_that_is_gone_is_not_believed(place: Path, start: Start) -> None:
    """`ray start` records its address in a file, which stays when the machine is switched off."""
    (place / "ray").mkdir()
    (place / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    out, err = start("print(len(InferenceSession(runtime='ray').ray.nodes()))").communicate(timeout=60)
    assert out == "1\n", err
