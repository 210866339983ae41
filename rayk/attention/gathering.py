"""Which pages are gathered together for attention with plain torch: once for one batch, used by every layer.

Rows of one token are taken in groups of about the same length; rows with several tokens one by one. Pages that several
rows begin with are gathered and scored once, for all their tokens (rayk.attention.shared), and what remains of each
row as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rayk.attention.batch import PagedBatch
from rayk.attention.shared import SharedPages, shared_pages

Ints = npt.NDArray[np.int64]

GROUP_BYTES = 1 << 20
"""Rows are taken together while their keys stay below this: a few of the caches next to a core."""

QUERY_BLOCK = 256
"""Query tokens of a row that are scored at once: bounds the mask, and the scores where they are made here."""

SHARED_BLOCK = 1024
"""Tokens of shared pages that are scored at once."""


@dataclass(frozen=True)
class Group:
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
class Chunk:
    """One row with several tokens: its packed tokens, its pages int64 `[n]`, and the position of the first slot."""

    start: int
    count: int
    kv_length: int
    pages: torch.Tensor
    origin: int


@dataclass(frozen=True)
class Shared:
    """Full pages, int64 `[n]`, that all of these packed tokens see; tokens: int64."""

    tokens: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What is gathered together, for one batch and window. tokens: int64, of all groups in turn; in_order: they are
    the whole batch as it is packed. Groups and chunks leave out what is in `shared`."""

    groups: list[Group]
    chunks: list[Chunk]
    tokens: torch.Tensor
    in_order: bool
    shared: list[Shared]


def plan_rows(batch: PagedBatch, window: int | None, slot_bytes: int) -> Plan:
    """Rows of one token in groups of about the same length, the others one by one."""
    size = batch.page_size
    host = batch.kv_lengths.tolist() if batch.kv_lengths_host is None else batch.kv_lengths_host
    lengths, counts = np.array(host), np.array(batch.counts)
    starts = counts.cumsum() - counts
    seen = np.zeros_like(lengths) if window is None else np.maximum(lengths - counts + 1 - window, 0)
    table, pages = batch.table.long(), -(-lengths // size)
    shared: list[Shared] = []
    if len(lengths) > 1 and (window is None or window >= int(lengths.max())):
        seen[:] = 0
        for found in (
            shared_pages(table.numpy(), (lengths - counts) // size, size) if table.device.type == "cpu" else ()
        ):
            seen[found.rows] = (found.first + len(found.pages)) * size
            shared += _blocks_of(found, starts, counts, size)
    skipped = seen // size
    chunks = [
        Chunk(int(starts[row]), int(counts[row]), int(lengths[row]), table[row, skipped[row] : pages[row]], origin)
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
    return Plan(groups, chunks, torch.from_numpy(order).to(table.device), in_order, shared)


def _blocks_of(found: SharedPages, starts: Ints, counts: Ints, size: int) -> Iterator[Shared]:
    """Parts of shared pages, for parts of the tokens that see them."""
    tokens = np.concatenate([np.arange(starts[row], starts[row] + counts[row]) for row in found.rows])
    columns = max(1, SHARED_BLOCK // size)
    for first in range(0, len(found.pages), columns):
        pages = torch.from_numpy(found.pages[first : first + columns])
        for at in range(0, len(tokens), QUERY_BLOCK):
            yield Shared(torch.from_numpy(tokens[at : at + QUERY_BLOCK]), pages)


def _group(table: torch.Tensor, rows: Ints, skipped: Ints, width: int, first: Ints, end: Ints) -> Group:
    """Rows that all get `width` pages from their `skipped` one on, and see the gathered slots `first` to `end`."""
    columns = np.minimum(skipped[:, None] + np.arange(width), table.shape[1] - 1)
    at, places = (torch.from_numpy(index).to(table.device) for index in (rows, columns))
    pages = table[at[:, None], places].flatten()
    low, full_from, full_to, high = int(first.min()), int(first.max()), int(end.min()), int(end.max())
    if low == full_from and full_to == high:
        return Group(len(rows), pages, low, high, None, [])
    slots = np.arange(low, high)
    seen = torch.from_numpy((slots >= first[:, None]) & (slots < end[:, None])).to(table.device)
    # Where a row sees nothing of what all others see (windows without a common slot), all of it is foreign to some.
    parts = [(low, full_from), (full_to, high)] if full_from <= full_to else [(low, high)]
    foreign = [
        (start - low, stop - low, ~seen[:, None, start - low : stop - low, None])
        for start, stop in parts
        if start < stop
    ]
    return Group(len(rows), pages, low, high, seen[:, None, None], foreign)


def query_blocks(
    chunk: Chunk, window: int | None, device: torch.device
) -> Iterator[tuple[int, int, int, int, torch.Tensor | None]]:
    """Packed tokens from, to, gathered slots from, to, and who sees what, bool `[tokens, slots]`; None for all."""
    before = chunk.kv_length - chunk.count
    for first in range(0, chunk.count, QUERY_BLOCK):
        tokens = min(QUERY_BLOCK, chunk.count - first)
        at = before + first  # position of the block's first token
        low, high = max(chunk.origin, 0 if window is None else at + 1 - window), at + tokens
        slots = torch.arange(low, high, device=device)
        own = torch.arange(at, at + tokens, device=device)[:, None]
        seen = slots <= own
        if window is not None:
            seen &= slots > own - window
        start = chunk.start + first
        yield start, start + tokens, low - chunk.origin, high - chunk.origin, None if tokens == 1 else seen
