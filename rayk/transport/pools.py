"""The lines of replicas on one machine: the target reads the source's pool, mapped into its own process.

A pool is opened once for each source and its start; then a copy is one memory copy for each run of pages, in which the
source takes no part. What it takes part in is the end: it pins the pages until they are acknowledged, their time is
up, or it needs them itself. A target that looks after a copy and finds that its time is up or that its seal is broken
does not believe what it read: the pages may have been given to others while it copied. Seals are numbers in memory that
a source shares with its pool, one for each export, and breaks before it unpins the pages.

`PoolLine` is the line; two kinds of memory are under it, which only know how to share, map and copy:

    HostMemory    memory of rayk.kvcache.shared_memory, mapped read-only
    CudaMemory    CUDA IPC, see rayk.transport.cuda
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from rayk.errors import LineError, PagesGoneError
from rayk.kvcache.page_copies import runs
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.shared_memory import SharedFile, map_shared, shared_zeros
from rayk.params import SHARED_MEMORY
from rayk.transport.choice import Peer
from rayk.transport.line import Clock, PageExportRef

SEALS = 4096  # exports that can be told apart at a time; one that finds its place taken breaks the older one


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    """A pool, and its seals: int64 [SEALS], export e at e % SEALS."""

    pool: bytes
    seals: SharedFile


class _Opened(NamedTuple):
    """A source's pool and seals, mapped here."""

    source: Peer
    pool: Any
    seals: npt.NDArray[np.int64]


class Memory(Protocol):
    """The pool of this replica, and those of others mapped beside it. Failures are OSError or RuntimeError."""

    kind: str

    def share(self) -> bytes:
        """What another process needs to map this pool, once."""
        ...

    def settle(self) -> None:
        """Wait until what was queued to be written to this pool is there."""
        ...

    def map(self, offer: bytes) -> Any:
        """Another replica's pool, for as long as it is referenced."""
        ...

    def copy(self, pool: Any, theirs: Pages, mine: Pages) -> None:
        """pool[theirs] -> this pool's pages `mine`; done when it returns."""
        ...


class PoolLine:
    """See Line."""

    def __init__(self, memory: Memory, clock: Clock = monotonic) -> None:
        self.kind = memory.kind
        self._memory = memory
        self._clock = clock
        self._shared: dict[int, tuple[Peer, bytes]] = {}  # target -> what it was told
        self._open: dict[int, _Opened] = {}  # by source
        seals, self._seal_file = shared_zeros((SEALS,), torch.int64)
        self._seals: npt.NDArray[np.int64] = seals.numpy()

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        try:
            self._memory.settle()
            known = self._shared.get(to.replica)
            if known is None or known[0] != to:
                offer = msgspec.msgpack.encode(_Offer(self._memory.share(), self._seal_file))
                known = self._shared[to.replica] = to, offer
        except (OSError, RuntimeError) as error:
            raise LineError(self.kind, to.replica, f"the pool cannot be shared: {error}") from None
        self._seals[export_id % SEALS] = export_id
        return known[1]

    def end(self, export_id: int) -> None:
        if self._seals[export_id % SEALS] == export_id:
            self._seals[export_id % SEALS] = 0

    def fetch(self, export: PageExportRef, first: int, pages: Pages) -> None:
        source = export.source
        known = self._open.get(source.replica)
        try:
            if known is None or known.source != source:
                self.drop(source.replica)
                offer = msgspec.msgpack.decode(export.offer, type=_Offer)
                seals = map_shared(offer.seals).view(np.int64).reshape(SEALS)
                known = self._open[source.replica] = _Opened(source, self._memory.map(offer.pool), seals)
        except (OSError, RuntimeError, ValueError, msgspec.MsgspecError) as error:
            raise self._unreadable(source, error) from None
        self._check_seal(known, export)  # else it would be copied for nothing
        try:
            self._memory.copy(known.pool, export.pages[first : first + len(pages)], pages)
        except (OSError, RuntimeError, ValueError, msgspec.MsgspecError) as error:
            raise self._unreadable(source, error) from None
        self._check_seal(known, export)
        if self._clock() >= export.expires:
            raise LineError(self.kind, source.replica, "the pages were pinned for a shorter time than the copy took")

    def _unreadable(self, source: Peer, error: Exception) -> LineError:
        self.drop(source.replica)
        return LineError(self.kind, source.replica, f"its pool cannot be read: {error}")

    def _check_seal(self, opened: _Opened, export: PageExportRef) -> None:
        if opened.seals[export.export_id % SEALS] != export.export_id:
            raise PagesGoneError(self.kind, opened.source.replica, "its source needed the pages")

    def drop(self, replica: int) -> None:
        self._shared.pop(replica, None)
        self._open.pop(replica, None)

    def close(self) -> None:
        self._shared.clear()
        self._open.clear()


class _HostOffer(msgspec.Struct, frozen=True, array_like=True):
    files: list[SharedFile]
    widths: list[int]  # bytes of a page in each


class HostMemory:
    """Pools in host memory. `buffers` are uint8 `[pages, bytes per page]`, in the order of `files`."""

    kind = SHARED_MEMORY

    def __init__(self, buffers: Sequence[torch.Tensor], files: Sequence[SharedFile]) -> None:
        self._buffers = [b.numpy() for b in buffers]
        self._offer = msgspec.msgpack.encode(_HostOffer(list(files), self._widths))

    @property
    def _widths(self) -> list[int]:
        return [b.shape[1] for b in self._buffers]

    def share(self) -> bytes:
        return self._offer

    def settle(self) -> None:
        pass

    def map(self, offer: bytes) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        told = msgspec.msgpack.decode(offer, type=_HostOffer)
        check_widths(self._widths, told.widths)
        return [map_shared(f).reshape(-1, width) for f, width in zip(told.files, told.widths, strict=True)]

    def copy(self, pool: Any, theirs: Pages, mine: Pages) -> None:
        check_pages(theirs, len(pool[0]))
        for to, of, count in runs(mine.tolist(), theirs.tolist()):
            for target, source in zip(self._buffers, pool, strict=True):
                target[to : to + count] = source[of : of + count]


def check_widths(mine: Sequence[int], theirs: Sequence[int]) -> None:
    """ValueError unless pages of both pools are of the same bytes."""
    if list(mine) != list(theirs):
        raise ValueError(f"its pages have buffers of {list(theirs)} bytes, here they have {list(mine)}")


def check_pages(pages: Pages, total: int) -> None:
    """ValueError unless a pool of `total` pages has them all."""
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < total:
        raise ValueError(f"pages {int(pages.min())}..{int(pages.max())} of a pool of {total}")
