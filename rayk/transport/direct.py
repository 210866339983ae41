"""The line between replicas of one process."""

from __future__ import annotations

from itertools import count

from rayk.errors import LineError, PagesGoneError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.page_pool import Pages
from rayk.params import SHARED_MEMORY
from rayk.transport.choice import Peer
from rayk.transport.line import PageExportRef

_numbers = count(1)
_pinned: set[bytes] = set()  # of all lines of this process: what their offers said, as long as it holds


class DirectLine:
    """Between replicas of this process, which share its memory without more ado: pages are copied from buffers to
    buffers, on a GPU too. `pools` has those of all replicas that are there, by their start."""

    kind = SHARED_MEMORY

    def __init__(self, buffers: PageBuffers, pools: dict[Peer, PageBuffers]) -> None:
        self._buffers = buffers
        self._pools = pools
        self._seals: dict[int, bytes] = {}  # by export

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        seal = self._seals[export_id] = next(_numbers).to_bytes(8, "little")
        _pinned.add(seal)
        return seal

    def end(self, export_id: int) -> None:
        _pinned.discard(self._seals.pop(export_id, b""))

    def fetch(self, export: PageExportRef, first: int, pages: Pages) -> None:
        source = self._pools.get(export.source)
        if source is None:
            raise LineError(self.kind, export.source.replica, "it is gone")
        problem = self._buffers.copy_pages(pages, source.all_bytes, export.pages[first : first + len(pages)])
        if problem is not None:
            raise LineError(self.kind, export.source.replica, problem)
        if export.offer not in _pinned:  # last, so that another thread's source cannot come between
            raise PagesGoneError(self.kind, export.source.replica, "its source needed the pages")

    def drop(self, replica: int) -> None:
        """Nothing is open."""

    def close(self) -> None:
        for export_id in list(self._seals):
            self.end(export_id)
