"""Attention with plain torch: pages are gathered into a workspace that stays in the processor's caches, then SDPA.

Measured on CPU, gathering one row at a time into a reused workspace and packing the query heads of a group into one
matrix costs about what SDPA costs on unpaged keys and values. Rows that are short are taken several at a time, since
there the calls cost more than the work. What stands in a slot beyond a row's length is another request's: it is never
read, or overwritten with zeros before it is multiplied by a weight of zero (which would not make a NaN vanish).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from rayk.attention.backend import FP8, Needs, Rules
from rayk.attention.batch import PagedBatch

Ints = npt.NDArray[np.int64]

GROUP_BYTES = 1 << 20
"""Rows are taken together while their keys stay below this: a few of the caches next to a core."""

QUERY_BLOCK = 256
"""Query tokens of a row that are scored at once: bounds the mask, and the scores where they are made here."""


@dataclass(frozen=True)
class _Group:
    """`rows` rows of one token that are gathered together; pages: int64 `[rows * n]`.

    first, end: the slots of the gathered n pages that any row sees. seen: bool `[rows, 1, 1, end - first]`, None where
    every row sees all. foreign: parts of those slots that some rows do not see, as from, to and a bool mask
    `[rows, 1, to - from, 1]`: what stands there is zeroed.
    """

    rows: int
    pages: torch.Tensor
    first: int
    end: int
    seen: torch.Tensor | None
    foreign: list[tuple[int, int, torch.Tensor]]


@dataclass(frozen=True)
class _Chunk:
    """One row with several tokens: its packed tokens, its pages int64 `[n]`, and the position of the first slot."""

    start: int
    count: int
    kv_length: int
    pages: torch.Tensor
    origin: int


@dataclass(frozen=True)
class _Plan:
    """What is gathered together, for one batch and window. tokens: int64, of all groups in turn; in_order: they are
    the whole batch as it is packed."""

    groups: list[_Group]
    chunks: list[_Chunk]
    tokens: torch.Tensor
    in_order: bool


class TorchSdpa:
    """Any device and any rule. On CUDA a batch with several tokens a row waits for the device; decoding does not."""

    name = "torch-sdpa"

    def __init__(self) -> None:
        self._spaces_by_thread = threading.local()  # forwards in two threads must not share a workspace

    def unfit(self, needs: Needs) -> str | None:
        if needs.cache_dtype != needs.dtype and needs.cache_dtype not in FP8:
            return f"it reads {needs.dtype} or float8 pages, not {needs.cache_dtype} for {needs.dtype} queries"
        return None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
    ) -> torch.Tensor:
        if batch.is_decode and query.device.type != "cpu":
            return _padded_decode(query, keys, values, batch, rules)
        slot_bytes = keys[0, 0].numel() * query.element_size()
        plan = batch.once(("plan", rules.window, slot_bytes), lambda: _plan(batch, rules.window, slot_bytes))
        out = torch.empty_like(query)
        if plan.groups:
            found = self._decode(query, keys, values, plan, rules)
            if not plan.chunks and plan.in_order:
                return found
            out.index_copy_(0, plan.tokens, found)
        for chunk in plan.chunks:
            self._prefill(query, keys, values, out, chunk, rules, batch)
        return out

    def _spaces(self, view: torch.Tensor, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `pages` pages of keys and of values, `[pages.., page_size, heads, dim]` in the dtype of `view`.

        Both are overwritten by the next call in this thread.
        """
        key = (view.dtype, view.device, tuple(view.shape[1:]))
        known = self._spaces_by_thread.__dict__.setdefault("spaces", {})
        if key not in known or len(known[key][0]) < pages:
            shape = (pages, *view.shape[1:])
            known[key] = tuple(torch.empty(shape, dtype=view.dtype, device=view.device) for _ in range(2))
        spaces: tuple[torch.Tensor, torch.Tensor] = known[key]
        return spaces

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: _Plan, rules: Rules
    ) -> torch.Tensor:
        """The plan's rows of one token, `[rows, heads, dim]` in the plan's order."""
        _, size, heads, dim = keys.shape
        if not plan.in_order:
            query = query.index_select(0, plan.tokens)
        q = query.view(len(query), heads, -1, dim)  # [rows, kv heads, query heads of each, dim]
        sinks = None if rules.sinks is None else rules.sinks.view(heads, 1, -1)
        keys, values, as_query = _readable(keys, values, query.dtype)
        spaces = self._spaces(keys, max(len(group.pages) for group in plan.groups))
        found, at = [], 0
        for group in plan.groups:
            rows, pages = group.rows, len(group.pages)
            shape = (rows, heads, group.end - group.first, dim)
            strides = (pages // rows * size * heads * dim, dim, heads * dim, 1)
            k, v = (
                as_query(torch.index_select(view, 0, group.pages, out=space[:pages])).as_strided(
                    shape, strides, group.first * heads * dim
                )
                for view, space in zip((keys, values), spaces, strict=True)
            )
            for start, end, outside in group.foreign:
                k[:, :, start:end].masked_fill_(outside, 0)
                v[:, :, start:end].masked_fill_(outside, 0)
            found.append(_scored(q[at : at + rows], k, v, group.seen, rules, sinks))
            at += rows
        return (torch.cat(found) if len(found) > 1 else found[0]).flatten(1, 2)

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        chunk: _Chunk,
        rules: Rules,
        batch: PagedBatch,
    ) -> None:
        sinks = None if rules.sinks is None else rules.sinks.view(keys.shape[2], -1, 1)
        keys, values, as_query = _readable(keys, values, query.dtype)
        pages = len(chunk.pages)
        k, v = (
            as_query(torch.index_select(view, 0, chunk.pages, out=space[:pages])).flatten(0, 1).transpose(0, 1)[None]
            for view, space in zip((keys, values), self._spaces(keys, pages), strict=True)
        )
        for start, end, first, last, seen in batch.once(
            ("blocks", rules.window, chunk.start), lambda: list(_blocks(chunk, rules.window, query.device))
        ):
            q = query[start:end].transpose(0, 1)[None]  # [1, query heads, tokens, dim]
            found = _scored(q, k[:, :, first:last], v[:, :, first:last], seen, rules, sinks)
            out[start:end] = found[0].transpose(0, 1)


