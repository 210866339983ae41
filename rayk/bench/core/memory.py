"""What a replica keeps beside its page tensors, whether its size slows it down, and how it starts; each in a process of
its own.

Bytes are what Python and numpy allocate (tracemalloc), tables, stacks and their slack included. Page tensors are
torch's and contexts are the caller's: neither counts. `python -m rayk.bench.core.memory memory|start PAGES` prints one
line of JSON: see Memory, Start.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import torch

from rayk.bench.core.cache import PAGE_SIZE, core_params, make_contexts, make_manager, random_prompts
from rayk.bench.core.decode import decode_each, start_batch
from rayk.bench.core.lookups import ENTRIES, FLEETS, Indexed
from rayk.bench.core.prompts import PROMPT, crowded, serve, start
from rayk.context import TextContext
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.replica import ReplicaCore
from rayk.manager.manager import PagedKVCacheManager

if TYPE_CHECKING:
    from rayk.scheduler.router.prefix_index import PrefixIndex

PAGES = 1_000_000
LONG_PROMPTS, SHORT_PROMPTS, RUNNING = 512, 16_384, 1024
REPEAT, REQUESTS, STEPS, BATCH = 5, 300, 64, 32


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per cached page of prompts of 1,024 tokens, per cached page that is alone in its segment of the tree, per
    running request of 1,024 tokens beside its pages, and per entry of the scheduler's index. Then of a full core of
    `pages` pages: tokens in its pages, running requests, resident bytes beyond the page tensors, and the CPU time of a
    request that evicts and of a decode step there over that on a core with a hundredth of everything.
    """

    cached_page: float
    page_alone: float
    running_request: float
    index_entry: float
    pages: int
    tokens: int
    running: int
    beyond_bytes: int
    request_slowdown: float
    step_slowdown: float


class Start(msgspec.Struct, frozen=True):
    """CPU seconds of the starting thread, wall seconds, and bytes of resident memory beside the page tensors."""

    cpu_s: float
    wall_s: float
    beyond_bytes: int


def measure_memory(pages: int = PAGES) -> Memory:
    """Measure in a fresh process."""
    return msgspec.json.decode(_in_process("memory", pages), type=Memory)


def measure_start(pages: int = PAGES) -> Start:
    """Start a core of `pages` pages in a fresh process."""
    return msgspec.json.decode(_in_process("start", pages), type=Start)


def _in_process(what: str, pages: int) -> str:
    command = [sys.executable, "-m", "rayk.bench.core.memory", what, str(pages)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- inside the process ----------------------------------------------------------------------------------------------


def traced(make: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that `make()` leaves allocated, and its result."""
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], made
    finally:
        tracemalloc.stop()


def bytes_per_cached_page(prompts: int, length: int) -> float:
    """Growth from a manager full of the pages of `prompts` prompts of `length` tokens to one of twice as many."""
    pages = prompts * (length // PAGE_SIZE)
    return (_bytes_of_cached(2 * prompts, length) - _bytes_of_cached(prompts, length)) / pages


def _bytes_of_cached(prompts: int, length: int) -> int:
    """Of a manager that holds those pages and one more, for the token that every prompt ends with."""

    def fill() -> PagedKVCacheManager:
        manager = make_manager(prompts * (length // PAGE_SIZE) + 1)
        for first in range(0, prompts, 100):
            made = random_prompts(min(100, prompts - first), length + 1, seed=first)
            serve(manager, make_contexts(made, f"{first}-"))
        return manager

    return traced(fill)[0]


def bytes_per_running_request(requests: int, per_page: float) -> float:
    """Growth from `requests` running requests of 1,024 tokens to twice as many, their cached pages left out.

    A power of two: the block table doubles its rows, and is full at both ends then.
    """
    grown = (_bytes_of_running(2 * requests) - _bytes_of_running(requests)) / requests
    return grown - per_page * (PROMPT // PAGE_SIZE)


def _bytes_of_running(requests: int) -> int:
    contexts = make_contexts(random_prompts(requests, PROMPT + 1))

    def run() -> PagedKVCacheManager:
        manager = make_manager(requests * (PROMPT // PAGE_SIZE + 1))
        start(manager, contexts)
        return manager

    return traced(run)[0]


def bytes_per_index_entry(replicas: int, entries: int) -> float:
    """Of an index of `entries` entries, their keys included."""

    def fill() -> PrefixIndex:
        indexed = Indexed(replicas, entries)
        index = indexed.index
        indexed.requests.clear()
        return index

    kept, index = traced(fill)
    return kept / len(index)


def slowdown(work: Sequence[Callable[[], float]]) -> float:
    """The time of the second piece of work over that of the first: medians of turns, after one to warm up."""
    times = [[each() for each in work] for _ in range(REPEAT + 1)][1:]
    return median(second for _, second in times) / median(first for first, _ in times)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _page_bytes(pages: int) -> int:
    params, before = core_params(), _resident()
    buffers = PageBuffers(params, pages, params.replica_devices(0))
    grown = _resident() - before
    del buffers
    return grown


def _start(pages: int) -> Start:
    make_manager(1000)  # imports and first calls are not the core's
    page_bytes = _page_bytes(pages)
    before, cpu, wall = _resident(), thread_time(), perf_counter()
    core = ReplicaCore(core_params(), 0, pages, 256)
    cpu, wall = thread_time() - cpu, perf_counter() - wall
    beyond = _resident() - before - page_bytes
    assert core.usage.free == pages
    return Start(cpu, wall, beyond)


def _measure(pages: int) -> Memory:
    torch.set_num_threads(1)
    serve(make_manager(100), make_contexts(random_prompts(1, PAGE_SIZE)))  # what is imported late is not the cache's
    cached_page = bytes_per_cached_page(LONG_PROMPTS, PROMPT)
    page_alone = bytes_per_cached_page(SHORT_PROMPTS, PAGE_SIZE)
    running_request = bytes_per_running_request(RUNNING, cached_page)
    page_bytes = _page_bytes(pages)
    small, before = crowded(pages // 100), _resident()
    large = crowded(pages)
    gc.collect()
    beyond = _resident() - before - page_bytes
    running = large.get_num_used_pages(0) // (PROMPT // PAGE_SIZE + 1)
    gc.freeze()
    gc.disable()
    return Memory(
        cached_page=cached_page,
        page_alone=page_alone,
        running_request=running_request,
        pages=pages,
        tokens=pages * PAGE_SIZE,
        running=running,
        beyond_bytes=beyond,
        request_slowdown=slowdown([_requests(small), _requests(large)]),
        step_slowdown=slowdown([_steps(small), _steps(large)]),
        index_entry=bytes_per_index_entry(FLEETS[-1], ENTRIES),  # last: what it frees would hide what is resident
    )


def _requests(manager: PagedKVCacheManager) -> Callable[[], float]:
    prompts = random_prompts((REPEAT + 1) * REQUESTS, PROMPT)
    batches = iter([prompts[at : at + REQUESTS] for at in range(0, len(prompts), REQUESTS)])
    return lambda: serve(manager, make_contexts(next(batches)))


def _steps(manager: PagedKVCacheManager) -> Callable[[], float]:
    contexts: list[TextContext] = start_batch(manager, BATCH)
    return lambda: decode_each(manager, contexts, STEPS)


if __name__ == "__main__":
    measure: Any = {"memory": _measure, "start": _start}[sys.argv[1]]
    print(msgspec.json.encode(measure(int(sys.argv[2]))).decode())
