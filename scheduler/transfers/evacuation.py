"""Offering what a replica that goes has cached to those that stay, as rounds of questions.

    source    which prefixes, hottest first   (GetPrefixes, a few at a time)
    targets   what they have of them, and how much room   (Lookup)
    both      pages are exported, kept and unpinned, so many at a time that no step waits for long   (Export, Keep)

Prefixes go whole: to the replica that would then have the most of it; of several to the one that has the longest part
already, and then to the one with the most room. What a target has is not sent again. It ends when nobody has room, when
all was offered, or after SECONDS. Whoever fails is passed over: the removal goes on, and what did not come is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rayk import protocol as m
from rayk.context import IntArray
from rayk.params import OBJECT_STORE
from rayk.scheduler.scaling import Removed
from rayk.scheduler.script import Part, ReplicaCall, ReplicaReply
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.transfer import CopyOrder, ExportedSpan, PageTransfers

SECONDS = 30.0  # after which no further round begins
PREFIXES = 64  # looked at together
TOKEN_BYTES = 256 << 10  # of these
ROUND_BYTES = 64 << 20  # of pages that a target takes between two of its steps
REMEMBERED = 64 << 20  # bytes of tokens of kept prefixes, for their order at the end


class SpanAssignment(NamedTuple):
    """Pages start .. stop of prefix `row` that `target` should get."""

    row: int
    target: int
    start: int
    stop: int


def assign_prefixes(
    prefixes: Sequence[m.CachedPrefix], found: Mapping[int, m.Found], page_size: int
) -> list[SpanAssignment]:
    """Who gets what of the prefixes, hottest first; `found` is what each target has of them, and its room."""
    room = {target: each.room for target, each in found.items()}
    coming: dict[int, list[tuple[m.CachedPrefix, int]]] = {target: [] for target in found}  # and how much of it
    pieces = []
    for row, prefix in enumerate(prefixes):
        pages = len(prefix.tokens) // (4 * page_size)
        best = (0, 0, 0, 0)
        for target, each in found.items():
            shared = (min(_common(prefix, other, page_size), stop) for other, stop in coming[target])
            have = max(each.resident[row], *shared, 0)
            best = max(best, (min(pages, have + room[target]), have, room[target], -target))
        stop, start, _, minus = best
        if stop > start:
            pieces.append(SpanAssignment(row, -minus, start, stop))
            room[-minus] -= stop - start
            coming[-minus].append((prefix, stop))
    return pieces


def _common(one: m.CachedPrefix, other: m.CachedPrefix, page_size: int) -> int:
    """Leading pages that two prefixes share."""
    if (one.cache_salt, one.adapter) != (other.cache_salt, other.adapter):
        return 0
    a, b = _tokens(one), _tokens(other)
    count = min(len(a), len(b))
    differ = np.flatnonzero(a[:count] != b[:count])
    return (int(differ[0]) if len(differ) else count) // page_size


def _tokens(prefix: m.CachedPrefix) -> IntArray:
    return np.frombuffer(prefix.tokens, np.int32)


def view_of(prefix: m.CachedPrefix) -> m.ContextView:
    """A context that would reuse all of the prefix: it goes on for one more token."""
    tokens = prefix.tokens + bytes(4)
    length = len(tokens) // 4
    return m.ContextView("prefix", 0, tokens, 0, length, origin=m.Origin(length + 1, prefix.cache_salt, prefix.adapter))


class Evacuation:
    """`ready()` are the replicas that take requests at that moment."""

    def __init__(
        self, transfers: PageTransfers, ready: Callable[[], Sequence[int]], clock: Callable[[], float]
    ) -> None:
        self._transfers = transfers
        self._links = transfers.links
        self._ready = ready
        self._clock = clock

    def run(self, source: int) -> Generator[list[ReplicaCall], list[ReplicaReply], Removed]:
        """Offer what `source` has. It must not get anything new meanwhile."""
        until, failed, skip = self._clock() + SECONDS, set[int](), 0
        cached = known = taken = 0
        page_size = self._transfers.page_size
        kept = _Kept()
        while targets := [r for r in self._ready() if r != source and r not in failed]:
            [told] = yield [ReplicaCall(source, m.GetPrefixes(skip, PREFIXES, TOKEN_BYTES))]
            if not isinstance(told.result, m.PrefixesDone):
                break
            prefixes, cached = told.result.prefixes, max(cached, told.result.cached)
            if not prefixes or self._clock() >= until:
                break
            skip += len(prefixes)
            views = [view_of(prefix) for prefix in prefixes]
            new = [source] if source not in self._links.peers else []
            found = yield from self._transfers.look_up([*targets, *new], views)
            found.pop(source, None)
            failed |= set(targets) - set(found)
            for row, prefix in enumerate(prefixes):
                others = len(prefix.tokens) // (4 * page_size) - prefix.fresh
                most = max((each.resident[row] for each in found.values()), default=0)
                known += max(0, most - others)
            pieces = assign_prefixes(prefixes, found, page_size)
            taken += yield from self._carry(source, views, pieces, kept, failed, until)
            if not pieces and not any(each.room for each in found.values()):
                break
        yield from self._order(kept, failed)
        return Removed(cached, known, taken)

    def _carry(
        self,
        source: int,
        views: Sequence[m.ContextView],
        pieces: Sequence[SpanAssignment],
        kept: _Kept,
        failed: set[int],
        until: float,
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], int]:
        """Have the pieces copied, round by round; how many pages were taken."""
        due: dict[int, deque[SpanAssignment]] = {}
        for piece in pieces:
            due.setdefault(piece.target, deque()).append(piece)
        taken = 0
        while any(due.values()) and self._clock() < until:
            now = [piece for target, queue in due.items() for piece in self._next(target, queue)]
            orders = [CopyOrder(i, p.target, views[p.row], Span(source, p.start, p.stop)) for i, p in enumerate(now)]
            copies = yield from self._transfers.export(orders)
            if not copies:
                break
            going: dict[int, list[int]] = {}
            for i in sorted(copies):
                going.setdefault(now[i].target, []).append(i)
            began, broken = self._clock(), list[ExportedSpan]()
            keeps = [self._keep(r, [(views[now[i].row], copies[i]) for i in each]) for r, each in going.items()]
            try:
                answers = yield keeps
            except GeneratorExit:
                raise
            except BaseException:  # interrupted: nothing stays pinned
                yield from self._transfers.acknowledge(copies)
                raise
            took = self._clock() - began
            for (target, each), told in zip(going.items(), answers, strict=True):
                if not isinstance(told.result, m.KeepDone):
                    failed.add(target)
                    due.pop(target)
                    continue
                parts = [copy for i in each for copy in copies[i]]
                broke = self._transfers.arrived(parts, told.result.arrivals, took - told.result.seconds)
                broken += broke
                for i, pages in zip(each, told.result.kept, strict=True):
                    taken += pages
                    if pages:
                        kept.add(target, views[now[i].row])
                    if any(copy in broke and copy.kind != OBJECT_STORE for copy in copies[i]):  # over another link
                        due[target].appendleft(now[i]._replace(start=now[i].start + pages))
            yield from self._transfers.acknowledge(copies, broken)
        return taken

    def _next(self, target: int, queue: deque[SpanAssignment]) -> list[SpanAssignment]:
        """What a target gets next of what it is to get."""
        now, left = [], max(1, ROUND_BYTES // max(1, self._links.page_bytes(target)))
        while queue and left > 0:
            piece = queue.popleft()
            stop = min(piece.stop, piece.start + left)
            if stop < piece.stop:
                queue.appendleft(piece._replace(start=stop))
            now.append(piece._replace(stop=stop))
            left -= stop - piece.start
        return now

    def _keep(self, target: int, what: Sequence[tuple[m.ContextView, list[ExportedSpan]]]) -> ReplicaCall:
        imports, uses, data = self._transfers.import_descriptors(parts for _, parts in what)
        return ReplicaCall(target, m.Keep([view for view, _ in what], imports, uses), tuple(data))

    def _order(self, kept: _Kept, failed: set[int]) -> Part:
        """What came last is the coldest: have targets count the hottest as released last."""
        targets = {r: deque(parts) for r, parts in kept.parts().items() if r not in failed}
        while any(targets.values()):
            yield [ReplicaCall(r, m.Keep(parts.popleft())) for r, parts in targets.items() if parts]


class _Kept:
    """Prefixes that targets took, as many as are to be remembered."""

    def __init__(self) -> None:
        self._views: dict[int, dict[m.ContextView, None]] = {}
        self._size = 0

    def add(self, target: int, view: m.ContextView) -> None:
        """The target has it, after those that are hotter."""
        mine = self._views.setdefault(target, {})
        if view not in mine and self._size < REMEMBERED:
            mine[view] = None
            self._size += len(view.tokens)

    def parts(self) -> dict[int, list[list[m.ContextView]]]:
        """Those of each target, coldest first, in messages of a bounded size; nothing for a target that took one."""
        parts: dict[int, list[list[m.ContextView]]] = {}
        for target, views in self._views.items():
            part, size, all_ = list[m.ContextView](), 0, list[list[m.ContextView]]()
            for view in reversed(views):
                if part and size + len(view.tokens) > TOKEN_BYTES:
                    all_.append(part)
                    part, size = [], 0
                part.append(view)
                size += len(view.tokens)
            if len(views) > 1:
                parts[target] = [*all_, part]
        return parts
