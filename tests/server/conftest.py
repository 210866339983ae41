"""One example model, and one server over two replicas in this process, for all tests of a file."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import openai
import pytest

from rayk.cli.example_model import write_example_model
from rayk.cluster import Cluster
from rayk.server.process import Process
from rayk.server.settings import ServerSettings

KEY = "sk-of-these-tests"


class Served:
    """A running server, and clients of it."""

    def __init__(
        self, cluster: Cluster, port: int, process: Process, thread: threading.Thread, opened: ExitStack
    ) -> None:
        self.cluster, self.port, self.process, self.thread = cluster, port, process, thread
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60)
        self._opened = opened
        opened.callback(self.client.close)

    def connect(self) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        self._opened.callback(connection.close)
        return connection

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        """An answer whose body is still to be read."""
        connection = self.connect()
        headers = {"authorization": f"Bearer {KEY}"} | headers
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        self._opened.callback(answer.close)
        return answer

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a POST, or of a GET without a body."""
        answer = self.send("GET" if body is None else "POST", path, body, **headers)
        return answer.status, json.loads(answer.read())


@contextmanager
def serve(cluster: Cluster, **settings: Any) -> Iterator[Served]:
    """A server in a thread; it is told to stop at the end, and has to."""
    made = ServerSettings(**({"models": ("tiny",), "keys": ("another", KEY), "grace": 20.0} | settings))
    ports: queue.Queue[int] = queue.Queue()
    process = Process(cluster, made, "127.0.0.1", 0, ports.put)
    thread = threading.Thread(target=process.run, name="server")
    thread.start()
    try:
        with ExitStack() as opened:
            yield Served(cluster, ports.get(timeout=60), process, thread, opened)
    finally:
        process.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, hardly trained: its answers are long."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_example_model(path, steps=20)
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with (
        Cluster(folder, replicas=2, page_size=16, pages=400, max_batch_size=64) as cluster,
        serve(cluster, tool_parser="hermes", heartbeat=0.5) as found,
    ):
        yield found