def _readable(
    keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Views that can be gathered, and what makes gathered pages the query's dtype: float8 is gathered as bytes."""
    stored = keys.dtype
    if stored not in FP8:
        return keys, values, lambda gathered: gathered
    return keys.view(torch.uint8), values.view(torch.uint8), lambda gathered: gathered.view(stored).to(dtype)


def _plan(batch: PagedBatch, window: int | None, slot_bytes: int) -> _Plan:
    """Rows of one token in groups of about the same length, the others one by one."""
    size = batch.page_size
    host = batch.kv_lengths.tolist() if batch.kv_lengths_host is None else batch.kv_lengths_host
    lengths, counts = np.array(host), np.array(batch.counts)
    starts = counts.cumsum() - counts
    seen = np.zeros_like(lengths) if window is None else np.maximum(lengths - counts + 1 - window, 0)
    skipped, pages = seen // size, -(-lengths // size)
    table = batch.table.long()
    chunks = [
        _Chunk(int(starts[row]), int(counts[row]), int(lengths[row]), table[row, skipped[row] : pages[row]], origin)
        for row, origin in zip(np.flatnonzero(counts > 1), (skipped * size)[counts > 1].tolist(), strict=True)
    ]
    single = np.flatnonzero(counts == 1)
    single = single[np.argsort((pages - skipped)[single], kind="stable")]
    widths = (pages - skipped)[single].tolist()
    groups, at = [], 0
    while at < len(single):
        end = at + 1
        while end < len(single) and (end + 1 - at) * widths[end] * size * slot_bytes <= GROUP_BYTES:
            end += 1
        rows = single[at:end]
        first = (seen - skipped * size)[rows]
        groups.append(_group(table, rows, skipped[rows], widths[end - 1], first, (lengths - skipped * size)[rows]))
        at = end
    order = starts[single]
    in_order = len(order) == batch.tokens and bool((order[1:] > order[:-1]).all())
    return _Plan(groups, chunks, torch.from_numpy(order).to(table.device), in_order)


def _group(table: torch.Tensor, rows: Ints, skipped: Ints, width: int, first: Ints, end: Ints) -> _Group:
    """Rows that all get `width` pages from their `skipped` one on, and see the gathered slots `first` to `end`."""
    columns = np.minimum(skipped[:, None] + np.arange(width), table.shape[1] - 1)
    at, places = (torch.from_numpy(index).to(table.device) for index in (rows, columns))
    pages = table[at[:, None], places].flatten()
    low, full_from, full_to, high = int(first.min()), int(first.max()), int(end.min()), int(end.max())
    if low == full_from and full_to == high:
        return _Group(len(rows), pages, low, high, None, [])
    slots = np.arange(low, high)
    seen = torch.from_numpy((slots >= first[:, None]) & (slots < end[:, None])).to(table.device)
    # Where a row sees nothing of what all others see (windows without a common slot), all of it is foreign to some.
    parts = [(low, full_from), (full_to, high)] if full_from <= full_to else [(low, high)]
    foreign = [
        (start - low, stop - low, ~seen[:, None, start - low : stop - low, None])
        for start, stop in parts
        if start < stop
    ]
    return _Group(len(rows), pages, low, high, seen[:, None, None], foreign)


def _blocks(
    chunk: _Chunk, window: int | None, device: torch.device
) -> Iterator[tuple[int, int, int, int, torch.Tensor | None]]:
    """Packed tokens from, to, gathered slots from, to, and who sees what, bool `[tokens, slots]`; None for all."""
    before = chunk.kv_length - chunk.count
    for first in range(0, chunk.count, QUERY_BLOCK):
        tokens = min(QUERY_BLOCK, chunk.count - first)
        at = before + first  # position of the block's first token
        low, high = 0 if window is None else max(0, at + 1 - window), at + tokens
        slots = torch.arange(low, high, device=device)
        own = torch.arange(at, at + tokens, device=device)[:, None]
        seen = slots <= own
        if window is not None:
            seen &= slots > own - window
        start = chunk.start + first
        yield start, start + tokens, low - chunk.origin, high - chunk.origin, None if tokens == 1 else seen


def _scored(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    rules: Rules,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[batch, heads, tokens, dim]` for a query of that shape, keys and values of as many heads or a divisor.

    In decoding the query heads of a group are passed as tokens. sinks: `[kv heads, heads of each, tokens]` or 1 there.
    """
    if rules.softcap is None and sinks is None:
        gqa = query.shape[1] != keys.shape[1]
        return scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=rules.scale, enable_gqa=gqa)
    batch, heads, tokens, dim = query.shape
    q = query.view(batch, keys.shape[1], heads // keys.shape[1], tokens, dim)  # heads by their kv head
    scores = (q @ keys[:, :, None].transpose(-1, -2)).float() * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if seen is not None:
        scores = scores.masked_fill(~(seen if seen.dim() == 2 else seen[:, :, None]), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, ..., None].expand(*scores.shape[:4], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].to(values.dtype)
    return torch.matmul(weights, values[:, :, None]).flatten(1, 2)


def _padded_decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
) -> torch.Tensor:
    """One token a row without waiting for the device: all rows are padded to the longest."""
    size, heads = batch.page_size, keys.shape[2]
    pages = batch.table[:, : -(-batch.max_kv // size)].long()
    slots = torch.arange(pages.shape[1] * size, device=query.device)
    seen = slots < batch.kv_lengths[:, None]
    if rules.window is not None:
        seen &= slots >= (batch.kv_lengths - rules.window)[:, None]
    keys, values, as_query = _readable(keys, values, query.dtype)
    k, v = (
        as_query(view[pages]).flatten(1, 2).masked_fill_(~seen[:, :, None, None], 0).transpose(1, 2)
        for view in (keys, values)
    )
    sinks = None if rules.sinks is None else rules.sinks.view(heads, 1, -1)
    q = query.view(len(query), heads, -1, query.shape[2])
    return _scored(q, k, v, seen[:, None, None], rules, sinks).flatten(1, 2)
