"""Copying whole pages between a replica's device buffers and rows of host memory.

A row holds one page of all buffers, one after the other (leaves, TP shards, values, scales): `bytes_per_page` bytes.
On the CPU a copy is done when the call returns. On CUDA copies run on their own streams, one for each direction, after
what the compute stream has queued so far, and block neither it nor the caller; a page that is still being stored is
fenced before it is written again, and a reader of loaded pages that have not landed calls their ticket's order().

All that a call copies goes to the driver as one batch (cuMemcpyBatchAsync, from the driver of CUDA 13 on), whatever
the number of its pages; where that is not to be had, stretch by stretch through torch.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rayk.kvcache.connector import Pages

log = logging.getLogger("rayk.tiers")

Rows = npt.NDArray[np.uint8]  # [rows, bytes per page]
Numbers = Sequence[int] | npt.NDArray[np.int64]
Groups = Sequence[Sequence[torch.Tensor]]  # buffers; those of a group hold the same bytes


class Ticket(Protocol):
    """A copy under way."""

    def poll(self) -> bool:
        """Whether it is over. Never waits."""
        ...

    def wait(self) -> None:
        """Wait until it is over."""
        ...

    def order(self) -> None:
        """What is queued on its devices' compute streams from now on comes after it. Never waits."""
        ...


class PageCopier(Protocol):
    """Moves pages of one replica. `rows` of a call stay untouched by others until its ticket is done (None: now)."""

    page_bytes: int

    def attach(self, pool: Rows) -> str:
        """Make ready for copies from and to `pool`, the node's; why they will be slow, or "". Once, before any."""
        ...

    def close(self) -> None:
        """Let go of the pool, before its memory goes. No copy is under way."""
        ...

    def store(self, pages: Pages, pool: Rows, rows: Numbers) -> Ticket | None:
        """Device pages -> pool[rows]."""
        ...

    def load(self, pool: Rows, rows: Numbers, pages: Pages) -> Ticket | None:
        """pool[rows] -> device pages."""
        ...

    def fence(self, pages: Pages) -> None:
        """Before these pages are given to another owner: nothing reads them any more, in stream order."""
        ...


class RowPart(NamedTuple):
    """Where in a row these buffers are that others share: the first byte, and the bytes of a whole row."""

    start: int
    row_bytes: int


def make_copier(
    buffers: Sequence[torch.Tensor], copies: Sequence[int] | None = None, part: RowPart | None = None
) -> PageCopier:
    """`buffers` are uint8 `[pages, bytes per page]`, one per device buffer, sharing memory with it.

    `copies` are the lengths of the runs of buffers that hold the same bytes (a replicated cache's TP shards), of which
    a row has one; by default each buffer is its own. `part`: of a row that has other ranks' pages, too.
    """
    groups, at = [], 0
    for count in copies or [1] * len(buffers):
        groups.append(buffers[at : at + count])
        at += count
    assert at == len(buffers)
    return CudaCopier(groups, part) if any(b.is_cuda for b in buffers) else HostCopier(groups, part)


def _parts(groups: Groups, first: int) -> list[tuple[int, int]]:
    """Where each group's part of a page is in a row: start, stop."""
    parts, at = [], first
    for group in groups:
        parts.append((at, at + group[0].shape[1]))
        at += group[0].shape[1]
    return parts


class Stretches(NamedTuple):
    """Maximal runs in which pages and rows both grow by one: where each begins, and its length."""

    pages: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def stretches(pages: Pages, rows: Numbers, coalesce: bool = True) -> Stretches:
    """One stretch a page unless `coalesce`."""
    page, row = pages.astype(np.int64), np.asarray(rows, np.int64)
    if not coalesce or len(page) < 2:
        return Stretches(page, row, np.ones(len(page), np.int64))
    breaks = np.flatnonzero((np.diff(page) != 1) | (np.diff(row) != 1)) + 1
    first = np.concatenate([np.zeros(1, np.int64), breaks])
    return Stretches(page[first], row[first], np.diff(first, append=len(page)))


