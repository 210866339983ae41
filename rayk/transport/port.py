"""Where pages leave and enter a replica: its lines of all kinds, and the exports that are under way on them.

    source     pin()                     pins pages and makes them ready on a line; the target is told how to get them
               unpin(), unpin_late()     takes them back: acknowledged, needed here, or their time is up
    target     incoming()                what alloc() needs to fill pages; an `Arrival` says what came of it

An engine and a ReplicaService use it alike; neither needs the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import monotonic, perf_counter
from typing import NamedTuple

import torch
import torch.distributed

from rayk.context import TextContext
from rayk.errors import LineError, PagesGoneError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.page_pins import PageExport, PageImport, PagePins
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.shared_memory import host_identity
from rayk.transport.choice import Endpoint, Peer
from rayk.transport.line import Clock, Line, PageData, PageExportRef, StoreLine
from rayk.transport.pools import HostMemory, PoolLine

EXPORT_SECONDS = 120  # an export that is not acknowledged by then is unpinned: its reader is gone


class PinnedPages(NamedTuple):
    """Pinned pages on their way. `offer` and `expires` are for a PageExportRef, `data` is what the object store
    carries."""

    export: PageExport
    offer: bytes
    expires: float
    data: PageData


class Arrival:
    """What became of pinned pages at their target: pages that were copied, the seconds it took, and what went wrong."""

    def __init__(self) -> None:
        self.pages = 0
        self.seconds = 0.0
        self.trouble = ""


class PagePort:
    """The lines of one replica. `me` names it to others; `lines` of one kind each, the object store among them."""

    def __init__(
        self,
        me: Peer,
        exports: PagePins,
        page_bytes: int,
        address: str,
        lines: Sequence[Line],
        clock: Clock = monotonic,
    ) -> None:
        self.me = me
        self._exports = exports
        exports.take_back = lambda export_id: self.unpin([export_id])
        self._clock = clock
        self._lines = {line.kind: line for line in lines}
        self.pinned: dict[int, tuple[Line, float]] = {}
        """The line of each export that is under way, and until when it is waited for."""
        self.endpoint = Endpoint(host_identity(), address, list(self._lines), page_bytes)

    # -- the source's side -------------------------------------------------------------------------

    def pin(self, ctx: TextContext, start: int, stop: int, to: Peer, kind: str) -> PinnedPages:
        """Pin the cached pages start .. stop of a prefix, fewer if evicted meanwhile, for `to`.

        Nothing is pinned when none is left, or by a LineError: the line of that kind cannot carry them.
        """
        line = self._lines.get(kind)
        if line is None:
            raise LineError(kind, to.replica, f"replica {self.me.replica} has no such line")
        expires = self._clock() + EXPORT_SECONDS
        export = self._exports.export(ctx, start, stop)
        if not len(export.pages):
            self._exports.acknowledge(export.export_id)
            return PinnedPages(export, b"", expires, [])
        try:
            offer = line.offer(to, export.export_id, export.pages)
        except BaseException:
            self._exports.acknowledge(export.export_id)
            raise
        self.pinned[export.export_id] = line, expires
        data = line.made.pop(export.export_id, []) if isinstance(line, StoreLine) else []
        return PinnedPages(export, offer, expires, data)

    def unpin(self, export_ids: Collection[int]) -> None:
        """The copies have landed or are not wanted. Unknown ids are ignored, so that it can be repeated."""
        for export_id in export_ids:
            used = self.pinned.pop(export_id, None)
            if used is not None:
                used[0].end(export_id)
            self._exports.acknowledge(export_id)

    def unpin_late(self) -> int:
        """The same for exports whose target is gone by all appearances; how many."""
        now = self._clock()
        late = [export_id for export_id, (_, expires) in self.pinned.items() if expires < now]
        self.unpin(late)
        return len(late)

    # -- the target's side ---------------------------------------------------------------------------

    def incoming(self, kind: str, export: PageExportRef, start: int, hashes: list[bytes]) -> tuple[PageImport, Arrival]:
        """What alloc() needs of exported pages, from page `start` of a prefix on; the arrival is filled in by it."""
        arrival, line = Arrival(), self._lines.get(kind)

        def fill(first: int, pages: Pages) -> None:
            began = perf_counter()
            try:
                if line is None:
                    raise LineError(kind, export.source.replica, f"replica {self.me.replica} has no such line")
                line.fetch(export, first, pages)
            except LineError as error:
                if not isinstance(error, PagesGoneError):
                    arrival.trouble = error.reason
                raise
            arrival.pages += len(pages)
            arrival.seconds += perf_counter() - began

        return PageImport(start, hashes, fill), arrival

    # -- members -------------------------------------------------------------------------------------

    def drop(self, replica: int) -> None:
        """That replica is gone or replaced: close the lines to it."""
        for line in self._lines.values():
            line.drop(replica)

    def close(self) -> None:
        """Close all lines."""
        for line in self._lines.values():
            line.close()


def open_lines(buffers: PageBuffers, address: str) -> list[Line]:
    """The lines that a replica with these pages has: the object store, and what its memory and its torch allow."""
    pools = buffers.all_bytes
    lines: list[Line] = []
    if buffers.files:
        lines.append(PoolLine(HostMemory(pools, buffers.files)))
    if all(pool.is_cuda for pool in pools):
        from rayk.transport.cuda import CudaMemory

        lines.append(PoolLine(CudaMemory(pools)))
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        from rayk.transport.group import GroupLine

        lines.append(GroupLine(pools, address))
    return [*lines, StoreLine(buffers)]
