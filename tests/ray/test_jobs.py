"""Load tests as jobs on three nodes, by the examples: what their logs say, what comes back, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Submit = Callable[..., "subprocess.Popen[str]"]
KEEP = "import json, os, sys; print(json.dumps(dict(os.environ)), flush=True); sys.stdin.read()"
SMALL = ["--scale", "0.05", "--page-size", "16", "--layers", "1", "--head-dim", "4"]


@pytest.fixture(scope="module")
def cluster(repo: Path) -> Iterator[dict[str, str]]:
    """The environment of drivers of three nodes, of which one has the dashboard."""
    script = [sys.executable, str(repo / "examples" / "multinode" / "local.py"), "--dashboard"]
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(
        [*script, "--", sys.executable, "-c", KEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
    ) as nodes:
        assert nodes.stdin is not None and nodes.stdout is not None
        assert nodes.stdout.readline().startswith("3 nodes: RAY_ADDRESS=")
        yield json.loads(nodes.stdout.readline())
        nodes.stdin.close()
        assert nodes.wait(60) == 0


@pytest.fixture
def submit(cluster: dict[str, str], repo: Path, tmp_path: Path) -> Submit:
    def start(*flags: str, **own: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(repo / "examples" / "jobs" / "bench.py"), *flags]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**cluster, "PATH": f"{Path(sys.executable).parent}:{cluster['PATH']}", **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_a_job_on_three_nodes_brings_its_result_back(submit: Submit, tmp_path: Path) -> None:
    job = submit("--requests", "60", "--replicas", "3", *SMALL)
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 0, out
    log = out[out.index("workload chat:") :]
    assert "60 of 60 completed, 0 failed" in log and "\x1b" not in log and "\r" not in log
    assert '{"command"' not in log and "Connecting to existing Ray" not in log and "fontManager" not in log
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert out.splitlines()[-1] == f"report: {folder.name}/report.html"
    found = json.loads((folder / "result.json").read_text())
    assert found["requests"]["completed"] == 60 and len(found["replicas"]) == 3
    assert (folder / "report.html").stat().st_size > 10_000 and (folder / "latency.png").exists()


def test_a_job_that_cannot_run_says_why_in_its_last_line(submit: Submit, tmp_path: Path) -> None:
    job = submit("--pages", "2", *SMALL)
    out, _ = job.communicate(timeout=200)
    *_, last, status = [line for line in out.splitlines() if "WebSocket" not in line]
    assert job.returncode == 1 and status.endswith(": failed")
    assert last.startswith("rayk: request '") and "a replica has 2; use --pages" in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"RAY_AUTH_TOKEN": "a wrong one"}, "Invalid authentication token"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "Failed to connect to Ray at address: http://127.0.0.1:1."),
    ],
)
def test_who_is_not_let_in_is_told_in_one_line(submit: Submit, own: dict[str, str], says: str) -> None:
    job = submit("--smoke", **own)
    out, _ = job.communicate(timeout=100)
    assert job.returncode == 1 and out.count("\n") == 1 and out.startswith("the job was not submitted: ")
    assert says in out


def test_ctrl_c_stops_the_job_and_keeps_what_it_did(submit: Submit, tmp_path: Path) -> None:
    job = submit("--requests", "20000", "--replicas", "1", *SMALL)  # more than are done by its first line
    assert job.stdout is not None
    while "requests  running" not in (line := job.stdout.readline()):
        assert line, f"it ended with {job.wait()}"
    began = time.monotonic()
    job.send_signal(signal.SIGINT)
    out, _ = job.communicate(timeout=100)
    assert time.monotonic() - began < 30, out  # 3 s after SIGTERM Ray kills
    assert job.returncode == 1 and ": stopped" in out and "Traceback" not in out
    [folder] = tmp_path.iterdir()
    found = json.loads((folder / "result.json").read_text())
    assert found["requests"]["completed"] > 0 and found["faults"][0]["message"] == "stopped by SIGTERM"
