"""The line between replicas of one process."""

from __future__ import annotations

from rayk.buffers import PageBuffers
from rayk.errors import LineError
from rayk.pages import Pages
from rayk.transport.choice import SHARED_MEMORY, Peer
from rayk.transport.line import Parcel


class DirectLine:
    """Between replicas of this process, which share its memory without more ado: pages are copied from buffers to
    buffers, on a GPU too. `pools` has those of all replicas that are there, by their start."""

    kind = SHARED_MEMORY

    def __init__(self, buffers: PageBuffers, pools: dict[Peer, PageBuffers]) -> None:
        self._buffers = buffers
        self._pools = pools

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        return b""

    def end(self, export_id: int) -> None:
        """Whoever copies does so in one call, between two steps of the source."""

    def fetch(self, parcel: Parcel, first: int, pages: Pages) -> None:
        source = self._pools.get(parcel.source)
        if source is None:
            raise LineError(self.kind, parcel.source.replica, "it is gone")
        problem = self._buffers.copy_pages(pages, source.all_bytes, parcel.pages[first : first + len(pages)])
        if problem is not None:
            raise LineError(self.kind, parcel.source.replica, problem)

    def drop(self, replica: int) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""