def runs(pages: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """The same as (page, row, count), for who copies them one by one."""
    found = stretches(np.asarray(pages, np.int32), list(rows))
    return list(zip(found.pages.tolist(), found.rows.tolist(), found.counts.tolist(), strict=True))


class HostCopier:
    """Pages in host memory: plain copies."""

    def __init__(self, groups: Groups, part: RowPart | None = None) -> None:
        self._groups = [[b.numpy() for b in group] for group in groups]
        self._parts = _parts(groups, part.start if part is not None else 0)
        self.page_bytes = part.row_bytes if part is not None else self._parts[-1][1]
        self._whole = self._parts == [(0, self.page_bytes)]

    def attach(self, pool: Rows) -> str:
        return ""

    def close(self) -> None:
        pass

    def store(self, pages: Pages, pool: Rows, rows: Numbers) -> None:
        if self._whole:
            _copy(pool, rows, self._groups[0][0], pages)
            return
        for page, row, count in zip(*stretches(pages, rows), strict=True):
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                pool[row : row + count, start:stop] = group[0][page : page + count]

    def load(self, pool: Rows, rows: Numbers, pages: Pages) -> None:
        if self._whole:
            for buffer in self._groups[0]:
                _copy(buffer, pages, pool, rows)
            return
        for page, row, count in zip(*stretches(pages, rows), strict=True):
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                for buffer in group:
                    buffer[page : page + count] = pool[row : row + count, start:stop]

    def fence(self, pages: Pages) -> None:
        pass


def _copy(target: Rows, into: Numbers | Pages, source: Rows, of: Numbers | Pages) -> None:
    """target[into] = source[of] without a copy in between. Rows that are to lie together are one call."""
    into, of = np.asarray(into), np.asarray(of)
    breaks = np.flatnonzero(np.diff(into) != 1) + 1 if len(into) > 1 else into[:0]
    if len(breaks) > len(into) // 4:  # a call for a few rows costs more than the loop
        for to, at in zip(into.tolist(), of.tolist(), strict=True):
            target[to] = source[at]
        return
    for begin, end in itertools.pairwise([0, *breaks.tolist(), len(into)]):
        first = int(into[begin])
        np.take(source, of[begin:end], axis=0, out=target[first : first + end - begin], mode="clip")


class _Event:
    """Copies on several devices' streams."""

    def __init__(self, events: dict[torch.device, torch.cuda.Event]) -> None:
        self._events = events

    def poll(self) -> bool:
        return all(e.query() for e in self._events.values())  # type: ignore[no-untyped-call]  # torch has no types here

    def wait(self) -> None:
        for event in self._events.values():
            event.synchronize()

    def order(self) -> None:
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)


