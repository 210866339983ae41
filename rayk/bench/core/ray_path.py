"""What a decode iteration costs on Ray: messages, bytes, and CPU time of the driver and of the replicas.

One iteration is one tick() over all replicas: commit what the last forward filled, allocate for the next token, run a
forward that returns one token a request. It is measured on an embedded Ray of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from time import perf_counter, thread_time_ns
from typing import Any, NamedTuple

import numpy as np
import psutil

from rayk.bench.core.cache import core_params, make_contexts, random_prompts
from rayk.bench.core.prompts import PROMPT
from rayk.context import TextContext
from rayk.kvcache.tick import Tick
from rayk.manager.calls import Calls
from rayk.manager.manager import PagedKVCacheManager
from rayk.params import MHAKVCacheParams
from rayk.session import InferenceSession

REPLICAS, BATCH = 2, 32
ITERATIONS, WARM_UP = 300, 50
PAGES = 4000


class PathCost(NamedTuple):
    """Of one decode iteration: messages to a replica. Then of one request in it: bytes there and back, microseconds
    of CPU of the driver's thread and of a replica's process. And the wall milliseconds of an iteration.
    """

    calls: float
    sent: float
    received: float
    driver_us: float
    replica_us: float
    iteration_ms: float


def next_tokens(inputs: Any, batch: Sequence[TextContext]) -> bytes:
    """A forward that samples the same token for everybody; int32 [len(batch)]."""
    return np.ones(len(batch), np.int32).tobytes()


def ray_params(replicas: int) -> MHAKVCacheParams:
    """The core's parameters, for several replicas on the CPU."""
    return replace(core_params(), data_parallel_degree=replicas, devices=["cpu"] * replicas)


def measure_ray_path() -> PathCost:
    """Start a cluster, decode, and stop it."""
    with InferenceSession(runtime="ray", address="local") as session:
        manager = PagedKVCacheManager(ray_params(REPLICAS), session, PAGES, max_batch_size=BATCH)
        return decode_cost(manager, REPLICAS, BATCH, ITERATIONS, WARM_UP)


def decode_cost(manager: PagedKVCacheManager, replicas: int, batch: int, iterations: int, warm_up: int) -> PathCost:
    """The cost of decoding `batch` requests on each replica of a manager on Ray."""
    calls = manager._calls
    assert isinstance(calls, Calls)
    lanes = start_lanes(manager, replicas, batch)
    for _ in range(warm_up):
        iterate(manager, lanes)
    pids = calls.replica_pids()
    before, cpu_before = calls.traffic(), cpu_seconds(pids)
    start, wall = thread_time_ns(), perf_counter()
    for _ in range(iterations):
        iterate(manager, lanes)
    spent, wall = thread_time_ns() - start, perf_counter() - wall
    cpu = cpu_seconds(pids) - cpu_before
    after = calls.traffic()
    rows = replicas * batch * iterations
    return PathCost(
        calls=sum(a.calls - b.calls for a, b in zip(after, before, strict=True)) / iterations / replicas,
        sent=sum(a.sent - b.sent for a, b in zip(after, before, strict=True)) / rows,
        received=sum(a.received - b.received for a, b in zip(after, before, strict=True)) / rows,
        driver_us=spent / rows / 1e3,
        replica_us=cpu / rows * 1e6,
        iteration_ms=wall / iterations * 1e3,
    )


def start_lanes(manager: PagedKVCacheManager, replicas: int, batch: int) -> list[list[TextContext]]:
    """`batch` requests on each replica that have their first token; one list a replica."""
    lanes = [make_contexts(random_prompts(batch, PROMPT, seed=r), f"lane{r}-") for r in range(replicas)]
    everybody = [ctx for lane in lanes for ctx in lane]
    manager.try_admit(everybody, [r for r, lane in enumerate(lanes) for _ in lane])
    for ctx in everybody:
        ctx.update(1)
    return lanes


def iterate(manager: PagedKVCacheManager, lanes: Sequence[Sequence[TextContext]]) -> None:
    """One decode iteration: commit, allocate, forward, and take the sampled tokens."""
    results = manager.tick([Tick(step=lane, alloc=lane, execute=lane) for lane in lanes], next_tokens)
    for lane, result in zip(lanes, results, strict=True):
        for ctx, token in zip(lane, np.frombuffer(result.value, np.int32).tolist(), strict=True):
            ctx.update(token)


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of those processes so far."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(float(t.user + t.system) for t in times)
