"""A replica's side of page copies, behind messages: what it holds, what it gives to others, and what comes from them.

A ReplicaService, an engine and the replicas of one process answer alike. No Ray and no threads here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import msgspec
import numpy as np

from rayk import protocol as m
from rayk.context import TextContext
from rayk.errors import MessageError
from rayk.kvcache.evacuation import adopt_pages, list_prefixes, spare_pages
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.replica import ReplicaCore
from rayk.params import OBJECT_STORE
from rayk.transport.choice import Peer
from rayk.transport.line import PageData, PageExportRef
from rayk.transport.port import Arrival, PagePort


class PageExchange:
    """Between `core` and the others, through `port`. `context` makes the context of a view, which is not kept."""

    def __init__(self, core: ReplicaCore, port: PagePort, context: Callable[[m.ContextView], TextContext]) -> None:
        self._core = core
        self._port = port
        self._context = context

    def answer(self, command: m.ExchangeCommand, attached: Sequence[PageData] = ()) -> tuple[m.Result, PageData]:
        """What it comes to. `attached` is page data for imports; the second result goes with Exported."""
        match command:
            case m.Lookup(views, introduce):
                found = self._found([self._context(view) for view in views])
                if introduce:
                    found = msgspec.structs.replace(found, epoch=self._port.me.epoch, endpoint=self._port.endpoint)
                return found, []
            case m.Export(view, start, stop, line, to, to_epoch):
                began = perf_counter()
                sent = self._port.pin(self._context(view), start, stop, Peer(to, to_epoch), line)
                export = sent.export
                how = (export.pages.tobytes(), sent.offer, sent.expires, perf_counter() - began)
                return m.Exported(export.export_id, start, export.hashes, *how), sent.data
            case m.Acknowledge(export_ids):
                self._port.unpin(export_ids)
            case m.DropLines(replicas):
                for replica in replicas:
                    self._port.drop(replica)
            case m.GetPrefixes(skip, count, size):
                cached = [
                    m.CachedPrefix(*each.root, *each[1:]) for each in list_prefixes(self._core, skip, count, size)
                ]
                return m.PrefixesDone(cached, self._core.tree.cached), []
            case m.Keep():
                return self._keep(command, attached), []
        return m.Done(), []

    def _found(self, ctxs: Sequence[TextContext]) -> m.Found:
        core, reusable, space = self._core, [self._core.may_reuse(ctx) for ctx in ctxs], spare_pages(self._core)
        if core.loads is None:
            return m.Found([core.cached_pages(ctx) for ctx in ctxs], reusable, room=space)
        hits = [core.tier_hits(ctx) for ctx in ctxs]
        return m.Found([h[0] for h in hits], reusable, [h[1] for h in hits], [h[2] for h in hits], space)

    def _keep(self, command: m.Keep, attached: Sequence[PageData]) -> m.KeepDone:
        began = perf_counter()
        imports, arrivals = self.imports(command.imports, attached)
        kept = []
        for row, view in enumerate(command.views):
            mine = [imports[i] for i in command.uses.get(row, ())]
            kept.append(adopt_pages(self._core, self._context(view), mine))
        return m.KeepDone(kept, reported(arrivals), perf_counter() - began)

    def imports(
        self, heads: Sequence[m.ImportHead], attached: Sequence[PageData]
    ) -> tuple[list[PageImport], list[Arrival]]:
        """What alloc() needs of the imports of a message. The object store's come with the next attached data each."""
        rest, imports, arrivals = iter(attached), [], []
        for head in heads:
            data = next(rest, None) if head.line == OBJECT_STORE else []
            if data is None:
                raise MessageError(f"{len(heads)} import(s) came with the page data of {len(attached)}")
            pages = np.frombuffer(head.pages, np.int32) if head.pages else np.arange(len(head.hashes), dtype=np.int32)
            if len(pages) != len(head.hashes):
                raise MessageError(f"an import of {len(pages)} page(s) came with {len(head.hashes)} hash(es)")
            source = Peer(head.source, head.epoch)
            export = PageExportRef(source, head.export_id, pages, head.offer, head.expires, data)
            imported, arrival = self._port.incoming(head.line, export, head.start, head.hashes)
            imports.append(imported)
            arrivals.append(arrival)
        return imports, arrivals


def reported(arrivals: Sequence[Arrival]) -> list[m.Arrival]:
    """What became of imports, as a message says it."""
    return [m.Arrival(a.pages, a.seconds, a.trouble) for a in arrivals]
