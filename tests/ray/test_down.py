"""Detached clusters whose drivers die in the middle of something: what was begun is taken back, and all of it can be
removed by its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ..patience import scaled  # noqa: TID252  # tests/ is no package that has an absolute name
from .heads import Driver, Head, Start, said

LOOK = """
import ray
from rayk.actors.runtime import RayRuntime
runtime = RayRuntime(f"rayk-{NAME}")

def left():
    return [runtime.actor_names(), len(runtime.groups(NAME))]
"""
BEGUN = """
import rayk.manager.starter as starter
manager = manage(join())
start = starter.start_replicas

def begin(*given):
    handles = start(*given)
    say(begun=[handle.facts.pid for handle in handles])
    time.sleep(300)

starter.start_replicas = begin
manager.add_replicas()
"""
HALF = """
import rayk.actors.startup as startup

def begin(runtime, deployment, name):
    say(begun=[handle.facts.pid for handle in deployment.running.values()])
    time.sleep(300)

startup._start_scheduler = begin
manage(join())
"""
HOLDS = """
from rayk.actors.interface import ActorGoneError, ActorSpec
from rayk.actors.runtime import RayRuntime
session, runtime = join(), RayRuntime("rayk-kept")

class Held:
    def ping(self):
        return os.getpid()

def ask(actor):
    try:
        return runtime.get(actor.call("ping"), "it", 30)
    except ActorGoneError:
        return None
"""
KEEPS = """
actors = [runtime.start(ActorSpec(Held, (), name=f"kept/{i}")) for i in range(2)]
pids = [ask(actor) for actor in actors]
runtime.keep("kept/actors", actors)
say(pids=pids)
"""
USE = """
manager = manage(join())
say(placed=sorted(manager.admit([TextContext(n, [ord(n)] * 9, 100) for n in "abcd"])))
time.sleep(300)
"""


@pytest.fixture
def down(operated: Head) -> Callable[[str], tuple[int, dict[str, Any]]]:
    """rayk down NAME: its exit code and its object on stdout."""
    address, environment = operated

    def run(name: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "rayk", "down", name, "--address", address, "--format", "json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        return done.returncode, json.loads(done.stdout) if done.stdout else {"error": done.stderr}

    return run


def killed(driver: Driver) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)


def test_what_was_kept_is_read_when_the_driver_that_started_it_is_gone_and_it_is_dead(start: Start) -> None:
    """Ray forgets the classes of a driver when the last of its actors is gone; a roster may still name one of them."""
    began = start(HOLDS + KEEPS, "kept")
    pids = said(began)["pids"]
    began.wait(30)
    first = start(
        HOLDS + "kept = runtime.kept('kept/actors')\nsay(pids=[ask(a) for a in kept])\nruntime.stop(kept, None)", "kept"
    )
    assert said(first) == {"pids": pids}
    first.wait(30)
    last = start(HOLDS + "say(pids=[ask(actor) for actor in runtime.kept('kept/actors')])", "kept")
    assert said(last) == {"pids": [None, None]}


def test_what_a_killed_driver_was_adding_is_taken_back(start: Start, down: Any) -> None:
    """The index is planned no more, its process ends, and its place is given back, for whoever is there."""
    stays = start(
        LOOK
        + """
session = join()
manager = manage(session)
say(ready=True)
sys.stdin.readline()
deadline = time.monotonic() + 40 * SCALE
while ("starting" in manager.replica_states() or len(left()[0]) > 3) and time.monotonic() < deadline:
    time.sleep(.1)
say(states=manager.replica_states(), left=left())
say(added=manager.add_replicas(), left=left())
time.sleep(300)
""",
        "adds",
    )
    assert said(stays) == {"ready": True}
    dies = start(BEGUN, "adds")
    [process] = said(dies)["begun"]
    assert process
    killed(dies)
    stays.stdin.write("go\n")  # type: ignore[union-attr]
    stays.stdin.flush()  # type: ignore[union-attr]
    told = said(stays)
    assert told["states"] == ["ready", "ready", "removed"], "an index at which nobody ever was"
    assert len(told["left"][0]) == 3 and told["left"][1] == 1, "two replicas and a scheduler, and their places"
    told = said(stays)
    assert told["added"] == [2] and len(told["left"][0]) == 4
    killed(stays)
    code, ended = down("adds")
    assert code == 0 and ended["actors"] == 4 and ended["groups"] == 2


@pytest.mark.parametrize("code", [HALF, USE])
def test_a_cluster_can_always_be_removed(start: Start, down: Any, code: str) -> None:
    """Whether it runs, or its start was never finished; then the name is free."""
    driver = start(code, "removed")
    assert said(driver)
    killed(driver)
    code_, ended = down("removed")
    assert (code_, ended["groups"]) == (0, 1) and ended["actors"] >= 2
    again = start(LOOK + "join()\nsay(left=left())\n" + USE, "removed")
    assert said(again) == {"left": [[], 0]}
    assert said(again) == {"placed": [0, 0, 1, 1]}
    killed(again)
    assert down("removed")[0] == 0


LOSE = """
manager = manage(join())
ctx = TextContext("a", range(9), 100)
say(placed=manager.admit([ctx]), pid=manager._calls.scheduler_pid())
manager.leave()
say(left=True)
"""


def test_a_scheduler_begins_anew_without_the_driver_that_started_it(start: Start, down: Any) -> None:
    first = start(LOSE, "orphan")
    process = said(first)["pid"]
    assert said(first) == {"left": True} and first.wait(30) == 0
    os.kill(process, signal.SIGKILL)
    second = start(USE, "orphan")
    assert said(second) == {"placed": [0, 0, 1, 1]}
    killed(second)
    code, ended = down("orphan")
    assert code == 0 and ended["actors"] == 3


def test_there_is_nothing_of_that_name(down: Any) -> None:
    code, told = down("nobody")
    assert code == 2 and "no rayk cluster of the name 'nobody'" in told["error"]


def test_a_dead_drivers_pages_come_back_within_its_lease(start: Start, down: Any) -> None:
    """A second here; nobody calls the scheduler."""
    stays = start(
        """
manager = manage(join())
say(ready=True)
sys.stdin.readline()
began = time.monotonic()
while sum(manager.get_num_used_pages(r) for r in range(2)) and time.monotonic() < began + 30 * SCALE:
    time.sleep(.05)
say(seconds=time.monotonic() - began, lease=client.LEASE_SECONDS)
time.sleep(300)
""",
        "leases",
    )
    assert said(stays) == {"ready": True}
    dies = start(USE, "leases")
    assert said(dies) == {"placed": [0, 0, 1, 1]}
    dies.send_signal(signal.SIGKILL)
    stays.stdin.write("go\n")  # type: ignore[union-attr]
    stays.stdin.flush()  # type: ignore[union-attr]
    told = said(stays)
    assert told["seconds"] < told["lease"] + scaled(3.0), "the lease, a second, and what a busy machine takes"
    killed(stays)
    assert down("leases")[0] == 0
