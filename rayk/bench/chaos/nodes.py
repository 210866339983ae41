"""Simulated nodes: `ray start` of this machine, beside the one that the session began. Each is a tree of processes,
which is killed as a whole, as when a machine loses power."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from rayk.actors.address import make_temp_dir
from rayk.errors import ConfigError

COMMAND = (
    "start --block --disable-usage-stats --num-cpus=1 --object-store-memory=80000000 --metrics-export-port=0 "
    "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 --runtime-env-agent-port=0 --min-worker-port=0 "
    "--max-worker-port=0"
)
END_SECONDS = 10.0


class SimulatedNodes:
    """Nodes of the cluster at `address`; close() ends them and removes their files."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._nodes: list[tuple[subprocess.Popen[bytes], str]] = []

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self) -> None:
        """One more; it joins some seconds later."""
        folder = make_temp_dir()  # a raylet's files must not be its neighbour's
        command = [sys.executable, "-m", "ray.scripts.scripts", *COMMAND.split()]
        node = subprocess.Popen(
            [*command, f"--address={self._address}", f"--temp-dir={folder}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._nodes.append((node, folder))

    def mend(self) -> None:
        """Begin those again that ended by themselves, as a busy machine makes them."""
        for at in [at for at, (node, _) in enumerate(self._nodes) if node.poll() is not None][::-1]:
            self._end(at)
            self.add()

    def kill(self, draw: int) -> set[int]:
        """One of them: the processes that are gone."""
        return self._end(draw % len(self._nodes))

    def _end(self, at: int) -> set[int]:
        node, folder = self._nodes.pop(at)
        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=END_SECONDS)
            shutil.rmtree(folder, ignore_errors=True)
            return {process.pid for process in family}
        shutil.rmtree(folder, ignore_errors=True)
        return set()

    def close(self) -> None:
        """End all."""
        while self._nodes:
            self._end(0)


@contextmanager
def simulated_nodes(count: int, address: str) -> Iterator[SimulatedNodes]:
    """So many beside the one that is there."""
    nodes = SimulatedNodes(address)
    try:
        for _ in range(count):
            nodes.add()
        yield nodes
    except FileNotFoundError as error:
        raise ConfigError(f"no node can be started: {error}") from None
    finally:
        nodes.close()
