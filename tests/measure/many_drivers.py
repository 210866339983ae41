"""Many drivers of one named manager at once: `python tests/measure/many_drivers.py [DRIVERS] [BATCHES] [PROCESSES]`.

On an embedded Ray with 4 replicas each driver is a session of its own, 25 to a process unless said otherwise. All begin
together, and each admits batches of 8 requests by the cost router, takes one decode step for each, and releases them.
Printed: requests a second, the time of an admission at the median and at the 99th percentile, and what was lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from rayk.context import TextContext
from rayk.kvcache.tick import Tick
from rayk.manager.manager import PagedKVCacheManager
from rayk.params import MHAKVCacheParams
from rayk.session import InferenceSession

REPLICAS, BATCH, PROMPT, PAGES = 4, 8, 64, 20_000
NAME = "many-drivers"


def params() -> MHAKVCacheParams:
    """Of small pages."""
    shape: dict[str, Any] = {"dtype": "int8", "n_kv_heads": 1, "head_dim": 1, "num_layers": 1, "page_size": 16}
    return MHAKVCacheParams(
        devices=["cpu"] * REPLICAS, data_parallel_degree=REPLICAS, enable_prefix_caching=True, **shape
    )


def drive(manager: PagedKVCacheManager, who: str, batches: int, begin: threading.Barrier) -> list[float]:
    """Seconds of each admission. AssertionError for a request that is not where it was admitted."""
    seconds = []
    begin.wait()
    for number in range(batches):
        prompts = np.arange(PROMPT, dtype=np.int32) + number
        batch = [TextContext(f"{who}-{number}-{i}", prompts + 1000 * i, PROMPT + 32) for i in range(BATCH)]
        began = time.perf_counter()
        placed = manager.admit(batch)
        seconds.append(time.perf_counter() - began)
        lanes = [[ctx for ctx, r in zip(batch, placed, strict=True) if r == replica] for replica in range(REPLICAS)]
        for ctx in batch:
            ctx.update(1)
        done = manager.tick([Tick(step=lane, release=[ctx.request_id for ctx in lane]) for lane in lanes])
        assert all(each.error is None and each.released == len(lane) for each, lane in zip(done, lanes, strict=True))
    return seconds


def drive_all(address: str | None, who: str, drivers: int, batches: int) -> list[float]:
    """Drivers of one process, a thread each, from the moment on at which something is typed."""
    sessions = [InferenceSession("ray", address, NAME, log_to_driver=False) for _ in range(drivers)]
    managers = [PagedKVCacheManager(params(), each, PAGES, max_batch_size=256, router="cost") for each in sessions]
    begin, seconds, failures = threading.Barrier(drivers + 1), list[float](), list[BaseException]()

    def run(number: int) -> None:
        try:
            seconds.extend(drive(managers[number], f"{who}-{number}", batches, begin))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(drivers)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    begin.wait()
    for thread in threads:
        thread.join()
    for session in reversed(sessions):  # the first one joined Ray for all of them
        session.close()
    if failures:
        raise failures[0]
    return seconds


def main(arguments: Sequence[str]) -> int:
    """The command; see the module."""
    given = [int(each) for each in arguments]
    drivers, batches = given[0] if given else 100, given[1] if len(given) > 1 else 40
    processes = given[2] if len(given) > 2 else -(-drivers // 25)
    with InferenceSession("ray", "local", NAME) as session:
        import ray

        address = ray.get_runtime_context().gcs_address
        with PagedKVCacheManager(params(), session, PAGES, max_batch_size=256, router="cost") as manager:
            shares = [drivers // processes + (i < drivers % processes) for i in range(processes)]
            command = [sys.executable, __file__, "--drive", address]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            started = [
                subprocess.Popen([*command, str(i), str(share), str(batches)], **pipes)
                for i, share in enumerate(shares)
            ]
            for process in started:
                while process.stdout.readline().strip() != "ready":
                    assert process.poll() is None, "a process of drivers ended"
            began = time.monotonic()
            for process in started:
                process.stdin.write("\n")
                process.stdin.flush()
            said = [process.communicate()[0] for process in started]
            took = time.monotonic() - began
            assert not any(process.returncode for process in started), "a driver failed"
            seconds = np.concatenate([json.loads(each.strip().splitlines()[-1]) for each in said])
            manager.check_integrity()
            manager.reset_prefix_cache()
            held = sum(manager.get_num_used_pages(r) for r in range(REPLICAS))
            asked = drivers * batches * BATCH
            print(f"{drivers} drivers in {processes} processes, load {psutil.getloadavg()[0]:.1f}")
            print(
                f"{len(seconds) * BATCH:,} of {asked:,} requests admitted, stepped and released; {held} pages are held"
            )
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            print(
                f"{asked / took:,.0f} requests/s; an admission of {BATCH}: {p50:.0f} ms at the median, p99 {p99:.0f} ms"
            )
            return int(len(seconds) * BATCH != asked or held > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        print(json.dumps(drive_all(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))), flush=True)
    else:
        sys.exit(main(sys.argv[1:]))
