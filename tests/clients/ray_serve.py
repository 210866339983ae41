"""examples/serve by Ray Serve's own command, in a Ray of its own: two ingress replicas over a named cluster, one of
which is killed while the openai client asks.

    python tests/clients/ray_serve.py [MODEL]    # needs ray[serve]; make clients runs it
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import psutil
import ray
from ray import serve

from rayk.cli.example_model import write_example_model

REPO = Path(__file__).parents[2]
ASKED: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


def until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it does not come to that: {what}"
        time.sleep(0.2)


def ingress() -> list[int]:
    """Processes of ingress replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:rayk:rayk-ingress" in " ".join(process.cmdline()):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def running() -> int:
    """Ingress replicas that Serve has, and takes for healthy."""
    application = serve.status().applications.get("rayk")
    if application is None or application.status != "RUNNING":
        return 0
    return application.deployments["rayk-ingress"].replica_states.get("RUNNING", 0)


class Load:
    """Threads that ask until they are told to stop. `wrong`: answers that are none."""

    def __init__(self, url: str, threads: int, **more: Any) -> None:
        self.right, self.wrong = 0, list[Any]()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, more)) for _ in range(threads)]
        for each in self._threads:
            each.start()

    def _ask(self, url: str, more: dict[str, Any]) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5, timeout=60)
        while not self._over.is_set():
            try:
                answer = client.chat.completions.create(messages=CHAT, **ASKED | more).choices[0].message.content
            except openai.OpenAIError as error:
                self.wrong.append(error)
                continue
            if more or answer == PARIS:
                self.right += 1
            else:
                self.wrong.append(answer)

    def end(self) -> str:
        self._over.set()
        for each in self._threads:
            each.join()
        assert self.right and not self.wrong, self.wrong[:3]
        return f"{self.right} answers right, {len(self.wrong)} wrong"


def main(model: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        config = Path(name) / "config.yaml"
        if model is None:
            model = Path(name) / "tiny"
            write_example_model(model)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        url = f"http://127.0.0.1:{port}"
        config.write_text((REPO / "examples/serve/config.yaml").read_text() + f"\nhttp_options: {{port: {port}}}\n")
        paths = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, str(REPO))
        ray.init(
            "local", num_cpus=4, include_dashboard=False, log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )  # fmt: skip
        address = ray.get_runtime_context().gcs_address
        env = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": paths}
        try:
            subprocess.run([sys.executable, "examples/serve/app.py", str(model)], cwd=REPO, env=env, check=True)
            command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
            with subprocess.Popen(command, cwd=REPO, env=env) as process:
                until(lambda: running() == 2, "two ingress replicas run")
                request = Request(f"{url}/health", headers={"x-request-id": "mine"})
                with urlopen(request) as answer:
                    assert answer.status == 200 and answer.headers["x-request-id"] == "mine"
                load = Load(url, 4)
                until(lambda: load.right > 20, "twenty answers")
                before = ingress()
                os.kill(before[0], signal.SIGKILL)
                until(lambda: before[0] not in ingress(), "it is dead")
                until(lambda: running() == 2 and len(ingress()) == 2, "another took its place")
                print(f"serve run: one of two ingress replicas killed; {load.end()}")
                process.send_signal(signal.SIGINT)
                process.wait(60)
            serve.shutdown()
        finally:
            subprocess.run([sys.executable, "-m", "rayk", "down", "prod", "--address", address], env=env)
            ray.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
