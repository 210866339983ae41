"""Clusters started as an operator starts them, and drivers of them in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name

HEAD = (
    "start --head --block --node-ip-address=127.0.0.1 --include-dashboard=false --metrics-export-port=0 "
    "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 --runtime-env-agent-port=0 --min-worker-port=0 "
    "--max-worker-port=0 --disable-usage-stats --include-log-monitor=false --no-monitor"
)
ONCE = """
import json, os, sys, time, rayk
import rayk.manager.lease as client
from rayk import *

client.LEASE_SECONDS = 1.0 * SCALE
p = MHAKVCacheParams(dtype="float32", head_dim=4, num_layers=1, n_kv_heads=1, page_size=4, devices=["cpu"] * 2,
                     data_parallel_degree=2, enable_prefix_caching=True)
ADDRESS, NAME = sys.argv[1], sys.argv[2] or None

def join():
    return InferenceSession(runtime="ray", address=ADDRESS, name=NAME, log_to_driver=False)

def manage(session):
    return PagedKVCacheManager(p, session, 16, max_batch_size=4)

def pid(inputs, batch):
    return os.getpid()

def say(**what):
    print(json.dumps(what), flush=True)

def groups():
    from ray.util import placement_group_table
    return sum(g["state"] != "REMOVED" for g in placement_group_table().values())
"""
Driver = subprocess.Popen[str]
Start = Callable[..., Driver]
Head = tuple[str, dict[str, str]]
"""Its address, and the environment of drivers, without tokens."""


WARM = Path(__file__).parent / "warm"
CHECKPOINTS = "transformers.modeling_utils"
"""Most of what loading a checkpoint imports."""


@contextlib.contextmanager
def warm_workers(folder: Path, *imports: str) -> Iterator[dict[str, str]]:
    """For the environment of clusters: their workers are forked of a process that has imported torch and `imports`.

    See warm/process.py. With RAYK_COLD_WORKERS in the environment of the tests they start as ever.
    """
    if "RAYK_COLD_WORKERS" in os.environ:
        yield {}
        return
    place = folder / "warm"
    command = [sys.executable, str(WARM / "process.py"), str(place), *imports]
    # One thread, as Ray has it for workers, so that there are no others; and CUDA is asked for without being begun.
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        path = [str(WARM), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {"RAYK_WARM": str(place), "PYTHONPATH": os.pathsep.join(path), "RAY_prestart_worker_first_driver": "0"}


@contextlib.contextmanager
def ray_head(folder: Path, cpus: int, store: int, **more: str) -> Iterator[Head]:
    """A cluster of one node, whose processes end with it; `more` is for its own environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own = [f"--port={port}", f"--temp-dir={folder}", f"--num-cpus={cpus}", f"--object-store-memory={store}"]
    log = folder / "ray-start.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *HEAD.split(), *own],
            env=environment | more,
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: "--block" in log.read_text() or head.poll() is not None, 60)
        assert head.poll() is None, log.read_text()
        yield f"127.0.0.1:{port}", environment
    finally:
        family = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
            family += [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(process)
            psutil.wait_procs(family, timeout=5)
        head.wait(10)


def stderr(driver: Driver) -> str:
    return Path(driver.args[1]).with_suffix(".err").read_text()  # type: ignore[index, arg-type]


def tell(driver: Driver) -> None:
    """Let it go on."""
    assert driver.stdin is not None
    driver.stdin.write("go\n")
    driver.stdin.flush()


def said(driver: Driver) -> dict[str, Any]:
    """The next line of a driver's output."""
    assert driver.stdout is not None
    line = driver.stdout.readline()
    while "(raylet)" in line:  # Ray shows its warnings there, such as that of a process that was killed
        line = driver.stdout.readline()
    assert line, f"it ended with {driver.wait(10)}: {stderr(driver)}"
    found: dict[str, Any] = json.loads(line)
    return found
