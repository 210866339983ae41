"""Three nodes on one machine, driven by a script of their own: planning on each, spreading, and losing one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A raylet's files must not be its neighbour's, and a dead one is to be noticed in seconds, as in an embedded cluster.
SCRIPT = """
import json, os, sys, time
from rayk.actors.runtime import EMBEDDED_SETTINGS
os.environ.update(EMBEDDED_SETTINGS)

import ray
from ray.cluster_utils import Cluster as Nodes
import rayk.actors.launch as start
from rayk import *
from rayk.errors import PlanError

FOLDER = sys.argv[1]
def node(name):
    os.makedirs(f"{FOLDER}/{name}")
    return dict(num_cpus=1, object_store_memory=80_000_000, temp_dir=f"{FOLDER}/{name}", include_dashboard=False)

p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 3,
                     data_parallel_degree=3, enable_prefix_caching=True)
said = {}
os.makedirs(f"{FOLDER}/ray", exist_ok=True)
cluster = Nodes(initialize_head=True, head_node_args=node("h"))
second, third = cluster.add_node(**node("b")), cluster.add_node(**node("c"))
try:
    session = InferenceSession(runtime="ray", address=cluster.address, log_to_driver=False)
    ids = sorted(n.node_id for n in session.ray.nodes())
    said["nodes"] = len(ids)

    measured, small = [], []
    real = start.measure
    def measure(node_id, host_name, *rest):
        import msgspec, ray
        found = real(node_id, host_name, *rest)
        where = ray.get_runtime_context().get_node_id()
        return msgspec.structs.replace(found, host_name=where, host_free=100 if node_id in small else found.host_free)
    start.measure = measure
    wait = session.ray.get
    def get(ref, target, timeout):
        value = wait(ref, target, timeout)
        if target.startswith("the planner"):
            measured.append((value.node_id, value.host_name))
        return value
    session.ray.get = get

    def where(inputs, batch):
        import ray
        return ray.get_runtime_context().get_node_id()

    def make(pages=16):
        return PagedKVCacheManager(p, session, pages, max_batch_size=8, fast_lane=True)

    small.append(ids[0])
    with make() as manager:
        said["planned_on_each"] = sorted(a for a, b in measured if a == b) == ids
        said["avoided"] = sorted(set(manager.execute([[], [], []], where))) == ids[1:]
    small[:] = ids
    try:
        make()
    except PlanError as error:
        said["refused"] = [i in str(error) for i in ids]
    small.clear()

    with make() as manager:
        homes = manager.execute([[], [], []], where)
        said["spread"] = sorted(homes) == ids
        ctxs = [TextContext(f"r{r}", range(9), 100) for r in range(3)]
        manager.try_admit(ctxs[:1], [0])
        ctxs[0].update(1)
        manager.step([ctxs[:1], [], []])
        deadline = time.monotonic() + 20
        while "opening" in [each.state for each in manager.lane_states()] and time.monotonic() < deadline:
            manager.step([[], [], []])
        here = ray.get_runtime_context().get_node_id()
        said["lanes"] = sorted([homes[each.replica] == here, each.state, each.reason] for each in manager.lane_states())
        said["copied"] = [x.peer_tokens for x in manager.try_admit(ctxs[1:], [1, 2])]

        lost = homes.index(third.node_id)
        began = time.monotonic()
        cluster.remove_node(third, allow_graceful=False)
        try:
            while True:
                manager.step([[c] for c in ctxs])
                time.sleep(.05)
        except ReplicaLostError as error:
            said["lost"] = [error.replica == lost, error.requests == [f"r{lost}"]]
        said["noticed"] = time.monotonic() - began
        said["others"] = [manager.contains(f"r{r}", r) for r in range(3) if r != lost]
    session.close()
finally:
    cluster.shutdown()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(ray_tmpdir: Path) -> dict[str, Any]:
    """What the script found out."""
    folder = ray_tmpdir / "n"
    folder.mkdir()
    script = folder / "nodes_script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_planner_runs_on_every_node_and_replicas_are_spread(said: dict[str, Any]) -> None:
    assert said["nodes"] == 3 and said["planned_on_each"] and said["spread"]


def test_pages_are_copied_between_nodes(said: dict[str, Any]) -> None:
    assert said["copied"] == [8, 8]


def test_a_node_that_is_too_small_is_avoided_or_named(said: dict[str, Any]) -> None:
    assert said["avoided"] and said["refused"] == [True] * 3


def test_only_replicas_of_the_drivers_node_have_fast_lanes(said: dict[str, Any]) -> None:
    elsewhere = [False, "closed", "it runs on another node, where a lane is no faster than calls"]
    assert said["lanes"] == [elsewhere, elsewhere, [True, "open", ""]]


def test_a_lost_node_is_a_lost_replica(said: dict[str, Any]) -> None:
    assert said["lost"] == [True, True] and said["others"] == [True, True]
    assert said["noticed"] < 10
