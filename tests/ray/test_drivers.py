"""Drivers that come and go, or are killed, on a cluster that somebody else started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import running
from .heads import Start, said, stderr, tell, warm_workers

SERVE = """
manager = manage(join())
placed = manager.admit([TextContext(n, [ord(n)] * 9, 100) for n in "abcd"])
while NAME is None and {each.kind for each in manager.path_states()} != {"unix"}:
    manager.execute([[], []], pid)
say(placed=placed, pids=manager.execute([[], []], pid))
time.sleep(120)
"""


def test_a_killed_driver_takes_its_actors_with_it(start: Start) -> None:
    first = start(SERVE)
    found = said(first)
    assert sorted(found["placed"]) == [0, 0, 1, 1]
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    until(lambda: not running(found["pids"]))
    second = start("""
with join() as session:
    deadline = time.monotonic() + 20 * SCALE
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
deadline = time.monotonic() + 20 * SCALE
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


def test_a_full_object_store_holds_nobody_up(start: Start) -> None:
    """More than there is room for is held in Ray's, so that it writes objects out; calls go in pieces that Ray sends
    along."""
    driver = start("""
import numpy, ray
session = InferenceSession(runtime="ray", address=ADDRESS, sockets=False, log_to_driver=False)
with session, manage(session) as manager:
    held = [ray.put(numpy.zeros(30_000_000, numpy.uint8)) for _ in range(5)]
    began = time.monotonic()
    ctxs = [TextContext(n, [ord(n)] * 9, 100) for n in "abcd"]
    admissions = manager.try_admit(ctxs)
    for ctx in ctxs:
        ctx.update(1)
    manager.step([[c for c, a in zip(ctxs, admissions) if a.replica == r] for r in range(2)])
    for ctx, admission in zip(ctxs, admissions):
        manager.release(ctx.request_id, admission.replica)
    used = sum(manager.get_num_used_pages(r) for r in range(2))
    say(errors=[a.error for a in admissions], used=used, fast=time.monotonic() - began < 5 * SCALE)
    held.clear()
""")
    assert said(driver) == {"errors": [None] * 4, "used": 0, "fast": True}


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


def test_many_drivers_at_once_lose_nothing(tmp_path: Path) -> None:
    """A small one of tests/measure/many_drivers.py."""
    command = [sys.executable, str(Path(__file__).parents[1] / "measure" / "many_drivers.py"), "16", "6", "1"]
    with warm_workers(tmp_path) as warm:
        done = subprocess.run(command, env=os.environ | warm, capture_output=True, text=True, timeout=scaled(120))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "768 of 768 requests admitted, stepped and released; 0 pages are held" in done.stdout
