"""The end of a server: what is open comes to its end, or is ended when its time is up; nothing new is taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path

import pytest

from rayk.cluster import Cluster
from rayk.server.process import ACCEPTED, starting

from .conftest import serve

LONG = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True, "temperature": 0}


def test_streams_finish_and_nothing_new_is_taken(folder: Path) -> None:
    with Cluster(folder, page_size=16, pages=400) as cluster:
        [want] = cluster.generate("a", max_tokens=400, ignore_eos=True)
        with serve(cluster, grace=60.0) as served:
            stream = served.send("POST", "/v1/completions", LONG)
            begun = stream.read(10)
            waiting = served.connect()  # connections that there are stay open
            waiting.connect()
            served.process.stop()
            while served.ask("/ready")[0] != 503:
                pass
            status, found = served.ask("/v1/completions", {"prompt": "a"})
            assert status == 503 and found["error"]["code"] == "draining"
            assert served.ask("/health")[0] == 200
            events = (begun + stream.read()).split(b"\n\n")
            assert events[-2] == b"data: [DONE]"
            text = "".join(json.loads(each[6:])["choices"][0]["text"] for each in events[:-2])
            assert text == want.text
            served.thread.join(timeout=60)
            assert not served.thread.is_alive()


def test_connections_that_come_at_once_are_taken_at_once(folder: Path) -> None:
    """A pass of the event loop may have the events of many streams to write: one connection in each would be slow."""
    with Cluster(folder, page_size=16, pages=40) as cluster, serve(cluster) as served:
        loop, found = served.process._loop, Future[int]()
        assert loop is not None

        def count(passes: int) -> None:
            if passes:
                loop.call_soon(count, passes - 1)
            else:
                found.set_result(len(served.process.server_state.connections))

        def connect() -> None:
            for _ in range(ACCEPTED):
                served.connect().connect()
            count(3)

        loop.call_soon_threadsafe(connect)
        assert found.result(30) == ACCEPTED


def test_what_is_open_after_the_grace_time_is_ended(folder: Path) -> None:
    with Cluster(folder, page_size=16, pages=400) as cluster:
        with serve(cluster, grace=0.1) as served:
            stream = served.send("POST", "/v1/completions", LONG | {"max_tokens": 3500})
            assert stream.read(10)
            served.process.stop()
            events = stream.read().split(b"\n\n")
            assert json.loads(events[-3][6:])["error"]["code"] == "draining" and events[-2] == b"data: [DONE]"
            served.thread.join(timeout=60)
        while cluster.stats().running:
            threading.Event().wait(0.01)
        cluster.check_integrity()


def test_a_signal_waits_while_a_server_starts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with starting() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_the_command_ends_with_0_when_it_is_told_to(folder: Path, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1\n")
    command = [sys.executable, "-m", "rayk", "serve", "--model", str(folder), "--runtime", "inline", "--port", "0"]
    more = ["--served-model-name", "m", "--pages", "64", "--api-key-file", str(tmp_path / "keys")]
    process = subprocess.Popen(command + more, stderr=subprocess.PIPE, text=True, cwd=repo, env=dict(os.environ))
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "/v1 serves m" in line:
                break
        url = said[-1].split()[0]
        request = urllib.request.Request(f"{url}/models", headers={"authorization": "Bearer sk-1"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "m"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/models", timeout=30)
        assert refused.value.code == 401
        refused.value.close()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 0, rest
        assert "sk-1" not in "".join(said) + rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
