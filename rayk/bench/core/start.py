"""How long the core of a large replica takes to start, and what it weighs beyond its pages; in a process of its own.

`python -m rayk.bench.core.start PAGES` prints one line of JSON: see Start.
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

PAGES = 1_000_000


class Start(msgspec.Struct, frozen=True):
    """CPU seconds of the starting thread, wall seconds, and bytes of resident memory beside the page tensors."""

    cpu_s: float
    wall_s: float
    beyond_bytes: int


def measure_start(pages: int) -> Start:
    """Start a core of `pages` pages in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "rayk.bench.core.start", str(pages)], capture_output=True, text=True, check=True
    )
    return msgspec.json.decode(done.stdout, type=Start)


def _measure(pages: int) -> Start:
    from time import perf_counter, thread_time

    import psutil

    from rayk.bench.core.cache import core_params, make_manager
    from rayk.kvcache.buffers import PageBuffers
    from rayk.kvcache.replica import ReplicaCore

    def resident() -> int:
        return int(psutil.Process(os.getpid()).memory_info().rss)

    params = core_params()
    make_manager(1000)  # imports and first calls are not the core's
    before = resident()
    buffers = PageBuffers(params, pages, params.replica_devices(0))
    pages_bytes = resident() - before
    del buffers
    before, cpu, wall = resident(), thread_time(), perf_counter()
    core = ReplicaCore(params, 0, pages, 256)
    cpu, wall = thread_time() - cpu, perf_counter() - wall
    beyond = resident() - before - pages_bytes
    assert core.usage.free == pages
    return Start(cpu, wall, beyond)


if __name__ == "__main__":
    print(msgspec.json.encode(_measure(int(sys.argv[1]))).decode())
