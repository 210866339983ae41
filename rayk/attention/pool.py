"""One replica's pages as attention sees them: key and value views of each layer, and writes by slot.

Made from the public buffer `[pages + 1, kv_dim, layers, page_size, heads, head_dim]`, which lies page-major in memory
(rayk/kvcache/buffers.py). kv_dim is 2, or 1 where a latent is key and value at once. Nothing is copied; the views are
as long-lived as the buffer.
"""

from __future__ import annotations

import torch

from rayk.attention.backend import FP8
from rayk.attention.batch import PagedBatch
from rayk.attention.fused import find_write
from rayk.errors import AttentionError


class PagedPool:
    """Views of a buffer that the caller owns."""

    def __init__(self, kv_blocks: torch.Tensor) -> None:
        stored = kv_blocks.transpose(1, 2) if kv_blocks.dim() == 6 else kv_blocks
        if kv_blocks.dim() != 6 or kv_blocks.shape[1] not in (1, 2) or not stored.is_contiguous():
            raise AttentionError(
                f"a page-major buffer [pages, 1 or 2, layers, page_size, heads, head_dim] is needed, got shape "
                f"{tuple(kv_blocks.shape)} and strides {kv_blocks.stride()}"
            )
        self.dtype = kv_blocks.dtype
        self.kv_dim, self.layers, self.page_size, self.heads, self.head_dim = kv_blocks.shape[1:]
        self._blocks = kv_blocks
        slots = stored.view(torch.uint8) if self.dtype in FP8 else stored
        self._slots = slots.view(-1, self.heads, self.head_dim)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each `[pages, page_size, heads, head_dim]`, strided."""
        return self._blocks[:, 0, layer], self._blocks[:, self.kv_dim - 1, layer]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, batch: PagedBatch) -> None:
        """Put keys and values `[tokens, heads, head_dim]` into the batch's slots of that layer.

        A latent is its key alone. Padding goes to the null page, where several tokens may share a slot and any of them
        may stay. Float8 pages hold the nearest value that they can, at most their largest.
        """
        if self.kv_dim == 2 and self.dtype == key.dtype and key.is_cuda and (fused := find_write()) is not None:
            fused(key.contiguous(), value.contiguous(), *self.layer(layer), batch.slots)
            return
        self._put(layer, key, value, batch.once(("rows", self.layers, self.kv_dim), lambda: self._rows(batch.slots)))

    def write_slots(self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """As write(), to these slots, int64 `[tokens]`."""
        self._put(layer, key, value, self._rows(slots))

    def read_slots(self, layer: int, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values in these slots, int64 `[n]`: each `[n, heads, head_dim]` of that dtype."""
        found = self._slots.index_select(0, self._rows(slots) + self.kv_dim * self.page_size * layer)
        found = (found.view(self.dtype) if self.dtype in FP8 else found).to(dtype)
        return found[: len(slots)], found[-len(slots) :]

    def _put(self, layer: int, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> None:
        both = torch.cat([key, value]) if self.kv_dim == 2 else key
        if self.dtype in FP8:
            most = torch.finfo(self.dtype).max
            both = both.clamp(-most, most).to(self.dtype).view(torch.uint8)
        else:
            both = both.to(self.dtype)
        self._slots.index_copy_(0, rows + self.kv_dim * self.page_size * layer, both)

    def _rows(self, slots: torch.Tensor) -> torch.Tensor:
        """int64 `[kv_dim * tokens]`: rows of the flat pool for the keys, then the values, of layer 0."""
        size = self.page_size
        keys = slots // size * (self.kv_dim * self.layers * size) + slots % size
        return torch.cat([keys, keys + size]) if self.kv_dim == 2 else keys
