"""Streams over HTTP while a replica is killed: each client gets the answer that nothing disturbed."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from rayk import InferenceSession
from rayk.cli.example_model import write_example_model
from rayk.cluster import Cluster

from ..server.conftest import KEY, Served, serve  # noqa: TID252  # tests/ is no package that has an absolute name
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


def texts(served: Served, at: int, begun: threading.Semaphore) -> list[str]:
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


def test_two_servers_over_one_named_cluster(session: InferenceSession, tmp_path: Path) -> None:
    """One stops in the middle: its own streams come to their ends, and the other's do not notice."""
    write_example_model(tmp_path / "tiny", steps=2)
    with InferenceSession("ray", name="door") as named:
        owner = Cluster(tmp_path / "tiny", named, replicas=2, page_size=16, pages=600, max_batch_size=64)
        guest = Cluster.attached(InferenceSession("ray", name="door"), own_session=True)
        try:
            with serve(owner, models=("tiny",)) as first, ThreadPoolExecutor(20) as threads:
                with serve(guest, models=("tiny",), grace=60.0) as second:
                    servers, begun = (first, second), threading.Semaphore(0)
                    running = [threads.submit(texts, servers[at % 2], at // 2, begun) for at in range(20)]
                    for _ in range(40):
                        assert begun.acquire(timeout=60)
                # the second has stopped, after its streams had ended
                found = [each.result(120) for each in running]
                assert found[0::2] == found[1::2], "both say the same"
                guest.close()
                assert texts(first, 2, begun) == found[4]
        finally:
            guest.close()
            owner.shutdown()
