"""The prefix tree of one replica: which cached page holds which tokens, who holds it, and what is evicted first.

A node is a *segment*: a run of pages and the exact tokens in them (raw int32 bytes, so that matching is one
memcmp). A child continues its parent; siblings differ in their first page, whose bytes are the key. There is
one root per (salt, adapter). A request holds the path from its tip to the root: `refs` counts holders, so
refs never grow with depth, and a segment without holders has only descendants without holders. Holding part
of a segment splits it, so that all pages of a segment have the same holders.

Eviction order: least recently released first, deepest page of a release first. A release stamps the segments
it frees with one tick and queues the deepest; when that one is gone, its parent follows if it bears the same
tick. Queue entries whose segment was held again since are stale and are dropped when met. undo() gives a hold
back without a release: ticks and queue stay, and so does the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rayk.errors import IntegrityError
from rayk.kvcache.page_hash import PageHash, PageHasher, PageHashes, RootKey
from rayk.kvcache.page_pool import PagePool, Pages
from rayk.kvcache.segment import Root, Segment

Tokens = npt.NDArray[np.int32]  # contiguous

GROW_LIMIT = 64  # pages: a tip grows in place up to this, then a new segment starts (bounds the copying)


class Match(NamedTuple):
    """Where a walk ended: all of `node`, then `partial` pages of its child `into`; `pages` counts both."""

    node: Segment
    pages: int
    into: Segment | None
    partial: int


class PageListener(Protocol):
    """Told what a tree caches and drops, while it does so: it must neither raise nor call the tree."""

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        """`pages` now hold `tokens` and are cached below `root`, after `parent` (a page or that root); the
        array may be kept, not written."""
        ...

    def removed(self, hashes: Sequence[PageHash]) -> None:
        """These pages are not cached any more."""
        ...


class PrefixTree:
    """Changes only through hold_root, extend, undo, release, commit, make_room and reset. Pages it drops go to `pool`.

    With a `hasher` it keeps the hash of every cached page and tells its `listeners` of changes.
    """

    def __init__(self, page_size: int, pool: PagePool, hasher: PageHasher | None = None) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * 4
        self._pool = pool
        self._hasher = hasher
        self._listeners: list[PageListener] = []
        self._roots: dict[RootKey, Root] = {}
        self._queue: deque[tuple[int, Segment]] = deque()
        self._tick = 0
        self._segments = 0
        self._retired: set[Root] = set()
        self.retired = 0  # pages in retired segments
        self.cached = 0  # pages that can be hit
        self.evictable = 0  # of these, pages in segments that nobody holds
        self.evicted = 0  # pages evicted so far

    def listen(self, listener: PageListener, hasher: PageHasher) -> None:
        """Tell `listener` of every page from now on, and at once of those that are cached, parents first.

        All listeners use one kind of hash.
        """
        if self._hasher is None:
            self._hasher = hasher
            for key, root in self._roots.items():
                root.hashes = hasher.root(key)
            for node in self.segments():
                node.hashes = b"".join(hasher.chain(node.parent_hash(hasher.width), node.tokens))
        self._listeners.append(listener)
        for node in self.segments():
            hashes = PageHashes(node.hashes, hasher.width)
            listener.stored(node.root.key, node.parent_hash(hasher.width), hashes, node.pages, node.tokens)

    def hashes(self) -> Iterator[bytes]:
        """The hash of every cached page, parents first; nothing without a hasher."""
        if self._hasher is not None:
            for node in self.segments():
                yield from PageHashes(node.hashes, self._hasher.width)

    # -- lookup: these change nothing ------------------------------------------------------

    def page_hash(self, match: Match) -> PageHash:
        """The chained hash of the last matched page, the root's when nothing matched. Needs a hasher."""
        assert self._hasher is not None
        width = self._hasher.width
        if match.into is None or not match.partial:
            return match.node.last_hash(width)
        return PageHash(match.into.hashes[(match.partial - 1) * width : match.partial * width])

    def find_root(self, key: RootKey) -> Segment | None:
        """The root of that salt and adapter, if anything was ever cached under it."""
        return self._roots.get(key)

    def find(self, key: RootKey, tokens: Tokens) -> Match | None:
        """match() from the root of that salt and adapter on."""
        root = self._roots.get(key)
        return self.match(root, tokens) if root is not None else None

    def match(self, start: Segment, tokens: Tokens) -> Match:
        """The longest cached continuation of `start` that `tokens` (int32, whole pages) begins with."""
        size, at, node, end = self._page_size, 0, start, len(tokens)
        while at < end:
            child = node.children.get(tokens[at : at + size].tobytes())
            if child is None:
                break
            stop = at + len(child.pages) * size
            if stop > end or not child.tokens.startswith(tokens[at:stop]):  # type: ignore[arg-type]  # a buffer
                partial = self._common_pages(child.tokens, tokens, at)
                return Match(node, at // size + partial, child, partial)
            at, node = stop, child
        return Match(node, at // size, None, 0)

    def _common_pages(self, segment: bytes, tokens: Tokens, at: int) -> int:
        """Pages of `segment` that `tokens[at:]` begins with, knowing that the first one fits and not all do."""
        size, page = self._page_size, self._page_bytes
        low, high = 1, min(len(segment) // page, (len(tokens) - at) // size) + 1  # low fits, high does not
        while high - low > 1:
            mid = (low + high) // 2
            part = tokens[at + low * size : at + mid * size]
            if segment[low * page : mid * page].startswith(part):  # type: ignore[arg-type]  # a buffer
                low = mid
            else:
                high = mid
        return low

    # -- holding ------------------------------------------------------------------------------

    def hold_root(self, key: RootKey) -> Segment:
        """The root of that salt and adapter, made if needed, with one more holder."""
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = Root(key, self._hasher.root(key) if self._hasher is not None else b"")
        root.refs += 1
        return root

    def extend(self, tip: Segment, tokens: Tokens) -> tuple[Segment, int]:
        """Hold what is cached of `tokens` below `tip`, for its holder: the new tip, and how many pages it adds."""
        size, at, end = self._page_size, 0, len(tokens)
        while at < end:
            child = tip.children.get(tokens[at : at + size].tobytes())
            if child is None:
                break
            stop = at + len(child.pages) * size
            if stop > end or not child.tokens.startswith(tokens[at:stop]):  # type: ignore[arg-type]  # a buffer
                partial = self._common_pages(child.tokens, tokens, at)
                if partial < len(child.pages):
                    child = self._split(child, partial)
                stop, end = at + partial * size, 0  # the last one
            if not child.refs:
                self.evictable -= len(child.pages)
            child.refs += 1
            tip, at = child, stop
        return tip, at // size

    def undo(self, end: Segment, tip: Segment | None) -> None:
        """Take a hold back from `end` up to, not including, `tip` (None: the root too); order as before."""
        if end.retired:
            self._leave(end, tip)
            return
        node = end
        while node is not tip and node.parent is not None:
            node.refs -= 1
            if not node.refs:
                self.evictable += len(node.pages)
                if not node.queued:
                    self._requeue(node)
            node = node.parent
        if node is not tip:
            node.refs -= 1
            if not (node.refs or node.children):
                self._drop_if_root(node)

    def release(self, tip: Segment) -> None:
        """A holder of the path to `tip` is done: what nobody else holds becomes evictable, as of now."""
        if tip.retired:
            self._leave(tip, None)
            return
        self._tick = tick = self._tick + 1
        node, below = tip, None
        while node.parent is not None:
            node.refs -= 1
            node.tick = tick  # also when an export still holds it: undo() will find its place by the tick
            node.queued = False  # an older entry, if any, bears an older tick
            node.below = below
            if not node.refs:
                self.evictable += len(node.pages)
            node, below = node.parent, node
        if not tip.refs and len(tip.pages):
            self._queue.append((tick, tip))
            tip.queued = True
        node.refs -= 1
        if not (node.refs or node.children):
            self._drop_if_root(node)
        if len(self._queue) > 2 * self._segments + 64:
            self._queue = deque(entry for entry in self._queue if entry[0] == entry[1].tick)

    def _requeue(self, node: Segment) -> None:
        """Put an entry back that make_room() dropped while the segment was held by an export."""
        below = node.below
        if below is not None and below.tick == node.tick and not below.refs:
            return  # the child's entry leads here
        at = 0
        for tick, _ in self._queue:
            if tick >= node.tick:
                break
            at += 1
        self._queue.insert(at, (node.tick, node))
        node.queued = True

    def _leave(self, end: Segment, tip: Segment | None) -> None:
        """A holder of retired segments is done with them: what nobody else holds is empty."""
        node = end
        while node is not tip and node.parent is not None:
            parent = node.parent
            node.refs -= 1
            if not node.refs:
                del parent.children[node.tokens[: self._page_bytes]]
                self.retired -= len(node.pages)
                self._pool.give(node.pages)
                self._segments -= 1
            node = parent
        if node is not tip:
            node.refs -= 1
            if not node.refs:
                assert isinstance(node, Root)
                self._retired.remove(node)

    def _drop_if_root(self, node: Segment) -> None:
        if isinstance(node, Root):
            del self._roots[node.key]

    # -- growing --------------------------------------------------------------------------------

    def commit(self, tip: Segment, tokens: Tokens, pages: Pages) -> tuple[Segment, Pages | None]:
        """Cache `pages` with `tokens` (int32) below `tip`, for the holder of `tip`, who holds them afterwards.

        Returns the new tip, and the pages to use instead of the first given ones where the content was cached already:
        those are held, and the given copies are back in the pool.
        """
        raw = tokens.tobytes()
        if raw[: self._page_bytes] not in tip.children:
            return self._append(tip, raw, pages), None
        end, known = self.extend(tip, tokens)
        self._pool.give(pages[:known])
        return self._append(end, raw[known * self._page_bytes :], pages[known:]), end.path_pages(tip)

    def _append(self, tip: Segment, tokens: bytes, pages: Pages) -> Segment:
        """New content below `tip`, held once: in place when nobody else could notice, else as a child."""
        count = len(pages)
        if not count:
            return tip
        pages, hashes = pages.copy(), b""  # not written from here on
        if tip.retired:
            self.retired += count
        else:
            self.cached += count
            if self._hasher is not None:
                hashes = self._announce(self._hasher, tip, tokens, pages)
        if tip.refs == 1 and not tip.children and 0 < len(tip.pages) <= GROW_LIMIT - count:
            tip.tokens += tokens
            tip.hashes += hashes
            tip.pages = np.concatenate((tip.pages, pages))
            return tip
        child = Segment(tip, tokens, pages, 1, 0, hashes)
        tip.children[tokens[: self._page_bytes]] = child
        self._segments += 1
        return child

    def _announce(self, hasher: PageHasher, tip: Segment, tokens: bytes, pages: Pages) -> bytes:
        """Hash new pages below `tip` and tell the listeners; the hashes, joined."""
        parent = tip.last_hash(hasher.width)
        hashes = hasher.chain(parent, tokens)
        for listener in self._listeners:
            listener.stored(tip.root.key, parent, hashes, pages, tokens)
        return b"".join(hashes)

    def _split(self, node: Segment, count: int) -> Segment:
        """Cut `node` after `count` pages; the upper part is new and returned, the lower keeps its identity."""
        cut = count * self._page_bytes
        parent = node.parent
        assert parent is not None
        upper = Segment(parent, node.tokens[:cut], node.pages[:count].copy(), node.refs, node.tick)
        upper.below = node
        if parent.below is node:
            parent.below = upper
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[count:].copy(), upper
        if self._hasher is not None:
            hashed = count * self._hasher.width
            upper.hashes, node.hashes = node.hashes[:hashed], node.hashes[hashed:]
        parent.children[upper.tokens[: self._page_bytes]] = upper
        upper.children[node.tokens[: self._page_bytes]] = node
        self._segments += 1
        return upper

    # -- shrinking --------------------------------------------------------------------------------

    def make_room(self, count: int) -> None:
        """Evict until the pool has `count` empty pages; the caller has checked that enough are evictable."""
        wanted = missing = count - self._pool.empty
        while missing > 0:
            if not self._queue:
                raise IntegrityError(
                    "prefix tree", f"{missing} pages to evict, {self.evictable} evictable, none queued"
                )
            tick, node = self._queue[0]
            if node.tick != tick or node.refs:
                self._queue.popleft()
                if node.tick == tick:
                    node.queued = False
                continue
            pages = node.pages
            keep = max(0, len(pages) - missing)
            missing -= len(pages) - keep
            if self._hasher is not None:
                self._renounce(node, keep)
            if keep:
                self._pool.give(pages[keep:])
                node.pages, node.tokens = pages[:keep].copy(), node.tokens[: keep * self._page_bytes]
            else:
                self._pool.give(pages)
                self._detach(node, tick)
        if wanted > 0:
            self.cached -= wanted
            self.evictable -= wanted
            self.evicted += wanted

    def _detach(self, node: Segment, tick: int) -> None:
        """Remove an empty leaf that heads the queue; its parent takes its place if it was freed with it."""
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[node.tokens[: self._page_bytes]]
        if parent.below is node:
            parent.below = None
        node.tick = -1
        self._segments -= 1
        if parent.tick == tick and not parent.refs and not parent.queued and len(parent.pages):
            self._queue[0] = (tick, parent)
            parent.queued = True
        else:
            self._queue.popleft()
            if not (parent.refs or parent.children):
                self._drop_if_root(parent)

    def _renounce(self, node: Segment, keep: int) -> None:
        """Tell the listeners that the pages after the first `keep` of `node` are gone."""
        assert self._hasher is not None
        width = self._hasher.width
        gone = PageHashes(node.hashes[keep * width :], width)
        node.hashes = node.hashes[: keep * width]
        for listener in self._listeners:
            listener.removed(gone)

    def reset(self, retire: bool = False) -> None:
        """Forget all cached pages that nobody holds; held ones stay and can still be hit.

        With `retire` they cannot: they stay with their holders, who may go on and share what they add among themselves,
        no listener hears of them any more, and they are empty when the last holder leaves.
        """
        stack: list[Segment] = list(self._roots.values())
        while stack:
            node = stack.pop()
            for key, child in list(node.children.items()):
                stack.append(child)
                child.queued = False
                if child.refs and not retire:
                    continue
                if self._hasher is not None:
                    self._renounce(child, 0)
                if child.refs:
                    child.retired = True
                    self.cached -= len(child.pages)
                    self.retired += len(child.pages)
                    continue
                child.below = None
                if node.below is child:
                    node.below = None
                self.cached -= len(child.pages)
                self.evictable -= len(child.pages)
                self._pool.give(child.pages)
                child.tick = -1
                self._segments -= 1
                del node.children[key]
        self._queue.clear()
        roots, self._roots = self._roots, {}
        for root in roots.values():
            if root.refs and retire:
                self._retire(root)
            elif root.refs or root.children:
                self._roots[root.key] = root

    def retired_root(self, key: RootKey) -> Segment:
        """A root with one holder, below which nothing that is cached is ever hit by others: as after a reset."""
        root = Root(key, b"")
        root.refs = 1
        self._retire(root)
        return root

    def _retire(self, root: Root) -> None:
        root.retired = True
        root.hashes = b""
        self._retired.add(root)

    # -- checking ----------------------------------------------------------------------------------

    def segments(self) -> Iterator[Segment]:
        """All segments that can be hit, parents before children, without the roots."""
        return chain.from_iterable(root.below_it() for root in self._roots.values())

    def check_integrity(self, tips: list[Segment], seen: npt.NDArray[np.int64]) -> None:
        """IntegrityError unless the tree is consistent with its holders' `tips`; adds its pages to `seen`."""
        holders: dict[int, int] = {}
        for tip in tips:
            node: Segment | None = tip
            while node is not None:
                holders[id(node)] = holders.get(id(node), 0) + 1
                node = node.parent
        queued = {(tick, id(node)) for tick, node in self._queue}
        cached = evictable = retired = count = 0
        for node in chain(self.segments(), *(root.below_it() for root in self._retired)):
            count += 1
            cached += 0 if node.retired else len(node.pages)
            retired += len(node.pages) if node.retired else 0
            evictable += 0 if node.refs else len(node.pages)
            np.add.at(seen, node.pages, 1)
            above_it = node.parent
            self._check(above_it is not None and above_it.retired == node.retired, node, "is retired, or its parent is")
            self._check(bool(node.refs) or not node.retired, node, "is retired and nobody holds it")
            if self._hasher is not None and not node.retired:
                right = b"".join(self._hasher.chain(node.parent_hash(self._hasher.width), node.tokens))
                self._check(node.hashes == right, node, "bears hashes of other tokens")
            self._check(
                len(node.tokens) == len(node.pages) * self._page_bytes > 0, node, "tokens do not fill its pages"
            )
            self._check(node.refs == holders.get(id(node), 0), node, f"refs {node.refs} != {holders.get(id(node), 0)}")
            for key, child in node.children.items():
                self._check(child.parent is node and child.tokens.startswith(key), child, "is filed under a wrong key")
                self._check(child.refs <= node.refs, child, "is held more often than its parent")
            if not node.refs:
                led = any(c.tick == node.tick for c in node.children.values())
                self._check(led or (node.tick, id(node)) in queued, node, "is evictable but not queued")
        for root in (*self._roots.values(), *self._retired):
            self._check(root.refs == holders.get(id(root), 0), root, f"root refs {root.refs}")
        found = cached, evictable, retired, count
        kept = self.cached, self.evictable, self.retired, self._segments
        if found != kept:
            raise IntegrityError("prefix tree", f"counted (cached, evictable, retired, segments) {found}, kept {kept}")

    @staticmethod
    def _check(ok: bool, node: Segment, message: str) -> None:
        if not ok:
            raise IntegrityError("prefix tree", f"segment with pages {node.pages[:8].tolist()}.. {message}")
