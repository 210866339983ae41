"""The tensors that hold KV pages on one replica's devices.

Per leaf and TP shard one pool, zero at first, `[pages + 1, layers, kv_dim, page_size, heads, head_dim]` and
contiguous: a page with all its layers is one run of bytes, which is what makes copies fast. The public view
swaps the first two page dimensions: `[pages + 1, kv_dim, layers, page_size, heads, head_dim]`. The last page
is the null page: padding and dummies write there. Quantised caches have a second pool for scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rayk.errors import ConfigError
from rayk.kvcache.page_copies import runs
from rayk.kvcache.shared_memory import SharedFile, shared_zeros
from rayk.params import KVCacheParams

PageIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LeafBuffers:
    """One cache of one replica: `values[i]` and `scales[i]` belong to TP shard i, in the public shape."""

    values: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]


def _pool(pages: int, shape: Sequence[int], dtype: str, device: str, files: list[SharedFile] | None) -> torch.Tensor:
    kv_dim, layers, *rest = shape
    size = (pages, layers, kv_dim, *rest)
    try:
        if files is not None and device == "cpu":
            pool, file = shared_zeros(size, getattr(torch, dtype))
            files.append(file)
        else:
            pool = torch.zeros(size, dtype=getattr(torch, dtype), device=device)
    except (RuntimeError, OSError) as error:
        page_bytes = torch.empty((), dtype=getattr(torch, dtype)).element_size() * int(np.prod(shape))
        raise ConfigError(
            f"{pages} pages of {page_bytes} bytes cannot be allocated on {device}: {str(error).splitlines()[0]}; "
            "ask for fewer pages"
        ) from error
    return pool.transpose(1, 2)


class PageBuffers:
    """All KV tensors of one replica. It owns them; views stay valid as long as they are referenced.

    With `shared`, those in host memory are in memory that other processes of the machine can map.
    """

    def __init__(self, params: KVCacheParams, num_pages: int, devices: Sequence[str], shared: bool = False) -> None:
        self.num_pages = num_pages
        files: list[SharedFile] | None = [] if shared else None
        self.leaves: dict[str, LeafBuffers] = {}
        for name, leaf in params.leaves.items():
            layout = leaf.layout
            values = tuple(_pool(num_pages + 1, layout.shape, layout.dtype, d, files) for d in devices)
            scale_shape = layout.scale_shape
            scales = (
                ()
                if scale_shape is None
                else tuple(_pool(num_pages + 1, scale_shape, layout.scale_dtype, d, files) for d in devices)
            )
            self.leaves[name] = LeafBuffers(values, scales)
        self.files = files or []
        """Of the buffers that are in shareable memory, in the order of all_buffers."""

    @property
    def all_buffers(self) -> list[torch.Tensor]:
        """Every buffer in the public shape: per leaf its shards' values, then its shards' scales."""
        return [tensor for leaf in self.leaves.values() for tensor in (*leaf.values, *leaf.scales)]

    @property
    def all_bytes(self) -> list[torch.Tensor]:
        """Every buffer as uint8 `[pages + 1, bytes per page]`, sharing memory."""
        return [t.transpose(1, 2).flatten(1).view(torch.uint8) for t in self.all_buffers]

    def _index(self, page_ids: PageIds | Sequence[int]) -> torch.Tensor:
        ids = np.asarray(page_ids, dtype=np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() > self.num_pages):
            raise ConfigError(f"page ids must be 0..{self.num_pages}, got {ids.min()}..{ids.max()}")
        return torch.from_numpy(ids)

    def read(self, page_ids: PageIds | Sequence[int]) -> list[torch.Tensor]:
        """Host copies of those pages, one tensor `[len(page_ids), ...]` per buffer, in the order of all_buffers."""
        index = self._index(page_ids)
        copies = []
        for t in self.all_buffers:
            raw = t.transpose(1, 2)
            flat = raw.flatten(1).view(torch.uint8)[index.to(raw.device)].cpu()
            copies.append(flat.view(raw.dtype).view(len(index), *raw.shape[1:]).transpose(1, 2))
        return copies

    def read_bytes(self, page_ids: PageIds) -> list[torch.Tensor]:
        """Copies of those pages as uint8 `[n, bytes per page]` per buffer, on the buffers' devices."""
        index = self._index(page_ids)
        return [raw[index.to(raw.device)] for raw in self.all_bytes]

    def write_bytes(self, page_ids: PageIds, data: Sequence[torch.Tensor]) -> None:
        """Overwrite those pages with what read_bytes() of an equal layout gave; data may be on any device."""
        index = self._index(page_ids)
        for raw, new in zip(self.all_bytes, data, strict=True):
            # A device stores what it is given element by element: eight bytes at once where pages allow it.
            unit = torch.int64 if raw.shape[1] % 8 == 0 else torch.uint8
            new = new.to(raw.device).contiguous()
            raw.view(unit).index_copy_(0, index.to(raw.device), new.view(unit))

    def check_layout(self, data: Sequence[torch.Tensor] | Sequence[npt.NDArray[np.uint8]], pages: int) -> str | None:
        """Why `data` does not hold `pages` pages of this layout, or None."""
        want = [(pages, raw.shape[1]) for raw in self.all_bytes]
        got = [tuple(d.shape) for d in data]
        return None if got == want else f"page data of shapes {got}, expected {want}"

    def copy_pages(self, pages: PageIds, source: Sequence[torch.Tensor], theirs: PageIds) -> str | None:
        """Overwrite `pages` with pages `theirs` of another replica's all_bytes; why that cannot be, or None.

        On CUDA the copies are queued on the current streams.
        """
        mine = self.all_bytes
        layout, other = ([(t.shape[1], t.device.type) for t in buffers] for buffers in (mine, source))
        if layout != other:
            return f"pages of {other} bytes do not fit into pages of {layout}"
        if len(theirs) != len(pages) or any(not 0 <= page < len(source[0]) for page in theirs.tolist()):
            return f"pages {theirs.tolist()} for {len(pages)} page(s), of a pool of {len(source[0])}"
        stretches = runs(pages.tolist(), theirs.tolist())
        for target, buffer in zip(mine, source, strict=True):
            for to, of, count in stretches:
                target[to : to + count].copy_(buffer[of : of + count], non_blocking=True)
        return None
