"""Prefix copies between replicas, as rounds of the scheduler's.

Replicas never call each other or the scheduler. A copy is a lookup at all replicas, an export at its source, which pins
the pages, an admission at its target, which allocates pages and fetches, and an acknowledgement, whatever happened in
between. The data goes from replica to replica over a line of rayk.transport.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rayk import messages as m
from rayk.columns import Batch
from rayk.errors import LineError
from rayk.peers import Span, copy_spans, worthwhile
from rayk.scheduler.asks import Ask, Part, Told
from rayk.scheduler.lines import Lines
from rayk.scheduler.membership import Membership
from rayk.transport.choice import OBJECT_STORE

Groups = dict[int, list[int]]  # replica -> rows of a batch


class Copy(NamedTuple):
    """Exported pages on their way to a place. `seconds` is what the export took."""

    source: int
    target: int
    line: str
    export: m.Exported
    data: Any
    seconds: float


Copies = dict[int, list[Copy]]  # row of a batch -> what it may import, in order


class _Order(NamedTuple):
    """Pages that a row of a batch wants from another replica."""

    row: int
    target: int
    view: m.ContextView
    span: Span


class Copying:
    """The copies of all batches of a scheduler, between its `members`."""

    def __init__(self, members: Membership, lines: Lines, page_size: int, clock: Callable[[], float]) -> None:
        self.lines = lines
        self._members = members
        self._version = 0  # of the members when it was last looked who left
        self._page_size = page_size
        self._clock = clock

    # -- before the admission ------------------------------------------------------------------------

    def fetch(
        self, batch: Batch, groups: Groups, lonely: set[int], prefill_rate: float | None
    ) -> Generator[list[Ask], list[Told], Copies]:
        """Have the prefixes that a chosen replica misses exported by others; nobody has any of the `lonely` ones."""
        replicas = {i: r for r, rows in groups.items() for i in rows if i not in lonely}
        wanted = sorted(replicas)
        if not wanted:
            return {}
        views = [batch.view(i) for i in wanted]
        here = list(self._members.here)
        answers = yield [Ask(r, m.Lookup(views, self.lines.unknown(r))) for r in here]
        found: list[m.Found | None] = [None] * len(self._members)
        for replica, told in zip(here, answers, strict=True):
            each = told.result
            if isinstance(each, m.Found):
                found[replica] = each
                if each.station is not None:
                    self.lines.joined(replica, each.epoch, each.station)
        orders: list[_Order] = []
        known: set[tuple[Any, ...]] = set()
        for at, i in enumerate(wanted):
            target = replicas[i]
            for span in self._spans(found, at, target, prefill_rate):
                coming = (target, span, self._prefix(views[at], span.stop))
                if coming not in known:  # else an earlier request of this batch brings these pages
                    known.add(coming)
                    orders.append(_Order(i, target, views[at], span))
        return (yield from self._export(orders))

    def _spans(self, found: Sequence[m.Found | None], at: int, target: int, prefill_rate: float | None) -> list[Span]:
        """What the request `at` of a lookup should get from others: all that they have, or what pays."""
        mine = found[target]
        if mine is None:
            return []
        resident = [0 if f is None or r == target else f.resident[at] for r, f in enumerate(found)]
        have, stop, most = mine.resident[at], mine.reusable[at], max(resident)
        if mine.host and most <= have + mine.host[at] + mine.disk[at]:
            return []  # what the others have is in this node's tiers
        order = None
        if prefill_rate is not None:
            holders = [r for r, pages in enumerate(resident) if pages > have]
            order = self.lines.quickest(holders, target, min(most, stop) - have)

        def seconds(span: Span) -> float:
            return self.lines.seconds(span.replica, target, span.stop - span.start)

        return worthwhile(copy_spans(have, resident, stop, order), seconds, self._page_size, prefill_rate)

    def _prefix(self, view: m.ContextView, pages: int) -> tuple[Any, ...]:
        """What makes the first pages of a request what they are."""
        origin = view.origin
        owner = (origin.cache_salt, origin.adapter) if origin is not None else None
        return owner, view.tokens[: pages * self._page_size * 4]

    def _export(self, orders: Sequence[_Order]) -> Generator[list[Ask], list[Told], Copies]:
        """Ask for the exports; one whose line is refused is asked for again over the next best."""
        copies: Copies = {}
        while orders:
            kinds = [self.lines.use(order.span.replica, order.target) for order in orders]
            began = self._clock()
            answers = yield [self._ask(order, kind) for order, kind in zip(orders, kinds, strict=True)]
            took = self._clock() - began
            again: list[_Order] = []
            for order, kind, told in zip(orders, kinds, answers, strict=True):
                source = order.span.replica
                if isinstance(told.result, m.Exported):
                    copy = Copy(source, order.target, kind, told.result, told.data, took)
                    copies.setdefault(order.row, []).append(copy)
                elif kind != OBJECT_STORE and isinstance(told.result, m.Failure):
                    error = m.to_error(told.result)
                    if isinstance(error, LineError):
                        self.lines.failed(source, order.target, kind, error.reason)
                        again.append(order)
            orders = again
        for parts in copies.values():
            parts.sort(key=lambda copy: copy.export.start)
        return copies

    def _ask(self, order: _Order, kind: str) -> Ask:
        span, to = order.span, self.lines.peer(order.target)
        export = m.Export(order.view, span.start, span.stop, kind, to.replica, to.epoch)
        return Ask(span.replica, export, (), kind == OBJECT_STORE)

    # -- with the admission ----------------------------------------------------------------------------

    def heads(self, parts: Iterable[Copy]) -> tuple[list[m.ImportHead], list[Any]]:
        """What the target is told of the copies, and the page data that goes along."""
        heads, data = [], []
        for copy in parts:
            export, source = copy.export, self.lines.peer(copy.source)
            how = (
                copy.line,
                source.replica,
                source.epoch,
                export.export_id,
                export.pages,
                export.offer,
                export.expires,
            )
            heads.append(m.ImportHead(export.start, export.hashes, *how))
            if copy.line == OBJECT_STORE:
                data.append(copy.data)
        return heads, data

    def arrived(self, parts: Sequence[Copy], done: m.AdmitDone, took: float) -> list[Copy]:
        """What became of the copies of one admission, which was answered after so long; those whose line broke."""
        arrivals, broken = done.arrivals, []
        pages = sum(arrival.pages for arrival in arrivals)
        away = max(0.0, took - float(np.frombuffer(done.seconds).sum()))  # neither claiming nor allocating
        for copy, arrival in zip(parts, arrivals, strict=False):
            if arrival.trouble:
                self.lines.failed(copy.source, copy.target, copy.line, arrival.trouble)
                broken.append(copy)
            elif arrival.pages:
                seconds = copy.seconds + arrival.seconds
                if copy.line == OBJECT_STORE:  # the way there is not in what the target measures
                    seconds += away * arrival.pages / pages
                self.lines.carried(copy.source, copy.target, copy.line, arrival.pages, seconds)
        return broken

    # -- after it --------------------------------------------------------------------------------------

    def acknowledge(self, copies: Copies, broken: Iterable[Copy]) -> Part:
        """Have the exports unpinned, and lines that broke closed at the source; the target's end is closed already."""
        exported: dict[int, list[int]] = {}
        for copy in (copy for parts in copies.values() for copy in parts):
            exported.setdefault(copy.source, []).append(copy.export.export_id)
        asks = [Ask(source, m.Acknowledge(ids)) for source, ids in exported.items()]
        pairs = dict.fromkeys((copy.source, copy.target) for copy in broken)
        asks += [Ask(source, m.DropLines([target])) for source, target in pairs]
        if asks:
            yield asks

    def say_farewell(self) -> Part:
        """Have lines to replicas that left closed, or the memory of these would be kept for nothing."""
        members = self._members
        if members.version != self._version:
            self._version, epochs = members.version, members.epochs
            self.lines.keep({r: epochs[r] for r in members.here})
        farewells = self.lines.farewells()
        if farewells:
            yield [Ask(replica, m.DropLines(gone)) for replica, gone in farewells.items()]
