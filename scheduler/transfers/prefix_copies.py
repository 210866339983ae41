"""Prefix copies for requests that are admitted, as rounds of the scheduler's.

A copy is a lookup at all replicas, an export at its source, which pins the pages, an admission at its target, which
allocates pages and fetches, and an acknowledgement, whatever happened in between; see
rayk.scheduler.transfers.transfer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from rayk import protocol as m
from rayk.protocol.columns import PackedContexts
from rayk.scheduler.membership import Membership
from rayk.scheduler.script import Part, ReplicaCall, ReplicaReply
from rayk.scheduler.transfers.copy_cost import Span, copy_spans, profitable_spans
from rayk.scheduler.transfers.transfer import Copies, CopyOrder, PageTransfers

Groups = dict[int, list[int]]  # replica -> rows of a batch


class PrefixCopies:
    """The copies of all batches of a scheduler, between its `members`."""

    def __init__(self, members: Membership, carrier: PageTransfers, page_size: int) -> None:
        self.carrier = carrier
        self.lines = carrier.lines
        self._members = members
        self._version = 0  # of the members when it was last looked who left
        self._page_size = page_size

    def fetch(
        self, batch: PackedContexts, groups: Groups, lonely: set[int], prefill_rate: float | None
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], Copies]:
        """Have the prefixes that a chosen replica misses exported by others; nobody has any of the `lonely` ones."""
        replicas = {i: r for r, rows in groups.items() for i in rows if i not in lonely}
        wanted = sorted(replicas)
        if not wanted:
            return {}
        views = [batch.view(i) for i in wanted]
        here = list(self._members.here)
        answers = yield [ReplicaCall(r, m.Lookup(views, self.lines.unknown(r))) for r in here]
        found: list[m.Found | None] = [None] * len(self._members)
        for replica, told in zip(here, answers, strict=True):
            each = told.result
            if isinstance(each, m.Found):
                found[replica] = each
                if each.station is not None:
                    self.lines.joined(replica, each.epoch, each.station)
        orders: list[CopyOrder] = []
        known: set[tuple[Any, ...]] = set()
        for at, i in enumerate(wanted):
            target = replicas[i]
            for span in self._spans(found, at, target, prefill_rate):
                coming = (target, span, self._prefix(views[at], span.stop))
                if coming not in known:  # else an earlier request of this batch brings these pages
                    known.add(coming)
                    orders.append(CopyOrder(i, target, views[at], span))
        return (yield from self.carrier.export(orders))

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

        return profitable_spans(copy_spans(have, resident, stop, order), seconds, self._page_size, prefill_rate)

    def _prefix(self, view: m.ContextView, pages: int) -> tuple[Any, ...]:
        """What makes the first pages of a request what they are."""
        origin = view.origin
        owner = (origin.cache_salt, origin.adapter) if origin is not None else None
        return owner, view.tokens[: pages * self._page_size * 4]

    def say_farewell(self) -> Part:
        """Have lines to replicas that left closed, or the memory of these would be kept for nothing."""
        members = self._members
        if members.version != self._version:
            self._version, epochs = members.version, members.epochs
            self.lines.keep({r: epochs[r] for r in members.here})
        farewells = self.lines.farewells()
        if farewells:
            yield [ReplicaCall(replica, m.DropLines(gone)) for replica, gone in farewells.items()]
