"""Pages on their way between replicas, as rounds of questions: exported and pinned at their source, named to their
target, and unpinned again. Which pages go where is decided elsewhere (copying, offering).

Replicas never call each other or the scheduler: what a source exports is told to the target in the message that lets
it keep the pages. The data goes from replica to replica over a line of rayk.transport, the best that works.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

from rayk import protocol as m
from rayk.errors import LineError
from rayk.params import OBJECT_STORE
from rayk.scheduler.script import Part, ReplicaCall, ReplicaReply
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.links import LinkTable


class CopyOrder(NamedTuple):
    """Pages of the prefix `view` that go to `target`; `row` is the orderer's number for it."""

    row: int
    target: int
    view: m.ContextView
    span: Span


class ExportedSpan(NamedTuple):
    """Exported pages on their way to a place. `seconds` is what the export took."""

    source: int
    target: int
    line: str
    export: m.Exported
    data: Any
    seconds: float


Copies = dict[int, list[ExportedSpan]]  # row -> what there is for it, in order


class PageTransfers:
    """Has pages carried over `lines`, and remembers in them how that went."""

    def __init__(self, lines: LinkTable, clock: Callable[[], float]) -> None:
        self.lines = lines
        self._clock = clock

    def export(self, orders: Sequence[CopyOrder]) -> Generator[list[ReplicaCall], list[ReplicaReply], Copies]:
        """Ask for the exports; one whose line is refused is asked for again over the next best."""
        copies: Copies = {}
        while orders:
            kinds = [self.lines.use(order.span.replica, order.target) for order in orders]
            began = self._clock()
            answers = yield [self._ask(order, kind) for order, kind in zip(orders, kinds, strict=True)]
            took = self._clock() - began
            again: list[CopyOrder] = []
            for order, kind, told in zip(orders, kinds, answers, strict=True):
                source = order.span.replica
                if isinstance(told.result, m.Exported):
                    copy = ExportedSpan(source, order.target, kind, told.result, told.data, took)
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

    def _ask(self, order: CopyOrder, kind: str) -> ReplicaCall:
        span, to = order.span, self.lines.peer(order.target)
        export = m.Export(order.view, span.start, span.stop, kind, to.replica, to.epoch)
        return ReplicaCall(span.replica, export, (), kind == OBJECT_STORE, lambda result: _unpin(span.replica, result))

    def heads(self, parts: Iterable[ExportedSpan]) -> tuple[list[m.ImportHead], list[Any]]:
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

    def arrived(self, parts: Sequence[ExportedSpan], arrivals: Sequence[m.Arrival], away: float) -> list[ExportedSpan]:
        """What became of the copies of one message, which with its answer was under way for `away` seconds, the
        target's work not counted; those whose line broke."""
        broken, pages = [], sum(arrival.pages for arrival in arrivals)
        for copy, arrival in zip(parts, arrivals, strict=False):
            if arrival.trouble:
                self.lines.failed(copy.source, copy.target, copy.line, arrival.trouble)
                broken.append(copy)
            elif arrival.pages:
                seconds = copy.seconds + arrival.seconds
                if copy.line == OBJECT_STORE:  # the way there is not in what the target measures
                    seconds += max(0.0, away) * arrival.pages / pages
                self.lines.carried(copy.source, copy.target, copy.line, arrival.pages, seconds)
        return broken

    def acknowledge(self, copies: Copies, broken: Iterable[ExportedSpan]) -> Part:
        """Have the exports unpinned, and lines that broke closed at the source; the target's end is closed already."""
        exported: dict[int, list[int]] = {}
        for copy in (copy for parts in copies.values() for copy in parts):
            exported.setdefault(copy.source, []).append(copy.export.export_id)
        asks = [ReplicaCall(source, m.Acknowledge(ids)) for source, ids in exported.items()]
        pairs = dict.fromkeys((copy.source, copy.target) for copy in broken)
        asks += [ReplicaCall(source, m.DropLines([target])) for source, target in pairs]
        if asks:
            yield asks


def _unpin(source: int, result: m.Result) -> list[ReplicaCall]:
    """What to say to a source whose export came too late to be used."""
    return [ReplicaCall(source, m.Acknowledge([result.export_id]))] if isinstance(result, m.Exported) else []
