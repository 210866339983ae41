"""What one forward pass needs to know about its rows: where their tokens stand, in which pages, how far they see.

Made once per forward and used by every layer. The tokens of all rows are packed: row i owns `counts[i]` consecutive
ones, which stand at the positions after the `cached[i]` tokens that its pages hold already. On CUDA nothing here waits
for the device, and a batch of one token a row is made without any copy from the host, so that it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from rayk.errors import AttentionError

T = TypeVar("T")


@dataclass(frozen=True)
class PagedBatch:
    """One packed batch; tensors are on the device of the pages.

    table: int32 `[rows, width]`, page ids in order, null page beyond a row's pages.
    counts: query tokens of each row, at least 1, on the host.
    cached, kv_lengths: int32 `[rows]`, tokens in the cache before and after this batch is written.
    starts: int32 `[rows + 1]`, where each row's tokens begin in the packed batch.
    positions: int64 `[tokens]`, from 0 in each row.
    slots: int64 `[tokens]`, page * page_size + offset: where each token's keys and values go.
    last: int64 `[rows]`, the packed index of each row's last token.
    max_query, max_kv: upper bounds of counts and kv_lengths.
    kv_lengths_host: kv_lengths on the host, None on CUDA: reading them would wait for the device.
    """

    table: torch.Tensor
    counts: tuple[int, ...]
    cached: torch.Tensor
    kv_lengths: torch.Tensor
    starts: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    last: torch.Tensor
    page_size: int
    max_query: int
    max_kv: int
    kv_lengths_host: list[int] | None
    _memo: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def tokens(self) -> int:
        """Packed query tokens of all rows."""
        return self.positions.shape[0]

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token."""
        return self.max_query == 1

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once in the life of this batch: layers share masks and metadata."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]  # stored by this method under the same key


def pack(
    table: torch.Tensor, cached: torch.Tensor, counts: Sequence[int], page_size: int, max_kv: int | None = None
) -> PagedBatch:
    """The batch of these rows. `max_kv`, a bound of the longest row after this step, is needed on CUDA.

    AttentionError if counts do not match the rows, a row has no token, or (on the CPU) a token has no slot.
    """
    counts = tuple(counts)
    rows, device = table.shape[0], table.device
    if len(counts) != rows or cached.shape[0] != rows:
        raise AttentionError(f"a table of {rows} row(s), {len(counts)} count(s) and {cached.shape[0]} cache length(s)")
    if rows == 0 or min(counts) < 1:
        raise AttentionError(f"every row needs at least one token to attend, got counts {list(counts)}")
    starts, row_of, offsets, last = _places(counts, device)
    fresh = 1 if max(counts) == 1 else starts.diff()
    kv_lengths = (cached + fresh).to(torch.int32)
    positions = cached.long() if row_of is None or offsets is None else cached.long()[row_of] + offsets
    if device.type == "cpu":
        host = kv_lengths.tolist()
        max_kv = max(host)
        if max_kv > table.shape[1] * page_size or min(host) < 1:
            raise AttentionError(
                f"rows of {host} tokens do not fit the {table.shape[1]} page(s) of {page_size} that the table shows"
            )
    else:
        host = None
        if max_kv is None:
            raise AttentionError("max_kv is needed on a device: the longest row after this step, or a bound of it")
        max_kv = min(max_kv, table.shape[1] * page_size)
    pages = positions // page_size
    held = table.gather(1, pages[:, None])[:, 0] if row_of is None else table[row_of, pages]
    slots = held.long() * page_size + positions % page_size
    return PagedBatch(
        table, counts, cached, kv_lengths, starts, positions, slots, last, page_size, max(counts), max_kv, host
    )


def _places(
    counts: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """starts, row of each token, its offset in the row, last tokens; no row_of and offsets for one token a row."""
    rows = len(counts)
    if max(counts) == 1:
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return starts, None, None, starts[:-1].long()
    sizes = np.array(counts)
    ends = sizes.cumsum()
    row_of = np.repeat(np.arange(rows), sizes)
    offsets = np.arange(ends[-1]) - (ends - sizes)[row_of]
    packed = torch.from_numpy(np.concatenate(([0], ends, ends - 1, row_of, offsets)))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    per_token = packed[2 * rows + 1 :].view(2, -1)
    return packed[: rows + 1].to(torch.int32), per_token[0], per_token[1], packed[rows + 1 : 2 * rows + 1]