class CudaCopier:
    """Pages in GPU memory. Copies from and to other memory than attach()'s may block the caller."""

    def __init__(self, groups: Groups, part: RowPart | None = None) -> None:
        assert all(b.is_contiguous() for group in groups for b in group)
        self._groups = groups
        self._parts = _parts(groups, part.start if part is not None else 0)
        self.page_bytes = part.row_bytes if part is not None else self._parts[-1][1]
        self._whole = self._parts == [(0, self.page_bytes)]
        self._devices = sorted({b.device for group in groups for b in group}, key=str)
        self._stores = {d: torch.cuda.Stream(d) for d in self._devices}  # type: ignore[no-untyped-call]  # as above
        self._loads = {d: torch.cuda.Stream(d) for d in self._devices}  # type: ignore[no-untyped-call]  # as above
        self._pool: Rows | None = None  # attach()'s, once it is page-locked
        self._batch = _driver_batch()
        self._last_store = np.zeros(len(groups[0][0]), np.int64)  # by page: the number of its last store
        self._begun = 0
        self._storing: deque[_Event] = deque()  # the last ones of those begun; they end in this order

    def attach(self, pool: Rows) -> str:
        """Page-lock the pool for CUDA in this process."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # as above
        code = int(runtime.cudaHostRegister(pool.ctypes.data, pool.nbytes, _PORTABLE))
        if code:
            return f"cudaHostRegister answered {code} for {pool.nbytes} bytes"
        self._pool = pool
        return ""

    def close(self) -> None:
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        for device in self._devices:
            torch.cuda.synchronize(device)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # as above
        code = int(runtime.cudaHostUnregister(pool.ctypes.data))
        if code:
            log.warning("cudaHostUnregister answered %d for the host tier's %d bytes", code, pool.nbytes)

    def store(self, pages: Pages, pool: Rows, rows: Numbers) -> Ticket:
        ticket = _Event({d: self._queue(d, stream, pages, pool, rows, True) for d, stream in self._stores.items()})
        self._begun += 1
        self._last_store[pages] = self._begun
        self._storing.append(ticket)
        return ticket

    def load(self, pool: Rows, rows: Numbers, pages: Pages) -> Ticket:
        self.fence(pages)
        return _Event({d: self._queue(d, stream, pages, pool, rows, False) for d, stream in self._loads.items()})

    def fence(self, pages: Pages) -> None:
        while self._storing and self._storing[0].poll():
            self._storing.popleft()
        if self._storing and len(pages):
            at = int(self._last_store[pages].max()) - (self._begun - len(self._storing) + 1)
            if at >= 0:
                self._storing[at].order()

    def _queue(
        self,
        device: torch.device,
        stream: torch.cuda.Stream,
        pages: Pages,
        pool: Rows,
        rows: Numbers,
        out: bool,
    ) -> torch.cuda.Event:
        """Queue the part of a copy that `device` has, after what its compute stream has queued."""
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            if pool is not self._pool or not self._copy_batch(device, stream, pages, pool, rows, out):
                self._copy_each(device, pages, pool, rows, out)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as above
            event.record(stream)
        return event

    def _copy_batch(
        self, device: torch.device, stream: torch.cuda.Stream, pages: Pages, pool: Rows, rows: Numbers, out: bool
    ) -> bool:
        """One call for all stretches; False where the driver has no such call, or refused."""
        if self._batch is None:
            return False
        cut = stretches(pages, rows, coalesce=self._whole)
        on_host, on_device, sizes = [], [], []
        for group, (start, stop) in zip(self._groups, self._parts, strict=True):
            for buffer in group[:1] if out else group:
                if buffer.device == device:
                    on_host.append(pool.ctypes.data + start + cut.rows * pool.strides[0])
                    on_device.append(buffer.data_ptr() + cut.pages * buffer.stride(0))
                    sizes.append(cut.counts * (stop - start))
        if not sizes:
            return True
        host, memory, size = (np.concatenate(each).astype(np.uint64) for each in (on_host, on_device, sizes))
        targets, sources = (host, memory) if out else (memory, host)
        first = ctypes.c_size_t(0)  # the attributes are those of all copies from this one on
        code = self._batch(
            targets.ctypes.data,
            sources.ctypes.data,
            size.ctypes.data,
            len(size),
            ctypes.byref(_IN_STREAM_ORDER),
            ctypes.byref(first),
            1,
            stream.cuda_stream,
        )
        if code:
            log.warning("cuMemcpyBatchAsync answered %d; pages are copied by torch from now on", code)
            self._batch = None
        return not code

    def _copy_each(self, device: torch.device, pages: Pages, pool: Rows, rows: Numbers, out: bool) -> None:
        """The same through torch. Rows that are not contiguous go one by one: torch would copy them twice."""
        host = torch.from_numpy(pool)
        for page, row, count in zip(*(each.tolist() for each in stretches(pages, rows, self._whole)), strict=True):
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                for buffer in group[:1] if out else group:
                    if buffer.device == device:
                        here, there = buffer[page : page + count], host[row : row + count, start:stop]
                        target, source = (there, here) if out else (here, there)
                        target.copy_(source, non_blocking=True)


_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of this process


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


# CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
_IN_STREAM_ORDER = _Attributes(source_access_order=1, flags=1)


def _driver_batch() -> Callable[..., int] | None:
    """cuMemcpyBatchAsync as CUDA 13 has it, straight from the driver, which torch has loaded: arrays go in as they
    are. None where the driver is older: its function of that name takes other arguments."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync_v2
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    # targets, sources, sizes, count, attributes, their first copies, their count, stream
    function.argtypes = (pointer, pointer, pointer, size, pointer, pointer, size, pointer)
    function.restype = ctypes.c_int
    found: Callable[..., int] = function
    return found
