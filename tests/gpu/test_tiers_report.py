"""What `make gpu-report` prints about the host tier: copies against the PCIe ceiling, and what they cost decoding.

Every ceiling is measured in the same run: one large copy_ between the device and memory that CUDA allocated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from rayk import InferenceSession, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk.kvcache.page_copies import CudaCopier
from rayk.tiers.pool import HostPool

DEVICE = "cuda:0"
TOTAL = 1 << 30  # bytes of a measured copy
CALL = 64 << 20  # bytes that one call to the copier moves, as one step of a server might
WAYS = ("d2h", "h2d", "both")
# An 8B Llama in bfloat16: 16 MiB pages of 128 tokens.
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, DIM, PAGE = 32, 4096, 14336, 32, 8, 128, 128
BATCH, CONTEXT = 32, 1024  # of the decode loop
STEPS, ROUNDS = 10, 5
BURST = 16  # pages that are copied at once beside decoding, 256 MiB
PREFIXES = 8  # so many bursts are loaded in turns; the device has room for fewer beside what decodes


@dataclass(frozen=True)
class Ceiling:
    """Bytes per second, by way; "both" counts the bytes of either way."""

    rates: dict[str, float]


def rate(size: int, work: Callable[[], object], repeats: int = 7) -> float:
    """Bytes per second of the median run, from the first call to the last byte, after two warm-up runs."""
    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        start = perf_counter()
        work()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(perf_counter() - start)
    return size / statistics.median(times)


@pytest.fixture(scope="module")
def ceiling() -> Ceiling:
    device = torch.zeros(2, TOTAL, dtype=torch.uint8, device=DEVICE)
    pinned = torch.zeros(2, TOTAL, dtype=torch.uint8, pin_memory=True)
    streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]

    def out() -> None:
        with torch.cuda.stream(streams[0]):
            pinned[0].copy_(device[0], non_blocking=True)

    def back() -> None:
        with torch.cuda.stream(streams[1]):
            device[1].copy_(pinned[1], non_blocking=True)

    rates = {"d2h": rate(TOTAL, out), "h2d": rate(TOTAL, back), "both": rate(2 * TOTAL, lambda: (out(), back()))}
    print(f"\nPCIe ceiling on {torch.cuda.get_device_name(0)}: {show(rates)} GB/s")
    return Ceiling(rates)


def show(rates: dict[str, float]) -> str:
    return ", ".join(f"{way} {rates[way] / 1e9:.1f}" for way in WAYS)


@pytest.mark.parametrize("order", ["contiguous", "scattered"])
@pytest.mark.parametrize("page_bytes", [128 << 10, 2 << 20, 16 << 20])
def test_copies_against_the_ceiling(ceiling: Ceiling, page_bytes: int, order: str) -> None:
    """The copier that the connectors use, over a pool that it page-locked itself; every byte is compared."""
    count, at_once = TOTAL // page_bytes, CALL // page_bytes
    device = torch.zeros((2 * count, page_bytes), dtype=torch.uint8, device=DEVICE)
    device[:count].random_(0, 256)
    copier, host = CudaCopier([[device]]), HostPool(None, 2 * count, page_bytes)
    assert copier.attach(host.rows) == ""
    order_of = np.random.default_rng(0).permutation if order == "scattered" else np.arange
    pages, rows = order_of(count).astype(np.int32), order_of(count).tolist()
    first, second = (torch.from_numpy(host.rows[at : at + count]) for at in (0, count))

    def out(at: int) -> None:
        copier.store(pages[at : at + at_once], host.rows, rows[at : at + at_once])

    def back(at: int) -> None:
        part = slice(at, at + at_once)
        copier.load(host.rows, [count + row for row in rows[part]], pages[part] + np.int32(count))

    def all_of(*ways: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            for at in range(0, count, at_once):
                for way in ways:
                    way(at)

        return run

    rates = {"d2h": rate(TOTAL, all_of(out))}
    index = torch.from_numpy(pages).long()
    for at in range(0, count, at_once):  # row rows[i] holds page pages[i]
        want = device[index[at : at + at_once].to(DEVICE)].cpu()
        assert torch.equal(first[rows[at : at + at_once]], want), f"pages {at}.. came out wrong"
        second[rows[at : at + at_once]] = 255 - want
    rates["h2d"] = rate(TOTAL, all_of(back))
    for at in range(0, count, at_once):
        source = index[at : at + at_once].to(DEVICE)
        assert torch.equal(device[count + source], 255 - device[source]), f"pages {at}.. came back wrong"
    rates["both"] = rate(2 * TOTAL, all_of(out, back))
    ratios = {way: rates[way] / ceiling.rates[way] for way in WAYS}
    batched = "one batch a call" if copier._batch is not None else "torch's copy_"
    print(
        f"{page_bytes >> 10:6d} KiB {order:10s} pages, {batched}: {show(rates)} GB/s; of the ceiling "
        + ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items())
    )
    del first, second
    copier.close()
    host.close()
    if page_bytes >= 2 << 20:
        assert min(ratios["d2h"], ratios["h2d"]) >= 0.9


# -- through the public manager --------------------------------------------------------------------------


def llama_params() -> MHAKVCacheParams:
    return MHAKVCacheParams(
        dtype="bfloat16", n_kv_heads=KV_HEADS, head_dim=DIM, num_layers=LAYERS, page_size=PAGE, devices=[DEVICE],
        enable_prefix_caching=True, kv_connector="local",
    )  # fmt: skip


def open_manager(pages: int, host_pages: int) -> PagedKVCacheManager:
    return PagedKVCacheManager(llama_params(), InferenceSession("inline"), pages, host_pages, max_batch_size=2 * BATCH)


class Prefix:
    """A prompt of whole pages and what each of its pages holds: a pattern of the prefix and the page."""

    def __init__(self, manager: PagedKVCacheManager, number: int, pages: int) -> None:
        self.number = number
        self.tokens = np.random.default_rng(number).integers(0, 1 << 30, pages * PAGE + 1)
        self.pages = pages
        self._manager = manager
        self._raw = manager.get_device_buffer(0).all_buffers[0].transpose(1, 2).flatten(1).view(torch.int16)
        self._turn = 0

    def begin(self) -> TextContext:
        """A request for it, with pages; loads what the tiers have."""
        self._turn += 1
        ctx = TextContext(f"p{self.number}-{self._turn}", self.tokens, 2 * len(self.tokens))
        self._manager.claim(ctx.request_id, 0)
        self._manager.alloc(ctx, 0)
        return ctx

    def fill(self, ctx: TextContext) -> None:
        self._raw[self._index(ctx)] = self._pattern()

    def check(self, ctx: TextContext) -> None:
        assert torch.equal(self._raw[self._index(ctx)], self._pattern()), f"prefix {self.number} holds wrong bytes"

    def _index(self, ctx: TextContext) -> torch.Tensor:
        blocks = self._manager.get_req_blocks(ctx.request_id, 0)[: self.pages]
        return torch.tensor(blocks, device=DEVICE)

    def _pattern(self) -> torch.Tensor:
        at = torch.arange(self._raw.shape[1], device=DEVICE)
        page = torch.arange(self.pages, device=DEVICE)[:, None]
        return ((at * 31 + page * 1009 + self.number * 7919) % 30011).to(torch.int16)


def test_offload_through_step_and_load_through_alloc(ceiling: Ceiling) -> None:
    """64 pages at a time: from step() until all are in the host tier, and from alloc() until they can be used."""
    count, groups = 64, 3
    with open_manager(count + 8, groups * count) as manager:
        size = count * llama_params().bytes_per_page
        prefixes = [[Prefix(manager, 8 * g + i, count // 4) for i in range(4)] for g in range(groups)]
        spent: dict[str, list[float]] = {"d2h": [], "h2d": []}
        for group in prefixes:
            contexts = [p.begin() for p in group]
            for prefix, ctx in zip(group, contexts, strict=True):
                assert not ctx.cached_prefix_length
                prefix.fill(ctx)
                ctx.update(1)
            torch.cuda.synchronize()
            start = perf_counter()
            manager.step([contexts])
            manager.drain()
            spent["d2h"].append(perf_counter() - start)
            for ctx in contexts:
                manager.release(ctx.request_id, 0)
        for group in (*prefixes, *prefixes):
            torch.cuda.synchronize()
            start = perf_counter()
            contexts = [p.begin() for p in group]
            manager.runtime_inputs([contexts])
            torch.cuda.current_stream().synchronize()
            spent["h2d"].append(perf_counter() - start)
            for prefix, ctx in zip(group, contexts, strict=True):
                assert ctx.cached_prefix_length == prefix.pages * PAGE
                prefix.check(ctx)
                manager.release(ctx.request_id, 0)
        manager.drain()
        manager.check_integrity()
        for way, what in (("d2h", "offload, step() to drain()"), ("h2d", "load, alloc() to runtime_inputs()")):
            reached = size / statistics.median(spent[way])
            print(
                f"{what}, {count} pages of 16 MiB: {reached / 1e9:.1f} GB/s, {reached / ceiling.rates[way]:.2f} of it"
            )


# -- beside decoding -------------------------------------------------------------------------------------


class Decoding:
    """Decode steps of an 8B Llama with random weights over the manager's pages: every matmul, every page read."""

    def __init__(self, manager: PagedKVCacheManager) -> None:
        def weights(rows: int, columns: int) -> list[torch.Tensor]:
            shape = (rows, columns)
            return [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.01) for _ in range(LAYERS)]

        self._manager = manager
        self._qkv = weights(WIDTH, (HEADS + 2 * KV_HEADS) * DIM)
        self._out = weights(HEADS * DIM, WIDTH)
        self._up, self._down = weights(WIDTH, 2 * INNER), weights(INNER, WIDTH)
        self._hidden = torch.randn(BATCH, WIDTH, device=DEVICE).bfloat16()
        self.contexts = [
            TextContext(f"d{i}", np.random.default_rng(10_000 + i).integers(0, 1 << 30, CONTEXT), 2 * CONTEXT)
            for i in range(BATCH)
        ]
        for ctx in self.contexts:
            manager.claim(ctx.request_id, 0)
            manager.alloc(ctx, 0)
            ctx.update(1)
        manager.step([self.contexts])
        manager.drain()

    def step(self) -> float:
        """Seconds of a step: pages and tables, the forward, its result on the host. The requests stay as they are."""
        start = perf_counter()
        for ctx in self.contexts:
            self._manager.alloc(ctx, 0)
        shard = self._manager.runtime_inputs([self.contexts]).inputs[0]
        self._forward(shard)
        torch.cuda.current_stream().synchronize()  # and nothing of what the copy streams do
        return perf_counter() - start

    def _forward(self, shard: Any) -> None:
        table, blocks, lengths = shard.lookup_table.long(), shard.kv_blocks, shard.cache_lengths.long()
        rows = torch.arange(BATCH, device=DEVICE)
        page, slot = table[rows, lengths // PAGE], lengths % PAGE
        table = table[:, : CONTEXT // PAGE]
        hidden, kv_width = self._hidden, KV_HEADS * DIM
        for layer in range(LAYERS):
            normed = rms_norm(hidden, (WIDTH,))
            q, k, v = (normed @ self._qkv[layer]).split((HEADS * DIM, kv_width, kv_width), 1)
            blocks[page, 0, layer, slot] = k.reshape(BATCH, KV_HEADS, DIM)
            blocks[page, 1, layer, slot] = v.reshape(BATCH, KV_HEADS, DIM)
            keys, values = (
                blocks[:, kind, layer][table].reshape(BATCH, CONTEXT, KV_HEADS, DIM).transpose(1, 2) for kind in (0, 1)
            )
            attended = scaled_dot_product_attention(q.reshape(BATCH, KV_HEADS, HEADS // KV_HEADS, DIM), keys, values)
            hidden = hidden + attended.reshape(BATCH, HEADS * DIM) @ self._out[layer]
            gate, up = (rms_norm(hidden, (WIDTH,)) @ self._up[layer]).chunk(2, 1)
            hidden = hidden + (silu(gate) * up) @ self._down[layer]


class Beside:
    """Transfers that go on beside decode steps: turn() starts new ones, as many as the link takes."""

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self._manager = manager
        self._core: Any = manager._calls.cores[0]  # type: ignore[attr-defined]  # to see whether the link is busy
        self._fresh = 1000
        self._prefixes = [Prefix(manager, n, BURST) for n in range(PREFIXES)]
        self._next = 0
        self._loading: list[tuple[Prefix, TextContext]] = []
        for prefix in self._prefixes:
            ctx = prefix.begin()
            prefix.fill(ctx)
            self._commit(ctx)
        manager.drain()

    def _commit(self, ctx: TextContext) -> None:
        ctx.update(1)
        self._manager.step([[ctx]])
        self._manager.release(ctx.request_id, 0)

    def offload(self) -> None:
        """A prompt that nobody had is cached, and so copied out."""
        self._manager.poll_transfers()
        if len(self._core.connector._storing) < 2:
            self._fresh += 1
            self._commit(Prefix(self._manager, self._fresh, BURST).begin())

    def load(self) -> None:
        """A prompt that the host tier has is wanted."""
        self._manager.poll_transfers()
        for entry in [e for e in self._loading if not self._core.loading(e[1])]:
            self._loading.remove(entry)
            self._manager.release(entry[1].request_id, 0)
        if len(self._loading) < 2:
            prefix = self._prefixes[self._next % len(self._prefixes)]
            self._next += 1
            self._loading.append((prefix, prefix.begin()))

    def settle(self) -> None:
        """Compare what was loaded since, and release it. Nothing is on its way."""
        for prefix, ctx in self._loading:
            prefix.check(ctx)
            self._manager.release(ctx.request_id, 0)
        self._loading.clear()


@pytest.fixture
def decode_manager() -> Iterator[PagedKVCacheManager]:
    pages = BATCH * (CONTEXT // PAGE + 1) + (PREFIXES - 2) * (BURST + 1)
    with open_manager(pages, BATCH * CONTEXT // PAGE + 3 * PREFIXES * BURST) as manager:
        yield manager


def test_decoding_beside_transfers(ceiling: Ceiling, decode_manager: PagedKVCacheManager) -> None:
    """Blocks of steps in turns, with and without transfers: at most a tenth slower each way, both ways printed."""
    manager = decode_manager
    decoding, beside = Decoding(manager), Beside(manager)
    work: dict[str, list[Callable[[], None]]] = {
        "alone": [],
        "d2h": [beside.offload],
        "h2d": [beside.load],
        "both": [beside.offload, beside.load],
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    copied: dict[str, float] = dict.fromkeys(work, 0.0)
    spent = dict.fromkeys(work, 0.0)
    for _ in range(5):
        decoding.step()
    for _ in range(ROUNDS):
        for name, transfers in work.items():
            before, start = manager.get_metrics_aggregated(), perf_counter()
            for _ in range(STEPS):
                began = perf_counter()
                for transfer in transfers:
                    transfer()
                decoding.step()
                times[name].append(perf_counter() - began)
            manager.drain()
            spent[name] += perf_counter() - start
            beside.settle()
            done = manager.get_metrics_aggregated() - before
            copied[name] += (done.h2d_blocks_copied + done.d2h_blocks_copied) * llama_params().bytes_per_page
    manager.check_integrity()
    alone = statistics.median(times["alone"])
    print(f"\ndecode, batch {BATCH} x {CONTEXT} tokens, alone: {alone * 1e3:.2f} ms a step")
    slower = {}
    for name in WAYS:
        slower[name] = statistics.median(times[name]) / alone
        reached = copied[name] / spent[name]
        print(
            f"  beside {name:4s} at {reached / 1e9:5.1f} GB/s ({reached / ceiling.rates[name]:.2f} of the ceiling): "
            f"{slower[name]:.3f} of its time"
        )
    assert copied["alone"] == 0 and all(copied[name] for name in WAYS)
    assert slower["d2h"] <= 1.1 and slower["h2d"] <= 1.1
