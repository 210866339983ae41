"""Page copies between replicas: planned by what they cost, exported and pinned at their source, imported at their
target, and acknowledged, whatever happened in between.

    fetch()              what requests that are admitted miss: looked up, planned and exported
    look_up(), plan()    who has what, and what of it pays to copy
    export()             sources pin pages
    import_descriptors() the target is told how to get them
    arrived()            what the links carried, or did not
    acknowledge()        sources unpin

Clusters plan by an index (indexed_copies) and replicas that go offer what they have (evacuation). Replicas never call
each other or the scheduler: what a source exports is told to the target in the message that lets it keep the pages. The
data goes from replica to replica over a link of rayk.transport, the best that works. What did not come is computed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rayk import protocol as m
from rayk.errors import LineError
from rayk.params import OBJECT_STORE
from rayk.protocol.columns import ContextRows
from rayk.scheduler.script import Part, ReplicaCall, ReplicaReply
from rayk.scheduler.transfers.copy_cost import Span, copy_spans, profitable_spans
from rayk.scheduler.transfers.links import LinkTable
from rayk.transport.choice import Peer


class CopyOrder(NamedTuple):
    """Pages of the prefix `view` that go to `target`; `row` is the orderer's number for it."""

    row: int
    target: int
    view: m.ContextView
    span: Span


class ExportedSpan(NamedTuple):
    """Pages that `source` has pinned for `target`; `data` is what the object store carries of them."""

    source: Peer
    target: int
    kind: str
    export: m.Exported
    data: Any


class ImportDescriptors(NamedTuple):
    """Imports of one message, those that each row uses, and the page data that goes along."""

    imports: list[m.ImportHead]
    uses: dict[int, list[int]]
    data: list[Any]


Copies = dict[int, list[ExportedSpan]]  # row -> what was exported for it, in order
Groups = dict[int, list[int]]  # replica -> rows of a batch


