"""The protocol of a line: pages go from one replica's pool into another's, by page index.

    source                                                     target
    pins pages, offer(): how they can be had   -- messages -->  allocates pages, fetch() fills them
    acknowledged, or its time is up: end()     <-- messages --  has them, or does not want them

Messages are the scheduler's; no replica calls another. Nothing that a source does waits for its target, and whatever a
target waits for goes on without the source's own thread, so that copies in both directions at once cannot block each
other. A fetch that fails leaves its pages with unknown content: nobody may read them before they are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rayk.errors import LineError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.page_pool import Pages
from rayk.params import OBJECT_STORE
from rayk.transport.choice import Peer

Clock = Callable[[], float]
PageData = list[npt.NDArray[np.uint8]]  # one [pages, bytes per page] array per buffer


class PageExportRef(NamedTuple):
    """Pages that a source has pinned for a target.

    `pages` are its page ids, `offer` what its line said to be told to the target, `expires` when it unpins them
    whatever happened (seconds of the monotonic clock that all processes of a machine share), `data` what came beside
    the message.
    """

    source: Peer
    export_id: int
    pages: Pages
    offer: bytes
    expires: float
    data: Sequence[npt.NDArray[np.uint8]] = ()


class Line(Protocol):
    """A replica's end of all its lines of one kind. One thread uses it."""

    kind: str

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        """As the source: let `to` fetch these pinned pages; what it has to be told. Does not wait. LineError."""
        ...

    def end(self, export_id: int) -> None:
        """As the source: when this returns nobody believes any more what is read of these pages over this line: a fetch
        that reads them, then or later, is a LineError. Ignores unknown ids."""
        ...

    def fetch(self, export: PageExportRef, first: int, pages: Pages) -> None:
        """As the target: fill `pages` with the export's pages from number `first` on. LineError, after a bounded wait.

        When this returns nothing writes to the pages any more, whatever came of it.
        """
        ...

    def drop(self, replica: int) -> None:
        """That replica is gone or replaced: close what is open to it. Unknown ones are ignored."""
        ...

    def close(self) -> None:
        """Close everything."""
        ...


class StoreLine:
    """The object store, and the simplest line: pages are copied out, and travel beside the messages.

    Whoever carries the messages takes them from `made`, and puts what came along into an export's `data`.
    """

    kind = OBJECT_STORE

    def __init__(self, buffers: PageBuffers) -> None:
        self._buffers = buffers
        self._pools = buffers.all_bytes
        self.made: dict[int, PageData] = {}

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        self.made[export_id] = [part.cpu().numpy() for part in self._buffers.read_bytes(pages)]
        return b""

    def end(self, export_id: int) -> None:
        self.made.pop(export_id, None)

    def fetch(self, export: PageExportRef, first: int, pages: Pages) -> None:
        problem = self._buffers.check_layout(export.data, len(export.pages))
        if problem is not None:
            raise LineError(self.kind, export.source.replica, problem)
        rows = slice(first, first + len(pages))
        if self._pools[0].is_cuda:  # torch wants memory that it might write to, which the object store's is not
            self._buffers.write_bytes(pages, [torch.from_numpy(np.array(part[rows])) for part in export.data])
        else:
            for pool, part in zip(self._pools, export.data, strict=True):
                pool.numpy()[pages] = part[rows]

    def drop(self, replica: int) -> None:
        """Nothing is open."""

    def close(self) -> None:
        self.made.clear()
