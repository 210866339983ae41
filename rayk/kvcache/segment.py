"""A segment of the prefix tree: a run of pages, the tokens in them, and the way to its root."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rayk.kvcache.page_hash import PageHash, RootKey
from rayk.kvcache.page_pool import Pages

_NO_PAGES: Pages = np.empty(0, np.int32)


class Segment:
    """`pages[i]` holds the i-th page of `tokens`. A root has no pages.

    `hashes` has the pages' chained hashes one after the other once the tree has a listener; a root's is its own.
    """

    __slots__ = (
        "below",
        "children",
        "hashes",
        "pages",
        "parent",
        "queued",
        "refs",
        "retired",
        "root",
        "tick",
        "tokens",
    )

    def __init__(
        self, parent: Segment | None, tokens: bytes, pages: Pages, refs: int, tick: int, hashes: bytes = b""
    ) -> None:
        self.parent = parent
        if parent is not None:
            self.root: Root = parent.root
        self.retired: bool = parent is not None and parent.retired  # by a reset: no hashes; goes with its last holder
        self.tokens = tokens
        self.pages = pages
        self.hashes = hashes
        self.refs = refs
        self.tick = tick  # of the release that freed it last; -1 once it left the tree
        self.below: Segment | None = None  # the child that was freed by the same release, if any
        self.queued = False  # whether the eviction queue has an entry (tick, self)
        self.children: dict[bytes, Segment] = {}

    def last_hash(self, width: int) -> PageHash:
        """The hash of the last page, or a root's own; `width` is that of every hash."""
        return PageHash(self.hashes[-width:])

    def parent_hash(self, width: int) -> PageHash:
        """The hash that the first page's continues; not of a root."""
        assert self.parent is not None
        return self.parent.last_hash(width)

    def path_pages(self, above: Segment | None = None) -> Pages:
        """Page ids from below `above` (the root when None) down to this segment, in sequence order."""
        parts = []
        node = self
        while node is not above and node.parent is not None:
            parts.append(node.pages)
            node = node.parent
        return parts[0] if len(parts) == 1 else np.concatenate(parts[::-1] or [_NO_PAGES])

    def path_hashes(self) -> bytes:
        """The hashes of all pages down to this segment, joined."""
        parts = []
        node = self
        while node.parent is not None:
            parts.append(node.hashes)
            node = node.parent
        return b"".join(reversed(parts))

    def below_it(self) -> Iterator[Segment]:
        """All segments below, parents before children."""
        stack: list[Segment] = [self]
        while stack:
            children = list(stack.pop().children.values())
            yield from children
            stack += children


class Root(Segment):
    """The empty segment above all segments of one salt and adapter."""

    __slots__ = ("key",)

    def __init__(self, key: RootKey, own_hash: bytes) -> None:
        super().__init__(None, b"", _NO_PAGES, 0, 0, own_hash)
        self.key = key
        self.root = self
