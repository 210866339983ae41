"""CUDA IPC between two processes on one GPU: a pool is mapped, pages arrive, and its speed beside a plain copy."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from rayk import MHAKVCacheParams
from rayk.kvcache.buffers import PageBuffers
from rayk.transport.choice import Peer
from rayk.transport.cuda import CudaMemory
from rayk.transport.line import PageExportRef
from rayk.transport.pools import PoolLine

PAGES = 64
FOREVER = float("inf")


def pool() -> PageBuffers:
    params = MHAKVCacheParams(
        dtype="bfloat16", n_kv_heads=8, head_dim=128, num_layers=32, page_size=128, devices=["cuda:0"]
    )
    return PageBuffers(params, PAGES, ["cuda:0"])


def own(pipe: Connection) -> None:
    """The source's process: page p is full of p + 1; answers each message with an offer, until the pipe closes."""
    held = torch.empty(3 << 20, dtype=torch.uint8, device="cuda:0")  # so that the pool is not the first allocation
    source = pool()
    for raw in source.all_bytes:
        for page in range(PAGES + 1):
            raw[page] = page + 1
    line, made = PoolLine(CudaMemory(source.all_bytes)), 0
    while (pages := pipe.recv()) is not None:
        made += 1
        pipe.send(line.offer(Peer(1, 1), made, np.array(pages, np.int32)))
    del held


@pytest.fixture
def source(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Connection, multiprocessing.process.BaseProcess]]:
    monkeypatch.syspath_prepend(repo)  # where the other process finds this module
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=own, args=(there,))
    process.start()
    yield here, process
    if process.is_alive():
        here.send(None)
    process.join(30)


def median(work: Callable[[], object]) -> float:
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        began = perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return sorted(times)[4]


def test_pages_of_another_process(source, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, process = source
    target = pool()
    line = PoolLine(CudaMemory(target.all_bytes))
    theirs = np.random.default_rng(0).permutation(PAGES)[:32].astype(np.int32)
    mine = np.random.default_rng(1).permutation(PAGES)[:32].astype(np.int32)
    pipe.send(theirs.tolist())
    export = PageExportRef(Peer(0, 1), 1, theirs, pipe.recv(), FOREVER)
    line.fetch(export, 0, mine)
    [raw] = target.all_bytes
    for to, of in zip(mine.tolist(), theirs.tolist(), strict=True):
        assert bool((raw[to] == of + 1).all())
    untouched = sorted(set(range(PAGES)) - set(mine.tolist()))
    assert not bool(raw[untouched].any())
    plain_source, plain_target = (torch.empty(32, raw.shape[1], dtype=torch.uint8, device="cuda:0") for _ in range(2))
    size = 32 * raw.shape[1]
    plain = median(lambda: plain_target.copy_(plain_source))
    ours = median(lambda: line.fetch(export, 0, mine))
    one = median(lambda: line.fetch(export, 0, mine[:1]))
    with capsys.disabled():
        print(f"\ncuda-ipc, 32 pages of {raw.shape[1] >> 20} MiB: {size / ours / 1e9:.0f} GB/s (bytes copied)")
        print(f"plain device-to-device copy of as much: {size / plain / 1e9:.0f} GB/s; ratio {plain / ours:.2f}")
        print(f"one page: {one * 1e6:.0f} us")
    process.kill()
    process.join(30)
    line.drop(0)
    assert bool((raw[int(mine[0])] == int(theirs[0]) + 1).all())  # the device works on
