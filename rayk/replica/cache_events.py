"""What changed in a replica's cache, kept so that whoever follows it can be told: everything after a number.

The scheduler says with each of its messages up to which number it knows; the answer brings what came after. Numbers
are of closed batches, one for each message that changed something. A batch that changed no page takes no place. Only
the last KEPT changes are kept, and nobody is told of more than BEHIND batches: who is further behind gets the whole
content instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from rayk.context import TextContext
from rayk.kvcache.page_hash import KEY_BYTES, PageHash, RootKey
from rayk.kvcache.page_pool import Pages
from rayk.protocol.from_replica import CacheDelta

KEPT = 1 << 18  # pages in batches that can still be asked for
BEHIND = 1 << 16  # batches that one answer tells of
Change = tuple[bool, bytes]  # stored or removed, keys of the pages


class CacheEventLog:
    """A listener of one replica's prefix tree. `everything` yields the hashes of all cached pages."""

    def __init__(self, everything: Callable[[], Iterator[bytes]]) -> None:
        self.number = 0
        self._everything = everything
        self._open: list[Change] = []
        self._closed: deque[tuple[int, list[Change]]] = deque()  # the numbers of batches with pages, and these
        self._since = 0  # every such batch after this one is there
        self._kept = 0
        self._unfilled = 0

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        """See PageListener."""
        if hashes:
            self._open.append((True, _keys(hashes)))

    def removed(self, hashes: Sequence[PageHash]) -> None:
        """See PageListener."""
        if hashes:
            self._open.append((False, _keys(hashes)))

    def close(self, unfilled: int) -> int:
        """End the batch of a message if anything changed, the tokens still to be prefilled included; the number."""
        if self._open or unfilled != self._unfilled:
            self.number += 1
            self._unfilled = unfilled
            if self._open:
                self._keep(self._open)
                self._open = []
        return self.number

    def _keep(self, changes: list[Change]) -> None:
        self._closed.append((self.number, changes))
        self._kept += sum(len(keys) for _, keys in changes)
        while self._kept > KEPT * KEY_BYTES:
            self._since, dropped = self._closed.popleft()
            self._kept -= sum(len(keys) for _, keys in dropped)

    def news(self, known: int, free: int) -> CacheDelta | None:
        """What came after batch `known`; None when that is nothing."""
        if known == self.number:
            return None
        if not max(self._since, self.number - BEHIND) <= known <= self.number:
            whole = b"".join(_keys([page]) for page in self._everything())
            return CacheDelta(self.number, -1, [[(True, whole)]], self._unfilled, free)
        batches: list[list[Change]] = [[] for _ in range(self.number - known)]
        for number, changes in reversed(self._closed):
            if number <= known:
                break
            batches[number - known - 1] = changes
        return CacheDelta(self.number, known, batches, self._unfilled, free)


def _keys(hashes: Iterable[bytes]) -> bytes:
    return b"".join([each[:KEY_BYTES] for each in hashes])


class PrefillBacklog:
    """Tokens of claimed requests that no forward has processed yet: what a replica still has to prefill."""

    def __init__(self) -> None:
        self.total = 0
        self._left: dict[str, int] = {}

    def now(self, request_id: str, left: int) -> None:
        """So many of the request's tokens are left; the last one is no prefill."""
        before = self._left.get(request_id, 0)
        if left > 1:
            self._left[request_id] = left
            self.total += left - before
        elif before:
            del self._left[request_id]
            self.total -= before

    def seen(self, ctxs: Sequence[TextContext]) -> None:
        """Requests as a message brings them. Those that were done before cost next to nothing."""
        left = self._left
        if left:
            for ctx in ctxs:
                if ctx.request_id in left:
                    self.now(ctx.request_id, ctx.tokens.length - ctx.tokens.processed)

    def drop(self, request_id: str) -> None:
        """The request was released."""
        self.now(request_id, 0)
