"""Pages that travel between replicas: copied out of one and pinned there, checked before another keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayk.buffers import PageBuffers
from rayk.context import TextContext
from rayk.hashing import PageHasher
from rayk.pages import Pages
from rayk.params import KVCacheParams
from rayk.prefix import PrefixTree, Segment


@dataclass(frozen=True)
class PageExport:
    """Pages `start` .. `start + len(hashes)` of a prefix. The source pins them until acknowledged."""

    export_id: int
    start: int
    hashes: list[bytes]
    data: list[torch.Tensor]  # uint8 [pages, bytes per page] per buffer

    @property
    def stop(self) -> int:
        """The page after the last."""
        return self.start + len(self.hashes)


class Exports:
    """A replica's side of page copies, in both directions. It holds tree paths for copies under way."""

    def __init__(self, params: KVCacheParams, tree: PrefixTree, buffers: PageBuffers) -> None:
        self._params = params
        self._tree = tree
        self._buffers = buffers
        self.hasher = PageHasher(params.kv_hash_algo, params.kv_hash_seed or b"", params.page_size)
        self._pinned: dict[int, tuple[Segment, int]] = {}  # export id -> held tip, deadline
        self._made = 0

    @property
    def tips(self) -> list[Segment]:
        """The held paths, for check_integrity."""
        return [tip for tip, _ in self._pinned.values()]

    def hashes(self, ctx: TextContext, pages: int) -> list[bytes]:
        """The chained hashes of the request's first `pages` pages: what identifies them between replicas."""
        tokens = ctx.tokens.data[: pages * self._params.page_size].tobytes()
        return list(self.hasher.chain(self.hasher.root(ctx.root_key), tokens))

    def export(self, ctx: TextContext, start: int, stop: int, deadline: int) -> PageExport:
        """Copies of the cached pages `start` .. `stop` of that prefix, fewer if evicted meanwhile.

        They are pinned until acknowledge() or the deadline; their place in the eviction order does not change.
        """
        root = self._tree.hold_root(ctx.root_key)
        tip, pages = self._tree.extend(root, ctx.tokens.data[: stop * self._params.page_size])
        try:
            data = self._buffers.read_bytes(self._tree.path_pages(tip)[start:])
            hashes = self.hashes(ctx, pages)[start:]
        except BaseException:
            self._tree.undo(tip, None)
            raise
        self._made += 1
        self._pinned[self._made] = (tip, deadline)
        return PageExport(self._made, start, hashes, data)

    def acknowledge(self, export_id: int) -> None:
        """The copies have landed or are not wanted: unpin. Unknown ids are ignored, so that it can be repeated."""
        pinned = self._pinned.pop(export_id, None)
        if pinned is not None:
            self._tree.undo(pinned[0], None)

    def expire(self, now: int) -> int:
        """Unpin what was not acknowledged by its deadline (its reader is gone); how many."""
        late = [export_id for export_id, (_, deadline) in self._pinned.items() if deadline < now]
        for export_id in late:
            self.acknowledge(export_id)
        return len(late)

    def usable(self, ctx: TextContext, have: int, stop: int, imports: Sequence[PageExport]) -> int:
        """How many pages `imports` add to the first `have` of the request: layout and every hash must be right."""
        mine, end = self.hashes(ctx, stop), have
        for part in imports:
            if self._buffers.check_layout(part.data, len(part.hashes)) is not None:
                break
            while part.start <= end < min(stop, part.stop):
                if part.hashes[end - part.start] != mine[end]:
                    return end - have
                end += 1
        return end - have

    def land(self, pages: Pages, first: int, imports: Sequence[PageExport]) -> None:
        """Write the imported pages `first`, `first + 1`, .. of a prefix into `pages`."""
        for part in imports:
            low, high = max(part.start, first), min(part.stop, first + len(pages))
            if low < high:
                rows = slice(low - part.start, high - part.start)
                self._buffers.write_bytes(pages[low - first : high - first], [d[rows] for d in part.data])
