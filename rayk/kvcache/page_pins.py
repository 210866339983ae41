"""Pages that travel between replicas: pinned at one, checked before another keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayk.context import TextContext
from rayk.errors import LineError
from rayk.kvcache.page_hash import Mask, PageHasher
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.prefix_tree import PrefixTree
from rayk.kvcache.segment import Segment
from rayk.params import KVCacheParams


@dataclass(frozen=True)
class PageExport:
    """Pages from `start` of a prefix on, with their ids at the source, which pins them until acknowledged."""

    export_id: int
    start: int
    hashes: list[bytes]
    pages: Pages


@dataclass(frozen=True)
class PageImport:
    """The same pages as their target sees them.

    `fill(first, pages)` puts the exported pages from number `first` on into `pages` of the target, or raises LineError
    and leaves anything in them.
    """

    start: int
    hashes: list[bytes]
    fill: Callable[[int, Pages], None]

    @property
    def stop(self) -> int:
        """The page after the last."""
        return self.start + len(self.hashes)


class PagePins:
    """A replica's side of page copies, in both directions. It holds tree paths for copies under way."""

    def __init__(self, params: KVCacheParams, tree: PrefixTree) -> None:
        self._params = params
        self._tree = tree
        seed, size = params.kv_hash_seed or b"", params.page_size
        self.hasher = PageHasher(params.page_hash_algo, seed, size)  # of the tree, for an index and the tiers
        self._names = PageHasher("sha256", seed, size)  # of what another replica takes over: nobody can forge them
        self.mask = Mask()  # of the last reset: what was exported before it fits no more
        self._pinned: dict[int, Segment] = {}  # export id -> held tip
        self.take_back: Callable[[int], None] = self.acknowledge  # whose line has to know of it replaces this
        self._made = 0

    def change_mask(self, token: bytes) -> Mask:
        """Mask hashes with this token from now on, as all replicas do after a reset."""
        self.mask = Mask(token)
        return self.mask

    @property
    def tips(self) -> list[Segment]:
        """The held paths, for check_integrity."""
        return list(self._pinned.values())

    def hashes(self, ctx: TextContext, pages: int) -> list[bytes]:
        """The chained hashes of the request's first `pages` pages: what identifies them between replicas."""
        tokens = ctx.tokens.data[: pages * self._params.page_size].tobytes()
        hashes = self._names.of(ctx.root_key, tokens)
        return list(self.mask.all(hashes)) if self.mask.token else hashes

    def export(self, ctx: TextContext, start: int, stop: int) -> PageExport:
        """The cached pages `start` .. `stop` of that prefix, fewer if evicted meanwhile.

        They are pinned until acknowledge(); their place in the eviction order does not change.
        """
        root = self._tree.hold_root(ctx.root_key)
        tip, pages = self._tree.extend(root, ctx.tokens.data[: stop * self._params.page_size])
        try:
            ids = tip.path_pages()[start:].copy()
            hashes = self.hashes(ctx, pages)[start:]
        except BaseException:
            self._tree.undo(tip, None)
            raise
        self._made += 1
        self._pinned[self._made] = tip
        return PageExport(self._made, start, hashes, ids)

    def acknowledge(self, export_id: int) -> None:
        """The copies have landed or are not wanted: unpin. Unknown ids are ignored, so that it can be repeated."""
        tip = self._pinned.pop(export_id, None)
        if tip is not None:
            self._tree.undo(tip, None)

    def give_up(self, pages: int) -> bool:
        """Unpin all, where that makes `pages` pages free that nobody else holds: a copy can be computed instead, a
        request of this replica cannot. Else, and when nothing is pinned, False, and nothing is changed."""
        if not self._pinned:
            return False
        holds: dict[Segment, int] = {}
        for tip in self.tips:
            node: Segment | None = tip
            while node is not None:
                holds[node] = holds.get(node, 0) + 1
                node = node.parent
        if sum(len(node.pages) for node, count in holds.items() if count == node.refs) < pages:
            return False
        for export_id in list(self._pinned):
            self.take_back(export_id)
        return True

    def usable(self, ctx: TextContext, have: int, stop: int, imports: Sequence[PageImport]) -> int:
        """How many pages `imports` add to the first `have` of the request: every hash must be right."""
        if all(part.stop <= have for part in imports):
            return 0
        mine, end = self.hashes(ctx, stop), have
        for part in imports:
            while part.start <= end < min(stop, part.stop):
                if part.hashes[end - part.start] != mine[end]:
                    return end - have
                end += 1
        return end - have

    def land(self, pages: Pages, first: int, imports: Sequence[PageImport]) -> int:
        """Fill `pages` with the imported pages `first`, `first + 1`, .. of a prefix; how many of them have landed.

        The others hold anything: they may not be read before they are written.
        """
        end, stop = first, first + len(pages)
        for part in imports:
            high = min(part.stop, stop)
            if part.start <= end < high:
                try:
                    part.fill(end - part.start, pages[end - first : high - first])
                except LineError:
                    break
                end = high
        return end - first
