"""Prefix copies for requests that are admitted, as rounds of the scheduler's.

A copy is a lookup at all replicas, an export at its source, which pins the pages, an admission at its target, which
allocates pages and fetches, and an acknowledgement, whatever happened in between; see
rayk.scheduler.transfers.transfer.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from rayk import protocol as m
from rayk.protocol.local_contexts import ContextRows
from rayk.scheduler.membership import Membership
from rayk.scheduler.script import Part, ReplicaCall, ReplicaReply
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.transfer import Copies, CopyOrder, PageTransfers

Groups = dict[int, list[int]]  # replica -> rows of a batch


class PrefixCopies:
    """The copies of all batches of a scheduler, between its `members`."""

    def __init__(self, members: Membership, transfers: PageTransfers) -> None:
        self.transfers = transfers
        self.links = transfers.links
        self._members = members
        self._version = 0  # of the members when it was last looked who left

    def fetch(
        self, batch: ContextRows, groups: Groups, unshared: set[int], prefill_rate: float | None
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], Copies]:
        """Have the prefixes that a chosen replica misses exported by others, none of which has any of `unshared`."""
        replicas = {i: r for r, rows in groups.items() for i in rows if i not in unshared}
        wanted = sorted(replicas)
        if not wanted:
            return {}
        views = [batch.view(i) for i in wanted]
        found = yield from self.transfers.look_up(self._members.here, views)
        orders: list[CopyOrder] = []
        known: set[tuple[Any, ...]] = set()
        for at, i in enumerate(wanted):
            target = replicas[i]
            for span in self._spans(found, at, target, prefill_rate):
                coming = (target, span, self._prefix(batch, i, span.stop))
                if coming not in known:  # else an earlier request of this batch brings these pages
                    known.add(coming)
                    orders.append(CopyOrder(i, target, views[at], span))
        return (yield from self.transfers.export(orders))

    def _spans(self, found: Mapping[int, m.Found], at: int, target: int, prefill_rate: float | None) -> list[Span]:
        """What the request `at` of a lookup gets from others."""
        mine = found.get(target)
        if mine is None:
            return []
        held = [found[r].resident[at] if r in found and r != target else 0 for r in range(len(self._members))]
        have, stop = mine.resident[at], mine.reusable[at]
        if mine.host and max(held) <= have + mine.host[at] + mine.disk[at]:
            return []  # what the others have is in this node's tiers
        return self.transfers.plan(target, held, have, stop, prefill_rate)

    def _prefix(self, batch: ContextRows, row: int, pages: int) -> tuple[Any, ...]:
        """What makes the first pages of a request what they are."""
        traits = batch.traits(row)
        return traits.cache_salt, traits.adapter, batch.tokens(row)[: pages * self.transfers.page_size * 4]

    def disconnect(self) -> Part:
        """Have links to replicas that left closed, or the memory of these would be kept for nothing."""
        members = self._members
        if members.version != self._version:
            self._version, epochs = members.version, members.epochs
            self.links.keep({r: epochs[r] for r in members.here})
        gone = self.links.peers_to_disconnect()
        if gone:
            yield [ReplicaCall(replica, m.DropLines(peers)) for replica, peers in gone.items()]
