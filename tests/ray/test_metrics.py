"""What a node's agent shows to Prometheus, and what actors are called there. Needs ray[default]."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .heads import Head

DRIVER = """
import sys, time, urllib.request
import ray
from rayk import Cluster, InferenceSession, MHAKVCacheParams, PagedKVCacheManager, TextContext

WANTED = {"ray_rayk_pages{": 9, "ray_rayk_requests{": 4, "ray_rayk_alloc_seconds_count{": 1,
          "ray_rayk_replica_state{": 21, "ray_vllm_generation_tokens_total{": 1}
params = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 2,
                          data_parallel_degree=2, enable_prefix_caching=True)
session = InferenceSession("ray", sys.argv[1], log_to_driver=False)
manager = PagedKVCacheManager(params, session, 16, max_batch_size=4)
ctxs = [TextContext(f"r{i}", list(range(9)), 12) for i in range(3)]
manager.admit(ctxs)
with Cluster(sys.argv[2], session, page_size=16, pages=8, device="cpu", vllm_metrics=True) as cluster:
    cluster.generate([[5, 6, 7]] * 3, max_new_tokens=4, ignore_eos=True)
    port = ray.nodes()[0]["MetricsExportPort"]
    mine = {f'cluster="{name.rpartition("/")[0]}"' for name in ray.util.list_named_actors()}  # others were here
    deadline, seen = time.monotonic() + 60, {}
    while True:  # an agent forgets a gauge when it has shown it, until its process tells it again
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        seen.update(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("ray_vllm")
                    or line.startswith("ray_") and any(cluster in line for cluster in mine))
        found = " ".join(seen)
        if all(found.count(name) >= n for name, n in WANTED.items()):
            break
        assert time.monotonic() < deadline, {name: found.count(name) for name in WANTED}
        time.sleep(0.5)
    for line in seen.items():
        print(*line)
    for each in ray.util.list_named_actors():
        print("ACTOR", each)
"""


@pytest.mark.skipif(
    find_spec("opencensus") is None, reason="ray[default] is not installed: a plain Ray has no agent that shows metrics"
)
def test_a_nodes_agent_shows_them(operated: Head, tmp_path: Path) -> None:
    from rayk.cli.example_model import write_example_model

    write_example_model(tmp_path / "tiny")
    (tmp_path / "driver.py").write_text(DRIVER)
    address, environment = operated
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), address, str(tmp_path / "tiny")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    text, names = done.stdout, re.findall(r"^ACTOR (\S+)$", done.stdout, re.M)
    assert len(names) == len(set(names)) == 4
    for wanted in ("replica-0", "replica-1", "scheduler", "engine-0"):
        assert any(re.fullmatch(rf"rayk-[0-9a-f]{{8}}/{wanted}-\d+", name) for name in names), names

    def value(name: str, **labels: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(f"ray_{name}{{")]
        return sum(float(s.rpartition(" ")[2]) for s in lines if all(f'{k}="{v}"' in s for k, v in labels.items()))

    assert value("rayk_requests", phase="claimed") == 3
    assert value("rayk_alloc_seconds_count") == value("rayk_claim_seconds_count") == 3
    assert value("rayk_pages") == 2 * 16 + 8
    assert value("rayk_replica_state", state="ready") == 2 + 1
    assert value("rayk_tokens_total", kind="prompt") == 9
    assert value("rayk_tokens_total", kind="generated") == value("vllm_generation_tokens_total") == 12
    assert value("rayk_ttft_seconds_count") == value("vllm_time_to_first_token_seconds_count") == 3
    assert "request_id" not in text
