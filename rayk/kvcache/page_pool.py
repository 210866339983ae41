"""The page pool of one replica: which of its pages hold nothing.

Page ids are 0 .. total-1; the null page is `total` and never leaves this rule: it belongs to nobody and is
never taken or given. Every page is in exactly one place: this pool's stack of empty pages, a segment of the
prefix tree, or the tail of one request.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rayk.errors import IntegrityError

Pages = npt.NDArray[np.int32]


class PagePool:
    """A stack of empty page ids; taking and giving k pages is one array copy."""

    __slots__ = ("_stack", "empty", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.empty = total
        self._stack: Pages = np.arange(total - 1, -1, -1, dtype=np.int32)

    def take(self, count: int) -> Pages:
        """`count` empty pages, [count] int32. The view is valid until the next give(); copy it to keep it."""
        top = self.empty
        if count > top:
            raise IntegrityError("page pool", f"asked for {count} pages, {top} are empty")
        self.empty = top - count
        return self._stack[self.empty : top]

    def give(self, pages: Pages) -> None:
        """Return pages that hold nothing worth keeping."""
        top = self.empty + len(pages)
        if top > self.total:
            raise IntegrityError("page pool", f"{len(pages)} pages returned to {self.empty} empty of {self.total}")
        self._stack[self.empty : top] = pages
        self.empty = top

    def count_into(self, seen: npt.NDArray[np.int64]) -> None:
        """Add 1 to seen[p] for each empty page p (for check_integrity)."""
        np.add.at(seen, self._stack[: self.empty], 1)
