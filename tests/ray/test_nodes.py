"""Three nodes on one machine, driven by a script of their own: what each can hold, planning, spreading, and losing one.

Their memory differs: a replica gets what its node can give, and a node that is too small is left out and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .heads import warm_workers

# A raylet's files must not be its neighbour's, and a dead one is to be noticed in seconds, as in an embedded cluster.
SCRIPT = """
import json, os, subprocess, sys, time
from rayk.actors.describe import describe
from rayk.actors.runtime import EMBEDDED_SETTINGS
os.environ.update(EMBEDDED_SETTINGS)

import ray
from ray.cluster_utils import Cluster as Nodes
import rayk.actors.launch as start
from rayk import *
from rayk.errors import PlanError

FOLDER, MIB = sys.argv[1], 1 << 20
def node(name, memory):
    os.makedirs(f"{FOLDER}/{name}")
    return dict(num_cpus=1, memory=memory, object_store_memory=80_000_000, temp_dir=f"{FOLDER}/{name}",
                include_dashboard=False, include_log_monitor=False)

def large(replicas):  # pages of 2 MiB
    return MHAKVCacheParams(dtype="float32", head_dim=64, num_layers=4, n_kv_heads=8, page_size=128,
                            devices=["cpu"] * replicas, data_parallel_degree=replicas)

p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 3,
                     data_parallel_degree=3, enable_prefix_caching=True)
said = {}
os.makedirs(f"{FOLDER}/ray", exist_ok=True)
cluster = Nodes(initialize_head=True, head_node_args=node("h", 1024 * MIB))
second, third = cluster.add_node(**node("b", 512 * MIB)), cluster.add_node(**node("c", 3 * MIB))
try:
    options = dict(runtime="ray", address=cluster.address, log_to_driver=False)
    with InferenceSession(**options, name="plan") as session:
        memory = {n.node_id: n.resources["memory"] for n in session.ray.nodes()}
        with PagedKVCacheManager(large(2), session, None, max_batch_size=8) as manager:
            [state] = describe(session.ray, "plan")
            running = manager._calls.cluster
            said["pages"] = sorted(manager.get_num_pages(r) for r in range(2))
            said["bound"] = [r.plan.bound for r in state.replicas]
            said["states"] = [[r.state, r.pages == r.plan.pages, r.allocated_bytes == r.plan.bytes]
                              for r in state.replicas]
            said["measured"] = sorted(n.node_id for n in state.nodes) == sorted(memory)
            said["first"] = max(n.measured_at for n in state.nodes) < min(f.started_at for f in running.facts)
            said["refused"] = [[int(memory[i]), reason] for i, reason in state.refused.items()]
    session = InferenceSession(**options)
    with PagedKVCacheManager(large(2), session, None, max_batch_size=8, uniform=True) as manager:
        said["uniform"] = [manager.get_num_pages(r) for r in range(2)]
    with PagedKVCacheManager(large(1), session, None, max_batch_size=8, memory_utilization=0.25) as manager:
        said["quarter"] = manager.get_num_pages(0)
    try:
        PagedKVCacheManager(large(2), session, 300, max_batch_size=8)
    except RaykError as error:
        said["too_many"] = [type(error).__name__, str(error)]

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
        return PagedKVCacheManager(p, session, pages, max_batch_size=8, replace=False)

    small.append(ids[0])
    with make() as manager:
        said["planned_on_each"] = sorted(a for a, b in measured if a == b) == ids
        said["avoided"] = sorted(set(manager.execute([[], [], []], where))) == ids[1:]
    small[:] = ids
    try:
        make()
    except PlanError as error:
        said["unfit"] = [i in str(error) for i in ids]
    small.clear()

    with make() as manager:
        homes = manager.execute([[], [], []], where)
        said["spread"] = sorted(homes) == ids
        ctxs = [TextContext(f"r{r}", range(9), 100) for r in range(3)]
        manager.try_admit(ctxs[:1], [0])
        ctxs[0].update(1)
        manager.step([ctxs[:1], [], []])
        deadline = time.monotonic() + 20
        while "calls" in [each.kind for each in manager.path_states()] and time.monotonic() < deadline:
            manager.step([[], [], []])
        said["paths"] = [each.kind for each in manager.path_states()]
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

    with PagedKVCacheManager(p, session, 16, max_batch_size=8) as manager:
        homes = manager.execute([[], [], []], where)
        here = ray.get_runtime_context().get_node_id()
        goes = next(home for home in homes if home != here)
        ctxs = [TextContext(f"d{r}", range(9 * r, 9 * r + 9), 100) for r in range(3)]
        manager.try_admit(ctxs, [0, 1, 2])
        drain = ["drain-node", "--address", cluster.address, "--node-id", goes, "--reason",
                 "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True, capture_output=True)
        began = time.monotonic()
        def settled():
            states = manager.replica_states()
            return states.count("ready") == 3 and len(states) > 3
        while not settled() and time.monotonic() < began + 40:
            time.sleep(.1)
        states = manager.replica_states()
        gone = [r for r, home in enumerate(homes) if home == goes]
        said["drained"] = [states[r] for r in gone]
        said["moved"] = [manager.holder(f"d{r}") not in gone for r in range(3)]
        wheres = manager.execute([[]] * len(states), where)
        said["elsewhere"] = [wheres[r] != goes for r, state in enumerate(states) if state == "ready"]
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
    command = [sys.executable, str(script), str(folder)]
    with warm_workers(folder) as warm:
        done = subprocess.run(command, env=environment | warm, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_planner_runs_on_every_node_and_replicas_are_spread(said: dict[str, Any]) -> None:
    assert said["nodes"] == 3 and said["planned_on_each"] and said["spread"]


def test_pages_are_copied_between_nodes(said: dict[str, Any]) -> None:
    assert said["copied"] == [8, 8]


def test_a_node_with_no_room_is_avoided_or_named(said: dict[str, Any]) -> None:
    assert said["avoided"] and said["unfit"] == [True] * 3


def test_messages_go_by_sockets(said: dict[str, Any]) -> None:
    assert said["paths"] == ["unix"] * 3, "these nodes are one machine"


def test_a_node_that_is_drained_is_left_in_time(said: dict[str, Any]) -> None:
    """Its requests move, others take its replicas' places, and nothing new goes there."""
    assert set(said["drained"]) == {"draining"} and said["moved"] == [True] * 3
    assert said["elsewhere"] == [True] * 3


def test_a_lost_node_is_a_lost_replica(said: dict[str, Any]) -> None:
    assert said["lost"] == [True, True] and said["others"] == [True, True]
    assert said["noticed"] < 10


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
