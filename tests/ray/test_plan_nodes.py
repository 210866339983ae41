"""Nodes with different memory: each replica gets what its node can give, a small node is left out and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, logging, os, sys
from ray.cluster_utils import Cluster as Nodes
from rayk import *
from rayk.actors.describe import describe

FOLDER, MIB = sys.argv[1], 1 << 20
def node(name, memory):
    os.makedirs(f"{FOLDER}/{name}")
    return dict(num_cpus=1, memory=memory, object_store_memory=80_000_000, temp_dir=f"{FOLDER}/{name}",
                include_dashboard=False)

def params(replicas):  # pages of 2 MiB
    return MHAKVCacheParams(dtype="float32", head_dim=64, num_layers=4, n_kv_heads=8, page_size=128,
                            devices=["cpu"] * replicas, data_parallel_degree=replicas)

os.makedirs(f"{FOLDER}/ray", exist_ok=True)
cluster = Nodes(initialize_head=True, head_node_args=node("h", 1024 * MIB))
cluster.add_node(**node("b", 512 * MIB))
cluster.add_node(**node("c", 3 * MIB))
said = {}
try:
    options = dict(runtime="ray", address=cluster.address, log_to_driver=False)
    with InferenceSession(**options, name="plan") as session:
        memory = {n.node_id: n.resources["memory"] for n in session.ray.nodes()}
        with PagedKVCacheManager(params(2), session, None, max_batch_size=8) as manager:
            [state] = describe(session.ray, "plan")
            running = manager._calls.cluster
            said["pages"] = sorted(manager.get_num_pages(r) for r in range(2))
            said["bound"] = [r.plan.bound for r in state.replicas]
            said["states"] = [[r.state, r.pages == r.plan.pages, r.allocated_bytes == r.plan.bytes]
                              for r in state.replicas]
            said["measured"] = sorted(n.node_id for n in state.nodes) == sorted(memory)
            said["first"] = max(n.measured_at for n in state.nodes) < min(f.started_at for f in running.facts)
            said["refused"] = [[int(memory[i]), reason] for i, reason in state.refused.items()]
    with InferenceSession(**options) as session:
        with PagedKVCacheManager(params(2), session, None, max_batch_size=8, uniform=True) as manager:
            said["uniform"] = [manager.get_num_pages(r) for r in range(2)]
        with PagedKVCacheManager(params(1), session, None, max_batch_size=8, memory_utilization=0.25) as manager:
            said["quarter"] = manager.get_num_pages(0)
        try:
            PagedKVCacheManager(params(2), session, 300, max_batch_size=8)
        except RaykError as error:
            said["too_many"] = [type(error).__name__, str(error)]
finally:
    cluster.shutdown()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(ray_tmpdir: Path) -> dict[str, Any]:
    """What the script found out."""
    folder = ray_tmpdir / "p"
    folder.mkdir()
    script = folder / "plan_script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_replica_gets_what_its_node_can_give(said: dict[str, Any]) -> None:
    assert said["pages"] == [127, 255]  # half of 512 and of 1,024 MiB in pages of 2, less the null page
    assert said["bound"] == ["memory", "memory"]
    assert said["states"] == [["ready", True, True]] * 2


def test_every_node_was_measured_before_any_replica_existed(said: dict[str, Any]) -> None:
    assert said["measured"] and said["first"]


def test_a_node_that_is_too_small_is_left_out_with_its_reason(said: dict[str, Any]) -> None:
    [[memory, reason]] = said["refused"]
    assert memory == 3 << 20
    assert "1 page(s) of 2097152 bytes (and the null page) do not fit" in reason and "3145728 bytes are free" in reason


def test_uniform_replicas_get_the_smallest_number(said: dict[str, Any]) -> None:
    assert said["uniform"] == [127, 127]


def test_a_chosen_share_of_the_memory(said: dict[str, Any]) -> None:
    assert said["quarter"] in (63, 127)  # a quarter of the node that Ray chose


def test_more_pages_than_the_nodes_have_are_refused(said: dict[str, Any]) -> None:
    kind, text = said["too_many"]
    assert kind == "PlanError"
    assert "2 replica(s) asked for, 0 fit" in text and "ask for at most 255 pages" in text
