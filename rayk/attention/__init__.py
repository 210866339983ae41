"""Attention over pages: one function, several backends.

    batch = pack(table, cached, counts, page_size)       # once per forward
    pool = PagedPool(kv_blocks)
    pool.write(layer, key, value, batch)                 # then every layer
    out = attend(query, *pool.layer(layer), batch, scale=..., window=..., softcap=...)

`choose()` picks a backend once for a model; attend() without one chooses by its arguments.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from rayk.attention.backend import Backend, Needs, Rules
from rayk.attention.batch import PagedBatch, pack
from rayk.attention.choice import BACKENDS, choose
from rayk.attention.pool import PagedPool
from rayk.errors import AttentionError

__all__ = ["BACKENDS", "Backend", "Needs", "PagedBatch", "PagedPool", "Rules", "attend", "choose", "pack"]


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: Backend | str | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over the pages of their rows, which hold the batch's own tokens already.

    query: `[tokens, heads, head_dim]`; heads is a multiple of the pages' heads. keys, values: one layer of the pool,
    `[pages, page_size, kv heads, head_dim]`, any strides with the last 1. scale: 1 / sqrt(head_dim) unless given.
    window: keys that a query sees, itself included. softcap, sinks: see Rules.
    Returns a new tensor of the query's shape and dtype. AttentionError for what cannot be, with the reason.
    """
    if query.dim() != 3 or query.shape[0] != batch.tokens or query.shape[2] != keys.shape[3]:
        raise AttentionError(f"queries {tuple(query.shape)} for {batch.tokens} tokens and pages {tuple(keys.shape)}")
    if query.shape[1] % keys.shape[2] or keys.shape != values.shape or keys.shape[1] != batch.page_size:
        raise AttentionError(
            f"{query.shape[1]} query heads over keys {tuple(keys.shape)} and values {tuple(values.shape)}, "
            f"pages of {batch.page_size} tokens"
        )
    if window is not None and window < 1:
        raise AttentionError(f"a window of {window} tokens: at least 1, or None")
    if backend is None or isinstance(backend, str):
        needs = Needs(
            query.device,
            query.dtype,
            keys.dtype,
            query.shape[2],
            batch.page_size,
            softcap is not None,
            sinks is not None,
        )
        backend = _chosen(needs, backend)
    rules = Rules(query.shape[2] ** -0.5 if scale is None else scale, window, softcap, sinks)
    return backend.attend(query, keys, values, batch, rules)


@lru_cache(maxsize=32)
def _chosen(needs: Needs, name: str | None) -> Backend:
    return choose(needs, name)
