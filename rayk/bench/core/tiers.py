"""What tiers cost: a miss in a cold alloc, pages copied out and in beside a plain memcpy, and decode steps meanwhile.

Each figure compares two pieces of work done in turns in one run: a difference, or a ratio.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from statistics import median
from tempfile import TemporaryDirectory
from time import thread_time_ns
from typing import Any

import numpy as np
import torch

from rayk.bench.core.cache import PAGE_SIZE, random_prompts
from rayk.bench.core.case import Sample
from rayk.bench.core.prompts import PROMPT
from rayk.context import TextContext
from rayk.kvcache.replica import ReplicaCore
from rayk.params import KVConnectorConfig, MHAKVCacheParams
from rayk.tiers.opening import open_connector

PAGES, ALLOCS, ROUNDS = 20_000, 100, 12
COPIED = 64 << 20  # bytes, more than caches hold
AT_ONCE = 8  # pages offloaded at once to fill a tier
KIB = {32: (1, 64, 1), 128: (2, 64, 2), 2048: (8, 128, 4)}  # of a page: KV heads, their size, layers
BATCH, STEPS, WIDTH = 32, 128, 512


def make_params(
    page_size: int, connector: str, folder: str = "", disk_bytes: int = 0, **shape: Any
) -> MHAKVCacheParams:
    """One replica on the CPU with that connector."""
    config = KVConnectorConfig(disk_offload_dir=folder or None, disk_offload_max_bytes=disk_bytes)
    sizes: dict[str, Any] = {"dtype": "float32", "n_kv_heads": 1, "head_dim": 1, "num_layers": 1} | shape
    return MHAKVCacheParams(
        page_size=page_size,
        devices=["cpu"],
        enable_prefix_caching=True,
        kv_hash_seed=bytes(32),
        kv_connector=connector,
        kv_connector_config=config,
        **sizes,
    )


def make_core(params: MHAKVCacheParams, pages: int, host_pages: int) -> ReplicaCore:
    """A core with its tiers."""
    core = ReplicaCore(params, 0, pages, BATCH)
    if params.kv_connector != "null":
        core.connect(open_connector(params, core.buffers.all_bytes, host_pages, None))
    return core


class _Tiered:
    """What has cores with tiers, which must be closed: the last ones are when new ones are made, or it goes."""

    def __init__(self) -> None:
        self._cores: list[ReplicaCore] = []

    def _keep(self, *cores: ReplicaCore) -> None:
        for core in self._cores:
            core.shutdown()
        self._cores = list(cores)

    def __del__(self) -> None:
        self._keep()


class Miss(_Tiered):
    """CPU time that a miss in both tiers, three quarters full, adds to a cold alloc of 1,024 tokens, microseconds."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        super().__init__()
        self._rounds = rounds

    def run(self, lap_ns: float) -> Sample:
        folder = TemporaryDirectory()
        tiered = make_params(PAGE_SIZE, "tiered", folder.name, 64 << 20)
        cores = [make_core(make_params(PAGE_SIZE, "null"), PAGES, 0), make_core(tiered, PAGES, PAGES)]
        self._keep(*cores)
        connector: Any = cores[1].connector
        for _ in range(3 * PAGES // 4 // AT_ONCE):
            connector.offload([os.urandom(32) for _ in range(AT_ONCE)], np.arange(AT_ONCE, dtype=np.int32))
        connector.drain()
        prompts = random_prompts(ALLOCS * self._rounds, PROMPT)

        def work() -> float:
            best = [float("inf")] * 2
            for at in range(self._rounds):
                part = prompts[at * ALLOCS : (at + 1) * ALLOCS]
                for i, core in enumerate(cores):
                    best[i] = min(best[i], _alloc_each(core, part))
            folder.cleanup()
            return (best[1] - best[0]) / ALLOCS / 1e3

        return Sample(work)


def _alloc_each(core: ReplicaCore, prompts: Sequence[Any]) -> float:
    contexts = [TextContext(f"r{i}", tokens, 2 * PROMPT) for i, tokens in enumerate(prompts)]
    for ctx in contexts:
        core.claim(ctx.request_id)
    start = thread_time_ns()
    for ctx in contexts:
        core.alloc(ctx)
    spent = thread_time_ns() - start
    for ctx in contexts:
        core.release(ctx.request_id)
    return spent


class Copies(_Tiered):
    """CPU time of the connector that copies pages of 128 tokens out (or in), scattered ones, `at_once` a call, over
    that of one memcpy of as many bytes. Both copy between the device pages of the CPU and the host tier's pool."""

    def __init__(self, kib: int, at_once: int, out: bool) -> None:
        super().__init__()
        self._kib, self._at_once, self._out = kib, at_once, out

    def run(self, lap_ns: float) -> Sample:
        heads, head_dim, layers = KIB[self._kib]
        params = make_params(128, "local", dtype="float16", n_kv_heads=heads, head_dim=head_dim, num_layers=layers)
        assert params.bytes_per_page == self._kib << 10
        count = COPIED // params.bytes_per_page
        core = make_core(params, count, 2 * count)
        self._keep(core)
        connector: Any = core.connector
        device = core.buffers.all_bytes[0][:count].numpy()
        rows = connector.rows[:count]
        device[:] = 1  # touched, as the pool is
        pages = np.random.default_rng(0).permutation(count).astype(np.int32)
        plain = (lambda: np.copyto(rows, device)) if self._out else (lambda: np.copyto(device, rows))

        def in_parts(copy: Callable[[Any, Any], object], keys: Sequence[bytes]) -> None:
            for at in range(0, count, self._at_once):
                copy(keys[at : at + self._at_once], pages[at : at + self._at_once])

        def work() -> float:
            ratios = []
            for _ in range(5):
                keys = [os.urandom(32) for _ in range(count)]
                bare = _spent(plain)
                stored = _spent(lambda: in_parts(connector.offload, keys))  # noqa: B023  # called at once
                loaded = _spent(lambda: in_parts(connector.load, keys))  # noqa: B023  # as above
                ratios.append((stored if self._out else loaded) / bare)
            return median(ratios[1:])

        return Sample(work)


def _spent(work: Callable[[], object]) -> float:
    start = thread_time_ns()
    work()
    return thread_time_ns() - start


class Offloading(_Tiered):
    """CPU time of decode steps, a small model's work included, while full pages are written to host and disk, over
    that without tiers. Each step of the batch completes a quarter of a page of 1 MiB."""

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self._steps = steps

    def run(self, lap_ns: float) -> Sample:
        shape: dict[str, Any] = {"dtype": "bfloat16", "n_kv_heads": 4, "head_dim": 64, "num_layers": 8}
        folder = TemporaryDirectory()
        cores = [
            make_core(make_params(128, "null", **shape), 4 * BATCH, 0),
            make_core(make_params(128, "tiered", folder.name, 1 << 30, **shape), 4 * BATCH, 4 * BATCH),
        ]
        self._keep(*cores)
        runs = [Decoding(core) for core in cores]

        def work() -> float:
            spent = [0.0, 0.0]
            for _ in range(self._steps):
                for i, run in enumerate(runs):
                    spent[i] += _spent(run.step)
            for core in cores:
                core.drain()
            folder.cleanup()
            return spent[1] / spent[0]

        return Sample(work)


class Decoding:
    """A batch that decodes on a core; its lengths are spread, so that some page is full in every fourth step."""

    def __init__(self, core: ReplicaCore) -> None:
        self._core = core
        prompts = random_prompts(BATCH, 129 + 4 * BATCH)
        self._contexts = [TextContext(f"r{i}", p[: 129 + 4 * i], 4096) for i, p in enumerate(prompts)]
        for ctx in self._contexts:
            core.claim(ctx.request_id)
            core.alloc(ctx)
            ctx.update(1)
        core.step(self._contexts)
        core.drain()
        self._weights = torch.ones(WIDTH, 4 * WIDTH)

    def step(self) -> None:
        """Pages, a forward that writes a token of each in all layers, commit."""
        core, contexts = self._core, self._contexts
        core.alloc_many(contexts)
        inputs: Any = core.runtime_inputs(contexts)
        shard = inputs.shards[0]
        lengths = shard.cache_lengths.long()
        pages = shard.lookup_table[torch.arange(len(contexts)), lengths // 128].long()
        hidden = torch.ones(len(contexts), WIDTH)
        for layer in range(8):
            out = (hidden @ self._weights).bfloat16()
            shard.kv_blocks[pages, 0, layer, lengths % 128] = out[:, :256].reshape(-1, 4, 64)
            shard.kv_blocks[pages, 1, layer, lengths % 128] = out[:, 256:512].reshape(-1, 4, 64)
        for ctx in contexts:
            ctx.update(1)
        core.step(contexts)
