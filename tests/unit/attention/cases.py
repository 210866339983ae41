"""Random pools and batches, and what attention over them must give: float64, row by row, written out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rayk.attention import PagedBatch, PagedPool, Rules, pack


@dataclass(frozen=True)
class Case:
    """A filled pool and queries for it."""

    pool: PagedPool
    stored: torch.Tensor
    batch: PagedBatch
    query: torch.Tensor
    layer: int = 1

    @property
    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pool.layer(self.layer)

    def expected(self, rules: Rules) -> torch.Tensor:
        """Causal attention as the definition has it, `[tokens, heads, dim]` float64."""
        keys, values = (view.double() for view in self.views)
        parts, start = [], 0
        for row, count in enumerate(self.batch.counts):
            length = int(self.batch.kv_lengths[row])
            pages = self.batch.table[row, : -(-length // self.batch.page_size)].long()
            k, v = (view[pages].flatten(0, 1)[:length] for view in (keys, values))
            parts.append(_dense(self.query[start : start + count].double(), k, v, rules))
            start += count
        return torch.cat(parts)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Rules) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    own = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    slot = torch.arange(len(k), device=q.device)[None]
    seen = slot <= own
    if rules.window is not None:
        seen &= slot > own - rules.window
    weights = scores.masked_fill(~seen, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if rules.sinks is not None:
        total = total + rules.sinks.double().exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


def make_case(
    counts: Sequence[int],
    lengths: Sequence[int],
    page_size: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    shared: int = 0,
    seed: int = 0,
) -> Case:
    """Rows that end at `lengths` with `counts` new tokens, in shuffled pages; the first `shared` pages are common.

    Slots that belong to no row hold NaN: whoever reads them is found out.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // page_size) for length in lengths]
    pages = sum(needed) + 2
    stored = torch.full((pages + 1, 2, 2, page_size, kv_heads, dim), math.nan)
    width = max(needed) + 3
    table = torch.full((len(counts), width), pages, dtype=torch.int32)
    ids = torch.randperm(pages, generator=generator).int()
    for row, count in enumerate(needed):
        table[row, :count] = ids[:count]
        ids = ids[count:]
    table[:, :shared] = table[0, :shared]
    for row, length in enumerate(lengths):
        for at in range(needed[row]):
            filled = min(page_size, length - at * page_size)
            stored[table[row, at], :, :, :filled] = torch.randn((2, 2, filled, kv_heads, dim), generator=generator)
    stored = stored.to(cache_dtype or dtype)
    cached = torch.tensor([length - count for count, length in zip(counts, lengths, strict=True)], dtype=torch.int32)
    query = torch.randn((sum(counts), heads, dim), generator=generator).to(dtype)
    pool = PagedPool(stored.transpose(1, 2))
    return Case(pool, stored, pack(table, cached, counts, page_size), query)


def rules_of(dim: int = 16, **changes: Any) -> Rules:
    return Rules(**{"scale": dim**-0.5, **changes})


BATCHES: dict[str, dict[str, Any]] = {
    "decode": {"counts": [1] * 5, "lengths": [1, 16, 17, 100, 300]},
    "equal decodes": {"counts": [1] * 3, "lengths": [48, 48, 48]},
    "one decode": {"counts": [1], "lengths": [33]},
    "prompts": {"counts": [5, 300, 1], "lengths": [5, 300, 1]},
    "chunks": {"counts": [16, 7], "lengths": [100, 39]},
    "mixed": {"counts": [1, 20, 1, 64], "lengths": [50, 20, 200, 290]},
    "shared prefix": {"counts": [1, 9, 1], "lengths": [70, 73, 66], "shared": 4},
}
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "window": {"window": 24},
    "window of one": {"window": 1},
    "window beyond": {"window": 4096},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "window, softcap and sinks": {"window": 40, "softcap": 2.0, "sinks": torch.tensor([1.0, 0.0, -2.0, 3.0])},
}