class PageTransfers:
    """Has pages of `page_size` tokens carried over `links`, and notes there how that went."""

    def __init__(self, links: LinkTable, page_size: int) -> None:
        self.links = links
        self.page_size = page_size

    def fetch(
        self,
        batch: ContextRows,
        groups: Groups,
        unshared: set[int],
        here: Sequence[int],
        prefill_rate: float | None,
        found: Mapping[int, m.Found] | None = None,
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], Copies]:
        """Have the prefixes that a chosen replica misses exported by the others that are `here`, none of which has any
        of `unshared`. `found` is what a lookup of the other rows would say, where that is known."""
        replicas = {i: r for r, rows in groups.items() for i in rows if i not in unshared}
        wanted = sorted(replicas)
        if not wanted:
            return {}
        views = [batch.view(i) for i in wanted]
        if found is None:
            found = yield from self.look_up(here, views)
        orders: list[CopyOrder] = []
        known: dict[tuple[Any, ...], int] = {}
        sharing: dict[int, list[int]] = {}  # rows, and those whose copies they use, too
        for at, i in enumerate(wanted):
            target = replicas[i]
            for span in self._missing(found, at, target, prefill_rate):
                if len(wanted) > 1:
                    traits, tokens = batch.traits(i), batch.tokens(i)[: span.stop * self.page_size * 4]
                    coming = (target, span, traits.cache_salt, traits.adapter, tokens)
                    first = known.setdefault(coming, i)
                    if first != i:  # that request brings these pages, unless it is refused
                        sharing.setdefault(i, []).append(first)
                        continue
                orders.append(CopyOrder(i, target, views[at], span))
        copies = yield from self.export(orders)
        for i, rows in sharing.items():
            parts = [copy for row in dict.fromkeys([*rows, i]) for copy in copies.get(row, ())]
            if parts:
                copies[i] = sorted(parts, key=_start)
        return copies

    def _missing(self, found: Mapping[int, m.Found], at: int, target: int, prefill_rate: float | None) -> list[Span]:
        """What the request `at` of a lookup gets from others."""
        mine = found.get(target)
        if mine is None:
            return []
        held = [found[r].resident[at] if r in found and r != target else 0 for r in range(max(found) + 1)]
        have, stop = mine.resident[at], mine.reusable[at]
        if mine.host and max(held) <= have + mine.host[at] + mine.disk[at]:
            return []  # what the others have is in this node's tiers
        return self.plan(target, held, have, stop, prefill_rate)

    def look_up(
        self, replicas: Iterable[int], views: list[m.ContextView]
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], dict[int, m.Found]]:
        """What each of the replicas has of the prefixes, as far as it answers; new ones introduce themselves."""
        asked = list(replicas)
        answers = yield [ReplicaCall(r, m.Lookup(views, r not in self.links.peers)) for r in asked]
        found = {r: told.result for r, told in zip(asked, answers, strict=True) if isinstance(told.result, m.Found)}
        for replica, each in found.items():
            if each.endpoint is not None:
                self.links.joined(replica, each.epoch, each.endpoint)
        return found

    def plan(self, target: int, held: Sequence[int], have: int, stop: int, prefill_rate: float | None) -> list[Span]:
        """What `target`, with `have` leading pages of a prefix, gets up to page `stop` from replicas that hold held[i].

        All that they have, from those of lowest index first, while it is not known how many tokens the target computes
        in a second; else what takes less time than computing it, from those with the quickest link first.
        """
        if max(held) <= have:
            return []
        if prefill_rate is None:
            return copy_spans(have, held, stop)
        holders = [replica for replica, pages in enumerate(held) if pages > have]
        order = self.links.quickest(holders, target, min(max(held), stop) - have)

        def seconds(span: Span) -> float:
            return self.links.seconds(span.replica, target, span.stop - span.start)

        return profitable_spans(copy_spans(have, held, stop, order), seconds, self.page_size, prefill_rate)

    def export(self, orders: Sequence[CopyOrder]) -> Generator[list[ReplicaCall], list[ReplicaReply], Copies]:
        """Have the sources pin what is cached of the orders; where a link is refused, over the next best."""
        copies: Copies = {}
        while orders:
            kinds = [self.links.use(order.span.replica, order.target) for order in orders]
            sources = [self._peer(order.span.replica) for order in orders]
            answers = yield [self._call(order, kind) for order, kind in zip(orders, kinds, strict=True)]
            again: list[CopyOrder] = []
            for order, source, kind, told in zip(orders, sources, kinds, answers, strict=True):
                if isinstance(told.result, m.Exported):
                    if told.result.hashes:
                        copy = ExportedSpan(source, order.target, kind, told.result, told.data)
                        copies.setdefault(order.row, []).append(copy)
                elif kind != OBJECT_STORE and isinstance(told.result, m.Failure):
                    error = m.to_error(told.result)
                    if isinstance(error, LineError):
                        self.links.failed(source.replica, order.target, kind, error.reason)
                        again.append(order)
            orders = again
        for parts in copies.values():
            parts.sort(key=_start)
        return copies

    def _peer(self, replica: int) -> Peer:
        """The replica and its epoch, which is 0 until it introduced itself."""
        return self.links.peers.get(replica) or Peer(replica, 0)

    def _call(self, order: CopyOrder, kind: str) -> ReplicaCall:
        span, to = order.span, self._peer(order.target)
        export = m.Export(order.view, span.start, span.stop, kind, to.replica, to.epoch)
        return ReplicaCall(span.replica, export, (), kind == OBJECT_STORE, lambda result: _unpin(span.replica, result))

    @staticmethod
    def import_descriptors(rows: Iterable[Sequence[ExportedSpan]]) -> ImportDescriptors:
        """What the target is told of the copies for each of its rows; those of several rows are told once."""
        descriptors, uses, data = list[m.ImportHead](), dict[int, list[int]](), list[Any]()
        told: dict[int, int] = {}
        for row, parts in enumerate(rows):
            if parts:
                uses[row] = [told.setdefault(id(copy), len(told)) for copy in parts]
            for copy in parts:
                if told[id(copy)] < len(descriptors):
                    continue
                export = copy.export
                how = (copy.kind, *copy.source, export.export_id, export.pages, export.offer, export.expires)
                descriptors.append(m.ImportHead(export.start, export.hashes, *how))
                if copy.kind == OBJECT_STORE:
                    data.append(copy.data)
        return ImportDescriptors(descriptors, uses, data)

    def arrived(
        self, parts: Sequence[ExportedSpan], arrivals: Sequence[m.Arrival], away: float = 0.0
    ) -> list[ExportedSpan]:
        """What became of the copies of one message, which with its answer was under way for `away` seconds, the
        target's work not counted; those whose link broke."""
        broken, pages = [], sum(arrival.pages for arrival in arrivals)
        for copy, arrival in zip(parts, arrivals, strict=False):
            if not self._runs(copy.source):
                continue
            if arrival.trouble:
                self.links.failed(copy.source.replica, copy.target, copy.kind, arrival.trouble)
                broken.append(copy)
            elif arrival.pages:
                seconds = copy.export.seconds + arrival.seconds
                if copy.kind == OBJECT_STORE:  # the way there is not in what the target measures
                    seconds += max(0.0, away) * arrival.pages / pages
                self.links.carried(copy.source.replica, copy.target, copy.kind, arrival.pages, seconds)
        return broken

    def acknowledge(self, copies: Copies, broken: Iterable[ExportedSpan] = ()) -> Part:
        """Have the exports unpinned, and links that broke closed at the source; the target's end is closed already. A
        source that was replaced meanwhile is told nothing: its numbers of exports mean others now."""
        exported: dict[int, list[int]] = {}
        for copy in distinct(copies.values()):
            if self._runs(copy.source):
                exported.setdefault(copy.source.replica, []).append(copy.export.export_id)
        calls = [ReplicaCall(source, m.Acknowledge(ids)) for source, ids in exported.items()]
        pairs = dict.fromkeys((copy.source.replica, copy.target) for copy in broken)
        calls += [ReplicaCall(source, m.DropLines([target])) for source, target in pairs]
        if calls:
            yield calls

    def _runs(self, source: Peer) -> bool:
        """Whether that replica was neither lost nor replaced, as far as it ever introduced itself."""
        return source.epoch in (0, self._peer(source.replica).epoch)


def distinct(rows: Iterable[Sequence[ExportedSpan]]) -> list[ExportedSpan]:
    """The copies of those rows, each once, in the order in which a target is told of them."""
    return list({id(copy): copy for parts in rows for copy in parts}.values())


def _start(copy: ExportedSpan) -> int:
    return copy.export.start


def _unpin(source: int, result: m.Result) -> list[ReplicaCall]:
    """What to say to a source whose export came too late to be used."""
    return [ReplicaCall(source, m.Acknowledge([result.export_id]))] if isinstance(result, m.Exported) else []
