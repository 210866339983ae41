"""Streams over HTTP while a replica is killed: each client gets the answer that nothing disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import ray

from rayk import InferenceSession
from rayk.cli.example_model import write_example_model
from rayk.cluster import Cluster

from ..patience import scaled  # noqa: TID252  # tests/ is no package that has an absolute name
from ..server.conftest import KEY, Served, serve  # noqa: TID252  # as above
from .test_generate import engine_pids

STREAMS = 50
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 40}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}


def body(at: int) -> dict[str, Any]:
    """Every fifth has a shape, every fifth has two answers, every fifth is greedy."""
    asked: dict[str, Any] = {"prompt": [40 + at] * 20, "max_tokens": 80, "seed": at, "stream": True, "ignore_eos": True}
    match at % 5:
        case 0:
            return asked | {"guided_json": SCHEMA}
        case 1:
            return asked | {"n": 2}
        case 2:
            return asked | {"temperature": 0}
        case _:
            return asked


def texts(served: Served | Another, at: int, begun: threading.Semaphore) -> list[str]:
    """The answers to one request, read to its end."""
    connection = HTTPConnection("127.0.0.1", served.port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body(at)), {"authorization": f"Bearer {KEY}"})
        answer, found = connection.getresponse(), dict[int, str]()
        assert answer.status == 200
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
                begun.release()
        assert line == b"\n"
        return [found[index] for index in sorted(found)]
    finally:
        connection.close()


def test_a_replica_is_killed_in_the_middle_of_50_streams(session: InferenceSession, tmp_path: Path) -> None:
    write_example_model(tmp_path / "tiny", steps=2)
    with (
        Cluster(tmp_path / "tiny", session, replicas=2, page_size=16, pages=600, max_batch_size=64) as cluster,
        serve(cluster, models=("tiny",)) as served,
        ThreadPoolExecutor(STREAMS) as threads,
    ):
        undisturbed = list(threads.map(lambda at: texts(served, at, threading.Semaphore(0)), range(STREAMS)))
        pids, begun = sorted(engine_pids()), threading.Semaphore(0)
        running = [threads.submit(texts, served, at, begun) for at in range(STREAMS)]
        for _ in range(5 * STREAMS):
            assert begun.acquire(timeout=60)
        os.kill(pids[0], signal.SIGKILL)
        assert not any(each.done() for each in running), "all of them have more to come"
        found = [each.result(120) for each in running]
        assert found == undisturbed
        assert [len(each) for each in found[:3]] == [1, 2, 1]
        assert all("a" in json.loads(each[0]) for at, each in enumerate(found) if at % 5 == 0 and each[0].endswith("}"))
        assert pids[0] not in engine_pids()


class Another(NamedTuple):
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int


@contextmanager
def command(model: Path, name: str, repo: Path) -> Iterator[Another]:
    """`rayk serve` over the cluster of that name."""
    flags = ["--model", str(model), "--name", name, "--address", ray.get_runtime_context().gcs_address, "--port", "0"]
    more = ["--replicas", "2", "--page-size", "16", "--pages", "600", "--grace", "60s"]
    started = [sys.executable, "-m", "rayk", "serve", *flags, *more]
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, cwd=repo) as process:
        try:
            assert process.stderr is not None
            address = next(line.split()[0] for line in process.stderr if "/v1 serves" in line)
            yield Another(process, int(address.removesuffix("/v1").rpartition(":")[2]))
        finally:
            process.kill()


def test_two_servers_over_one_named_cluster(session: InferenceSession, tmp_path: Path, repo: Path) -> None:
    """One is told to stop in the middle: its own streams come to their ends, and the other's do not notice; nor does
    anybody when a replica is killed."""
    write_example_model(tmp_path / "tiny", steps=2)
    with InferenceSession("ray", name="door") as named:
        owner = Cluster(tmp_path / "tiny", named, replicas=2, page_size=16, pages=600)
        try:
            with (
                serve(owner, models=("tiny",)) as first,
                command(tmp_path / "tiny", "door", repo) as second,
                ThreadPoolExecutor(STREAMS) as threads,
            ):
                servers, begun = (first, second), threading.Semaphore(0)
                running = [threads.submit(texts, servers[at % 2], at // 2, begun) for at in range(20)]
                for _ in range(40):
                    assert begun.acquire(timeout=60)
                second.process.terminate()
                found = [each.result(120) for each in running]
                assert found[0::2] == found[1::2], "both say the same"
                assert second.process.wait(60) == 0
                pids, begun = sorted(engine_pids()), threading.Semaphore(0)
                running = [threads.submit(texts, first, at % 10, begun) for at in range(STREAMS)]
                for _ in range(3 * STREAMS):
                    assert begun.acquire(timeout=60)
                os.kill(pids[0], signal.SIGKILL)
                assert [each.result(120) for each in running] == found[0::2] * (STREAMS // 10)
                assert pids[0] not in engine_pids()
        finally:
            owner.shutdown()


@pytest.mark.slow
def test_the_command_is_told_to_stop_while_it_starts(tmp_path: Path, repo: Path) -> None:
    """Ray is starting its processes then, and would abort."""
    write_example_model(tmp_path / "tiny", steps=2)
    flags = ["--model", str(tmp_path / "tiny"), "--runtime", "ray", "--port", "0", "--pages", "64"]
    started = [sys.executable, "-m", "rayk", "serve", *flags]
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, cwd=repo) as process:
        try:
            own = psutil.Process(process.pid)
            while not (children := own.children()):
                assert process.poll() is None
            process.terminate()
            _, said = process.communicate(timeout=scaled(120))
            assert process.returncode == 0 and "Fatal" not in said and "Traceback" not in said, said
            assert "stopped before it served anything" in said
            assert not psutil.wait_procs(children, timeout=scaled(30))[1]
        finally:
            process.kill()
