"""What paged decode attention costs against SDPA over keys and values that lie in one piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from rayk.attention.backend import Rules
from rayk.attention.batch import pack
from rayk.attention.pool import PagedPool
from rayk.attention.sdpa import TorchSdpa

LAYERS = 2


@dataclass(frozen=True)
class PagedCost:
    """Processor seconds of one layer's decode step, the best of several, and their ratio."""

    paged_s: float
    dense_s: float

    @property
    def ratio(self) -> float:
        """1.0: pages cost nothing."""
        return self.paged_s / self.dense_s


def paged_decode_cost(
    batch: int = 32,
    context: int = 1024,
    *,
    page_size: int = 128,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
) -> PagedCost:
    """Both on the CPU, one torch thread, alternating; pages in random order, all rows `context` tokens long.

    Dense is the cheaper of two SDPA calls over contiguous `[batch, kv heads, context, head_dim]`: with enable_gqa, and
    with the query heads of a group as tokens.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(batch, context, page_size, heads, kv_heads, head_dim, dtype, repeats)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _measure(
    rows: int, context: int, size: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, repeats: int
) -> PagedCost:
    generator = torch.Generator().manual_seed(0)
    columns = -(-context // size)
    pages = rows * columns
    stored = torch.randn((pages + 1, LAYERS, 2, size, kv_heads, dim), generator=generator).to(dtype)
    table = torch.randperm(pages, generator=generator).view(rows, columns).int()
    before = torch.full((rows,), context - 1, dtype=torch.int32)
    packed = pack(table, before, (1,) * rows, size)
    query = torch.randn((rows, heads, dim), generator=generator).to(dtype)
    keys, values = PagedPool(stored.transpose(1, 2)).layer(LAYERS - 1)
    backend, rules = TorchSdpa(), Rules(dim**-0.5)
    k, v = (view[table.long()].flatten(1, 2)[:, :context].transpose(1, 2).contiguous() for view in (keys, values))
    ways: list[Callable[[], object]] = [
        lambda: backend.attend(query, keys, values, packed, rules),
        lambda: scaled_dot_product_attention(query[:, :, None], k, v, enable_gqa=heads != kv_heads),
        lambda: scaled_dot_product_attention(query.view(rows, kv_heads, -1, dim), k, v),
    ]
    best = [_seconds(way) for way in ways]
    for _ in range(repeats):
        best = [min(least, _seconds(way)) for least, way in zip(best, ways, strict=True)]
    return PagedCost(best[0], min(best[1:]))


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
