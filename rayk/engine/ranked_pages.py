"""Copies of pages that lie in parts on several ranks: to and from the tiers, and to the same ranks of another replica.

Rank 0 keeps the books: of a page it knows one host row, one file and one export, and each rank copies its part of it.
A page is there when all of its parts are.
"""

from __future__ import annotations

import msgspec

from rayk.engine.ranks import Asked, Ranks
from rayk.kvcache.page_copies import CudaCopier, Numbers, PageCopier, RowPart, Rows, Ticket, make_copier
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.replica import ReplicaCore
from rayk.tiers.opening import equal_buffers
from rayk.transport.choice import Peer
from rayk.transport.line import Line, PageExportRef

_offers = msgspec.msgpack.Decoder(list[bytes])


def row_copier(core: ReplicaCore, number: int, row_bytes: int) -> PageCopier:
    """What copies that rank's part of a row."""
    part = RowPart(number * core.params.bytes_per_page, row_bytes)
    return make_copier(core.buffers.all_bytes, equal_buffers(core.params), part)


class _RankedTicket:
    """A copy under way on all ranks."""

    def __init__(self, own: Ticket | None, others: Asked) -> None:
        self._own = own
        self._others = others

    def poll(self) -> bool:
        if not self._others.done:
            return False
        self._others.wait()
        return self._own is None or self._own.poll()

    def wait(self) -> None:
        self._others.wait()
        if self._own is not None:
            self._own.wait()

    def order(self) -> None:
        """The others order theirs by themselves."""
        if self._own is not None:
            self._own.order()


class RankedCopier:
    """A PageCopier of all ranks; `pool` names the node's rows."""

    def __init__(self, core: ReplicaCore, ranks: Ranks, pool: str) -> None:
        self._own_bytes = core.params.bytes_per_page
        self.page_bytes = self._own_bytes * ranks.size
        self._own = row_copier(core, 0, self.page_bytes)
        self._fences = isinstance(self._own, CudaCopier)
        self._ranks = ranks
        self._name = pool
        self._pool: Rows | None = None

    def attach(self, pool: Rows) -> str:
        self._pool = pool
        problems = self._ranks.ask("attach", self._name, *pool.shape)
        return next(filter(None, [self._own.attach(pool), *problems.wait()]), "")

    def close(self) -> None:
        self._own.close()

    def store(self, pages: Pages, pool: Rows, rows: Numbers) -> Ticket | None:
        if pool is self._pool:
            others = self._ranks.ask("store", pages, rows)
            return _RankedTicket(self._own.store(pages, pool, rows), others)
        parts = self._ranks.ask("read", pages)
        ticket = self._own.store(pages, pool, rows)
        for number, part in enumerate(parts.wait(), 1):
            pool[rows, self._part(number)] = part
        return ticket

    def load(self, pool: Rows, rows: Numbers, pages: Pages) -> Ticket | None:
        if pool is self._pool:
            others = self._ranks.ask("load", rows, pages)
            return _RankedTicket(self._own.load(pool, rows, pages), others)
        parts = [pool[rows, self._part(number)] for number in range(1, self._ranks.size)]
        written = self._ranks.ask("write", pages, parts)
        ticket = self._own.load(pool, rows, pages)
        written.wait()
        return ticket

    def _part(self, number: int) -> slice:
        return slice(number * self._own_bytes, (number + 1) * self._own_bytes)

    def fence(self, pages: Pages) -> None:
        """On the host what was told first is done first."""
        if self._fences and len(pages):
            self._ranks.tell("fence", pages)
        self._own.fence(pages)


class RankedLine:
    """A Line of all ranks: each has a line of that kind, to the same rank of the other replica."""

    def __init__(self, own: Line, ranks: Ranks) -> None:
        self.kind = own.kind
        self._own = own
        self._ranks = ranks

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        others = self._ranks.ask("offer", self.kind, to, export_id, pages)
        try:
            own = self._own.offer(to, export_id, pages)
        finally:
            others.wait()
        return msgspec.msgpack.encode([own, *others.wait()])

    def end(self, export_id: int) -> None:
        self._own.end(export_id)
        self._ranks.ask("end", self.kind, export_id).wait()

    def fetch(self, export: PageExportRef, first: int, pages: Pages) -> None:
        exports = [export._replace(offer=offer) for offer in _offers.decode(export.offer)]
        others = self._ranks.ask("fetch", self.kind, exports, first, pages)
        try:
            self._own.fetch(exports[0], first, pages)
        finally:
            others.wait()

    def drop(self, replica: int) -> None:
        self._own.drop(replica)
        self._ranks.ask("drop", self.kind, replica).wait()

    def close(self) -> None:
        """The others close theirs when they end."""
        self._own.close()
