"""Joining a cluster that asks for a token: one line for people, and nothing of Ray's own below it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .forwards import until

HEAD = (
    "start --head --block --node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=80000000 "
    "--include-dashboard=false --metrics-export-port=0 --dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 "
    "--runtime-env-agent-port=0 --min-worker-port=0 --max-worker-port=0 --disable-usage-stats"
)
JOIN = """
import sys
from rayk import InferenceSession, RaykError
try:
    with InferenceSession("ray", sys.argv[1], log_to_driver=False, logging_level="error"):
        print("joined")
except RaykError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def guarded(ray_tmpdir: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and environment of a cluster that lets in who has its token; the processes end with it."""
    folder = ray_tmpdir / "tok"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = folder / "start.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *HEAD.split(), f"--port={port}", f"--temp-dir={folder}"],
            env=environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the right one"},
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: "--block" in log.read_text() or head.poll() is not None, 60)
        assert head.poll() is None, log.read_text()
        yield f"127.0.0.1:{port}", environment
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(process)
            psutil.wait_procs(family, timeout=5)
        head.wait(10)


def join(guarded: tuple[str, dict[str, str]], **own: str) -> tuple[str, str]:
    """What a driver says on stdout and on stderr."""
    place, environment = guarded
    done = subprocess.run(
        [sys.executable, "-c", JOIN, place], env=environment | own, capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({}, "it is not set here"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_TOKEN is not set here"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a wrong one"}, "RAY_AUTH_TOKEN here has another"),
    ],
)
def test_who_has_no_token_is_told_what_to_set(
    guarded: tuple[str, dict[str, str]], own: dict[str, str], says: str
) -> None:
    out, err = join(guarded, **own)
    assert out.startswith("ConfigError the Ray cluster at '127.0.0.1:") and says in out and "RAY_AUTH_MODE" in out
    assert out.count("\n") == 1 and err == ""


def test_who_has_it_is_let_in(guarded: tuple[str, dict[str, str]]) -> None:
    out, _ = join(guarded, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="the right one")
    assert out == "joined\n"
