"""Several Ray nodes on this machine, and one command that runs on them.

    python examples/multinode/local.py                        # 3 nodes: a load test with tiers and copies
    python examples/multinode/local.py --nodes 2 -- rayk bench --replicas 2 --smoke
    python examples/multinode/local.py --dashboard -- sh      # a shell for `ray job submit`; needs ray[default]

Each node has a raylet, an object store and a folder of its own, as on machines of their own; what they share is the
memory, the cores and the network. The command finds the cluster by RAY_ADDRESS, its dashboard by
RAY_API_SERVER_ADDRESS and its token by RAY_AUTH_TOKEN. The nodes end with it, and its exit code is this script's.
"""

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD_TEST = (
    "bench --workload agent --scale 0.1 --requests 300 --replicas 3 --router least-loaded --concurrency 24 "
    "--page-size 64 --pages 400 --host-memory 64MiB --out bench-out"
)
# A lost replica is noticed in 0.2 s instead of 1.5 s, a lost node in 3 s instead of 16 s: docs/multinode.md says at
# what price.
FAST_FAILURES = {
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    "RAY_core_worker_internal_heartbeat_ms": "100",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="of each node, as Ray counts them")
    parser.add_argument("--dashboard", action="store_true", help="with the jobs API; needs ray[default]")
    parser.add_argument("command", nargs="*", help="what to run; a load test if not given")
    given = parser.parse_args()
    command = given.command or [sys.executable, "-m", "rayk", *LOAD_TEST.split()]
    folder = tempfile.mkdtemp(prefix="nodes-")  # short: Ray's sockets are below it
    os.environ |= FAST_FAILURES | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}"  # jobs say `python`
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    os.makedirs(f"{folder}/ray")
    from ray.cluster_utils import Cluster

    def node(index: int) -> dict[str, object]:
        # Nodes that shared a folder would unpack a job's files over each other's; one whose agent found its port taken
        # would run no jobs.
        os.makedirs(own := f"{folder}/{index}")
        ports = {"dashboard_agent_listen_port": 0, "dashboard_port": None}  # None: 8265, or the next that is free
        return {"num_cpus": given.cpus, "object_store_memory": 100_000_000, "temp_dir": own, **ports}

    cluster = Cluster(initialize_head=True, head_node_args={**node(0), "include_dashboard": given.dashboard})
    try:
        for index in range(given.nodes):
            if index:
                cluster.add_node(**node(index))
            # Where a job looks for the cluster first; of several on this machine it might take another.
            Path(f"{folder}/{index}/ray_current_cluster").write_text(cluster.address)
        places = {"RAY_ADDRESS": cluster.address}
        if given.dashboard:
            places["RAY_API_SERVER_ADDRESS"] = f"http://{cluster.head_node.webui_url}"
        print(f"{given.nodes} nodes:", *(f"{name}={place}" for name, place in places.items()), flush=True)
        child = subprocess.Popen(command, env={**os.environ, **places})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the command ends first
        signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        return child.wait()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
