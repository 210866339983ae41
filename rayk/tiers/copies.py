"""Copying whole pages between a replica's device buffers and rows of host memory.

A row holds one page of all buffers, one after the other (leaves, TP shards, values, scales): `bytes_per_page` bytes.
On the CPU a copy is done when the call returns. On CUDA copies run on their own streams, one for each direction:
stores wait for what the compute stream has queued so far, and the compute stream waits for loads, so neither blocks
the caller; a page that is still being stored is fenced before it is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rayk.tiers.connector import Pages

Rows = npt.NDArray[np.uint8]  # [rows, bytes per page]
Groups = Sequence[Sequence[torch.Tensor]]  # buffers; those of a group hold the same bytes


class Ticket(Protocol):
    """A copy under way."""

    def poll(self) -> bool: ...
    def wait(self) -> None: ...


class PageCopier(Protocol):
    """Moves pages of one replica. `rows` of a call stay untouched by others until its ticket is done (None: now)."""

    page_bytes: int

    def store(self, pages: Pages, pool: Rows, rows: Sequence[int]) -> Ticket | None:
        """Device pages -> pool[rows]."""
        ...

    def load(self, pool: Rows, rows: Sequence[int], pages: Pages) -> Ticket | None:
        """pool[rows] -> device pages."""
        ...

    def fence(self, pages: Pages) -> None:
        """Before these pages are given to somebody else: nothing reads them any more, in stream order."""
        ...


def make_copier(buffers: Sequence[torch.Tensor], copies: Sequence[int] | None = None) -> PageCopier:
    """`buffers` are uint8 `[pages, bytes per page]`, one per device buffer, sharing memory with it.

    `copies` are the lengths of the runs of buffers that hold the same bytes (a replicated cache's TP shards), of which
    a row has one; by default each buffer is its own.
    """
    groups, at = [], 0
    for count in copies or [1] * len(buffers):
        groups.append(buffers[at : at + count])
        at += count
    assert at == len(buffers)
    return CudaCopier(groups) if any(b.is_cuda for b in buffers) else HostCopier(groups)


def _parts(groups: Groups) -> list[tuple[int, int]]:
    """Where each group's part of a page is in a row: start, stop."""
    parts, at = [], 0
    for group in groups:
        parts.append((at, at + group[0].shape[1]))
        at += group[0].shape[1]
    return parts


def runs(pages: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Maximal stretches (page, row, count) in which both numbers grow by one: each is a single copy."""
    found: list[tuple[int, int, int]] = []
    for page, row in zip(pages, rows, strict=True):
        if found and found[-1][0] + found[-1][2] == page and found[-1][1] + found[-1][2] == row:
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + 1)
        else:
            found.append((page, row, 1))
    return found


class HostCopier:
    """Pages in host memory: plain copies."""

    def __init__(self, groups: Groups) -> None:
        self._groups = [[b.numpy() for b in group] for group in groups]
        self._parts = _parts(groups)
        self.page_bytes = self._parts[-1][1]

    def store(self, pages: Pages, pool: Rows, rows: Sequence[int]) -> None:
        if len(self._groups) == 1:
            self._copy(pool, rows, self._groups[0][0], pages.tolist())
            return
        for page, row, count in runs(pages.tolist(), rows):
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                pool[row : row + count, start:stop] = group[0][page : page + count]

    def load(self, pool: Rows, rows: Sequence[int], pages: Pages) -> None:
        if len(self._groups) == 1 and len(self._groups[0]) == 1:
            self._copy(self._groups[0][0], pages.tolist(), pool, rows)
            return
        for page, row, count in runs(pages.tolist(), rows):
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                for buffer in group:
                    buffer[page : page + count] = pool[row : row + count, start:stop]

    @staticmethod
    def _copy(target: Rows, into: Sequence[int], source: Rows, of: Sequence[int]) -> None:
        """target[into] = source[of] without a copy in between; whole rows on both sides."""
        for to, row, count in runs(into, of):
            if count == 1:
                target[to] = source[row]
            else:
                target[to : to + count] = source[row : row + count]

    def fence(self, pages: Pages) -> None:
        pass


class _Event:
    """Copies on several devices' streams."""

    def __init__(self, events: Sequence[torch.cuda.Event]) -> None:
        self.events = events

    def poll(self) -> bool:
        return all(e.query() for e in self.events)  # type: ignore[no-untyped-call]  # torch's streams have no types

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()


class CudaCopier:
    """Pages in GPU memory. The pool should be registered with CUDA (register()), else copies block the caller."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._parts = _parts(groups)
        self.page_bytes = self._parts[-1][1]
        self._devices = sorted({b.device for group in groups for b in group}, key=str)
        self._stores = {d: torch.cuda.Stream(d) for d in self._devices}  # type: ignore[no-untyped-call]
        self._loads = {d: torch.cuda.Stream(d) for d in self._devices}  # type: ignore[no-untyped-call]
        self._storing: list[tuple[frozenset[int], _Event]] = []
        self._pools: dict[int, torch.Tensor] = {}

    def _pool(self, pool: Rows) -> torch.Tensor:
        """The same memory as a tensor; made once for the node's pool, which lives as long as the process."""
        tensor = self._pools.get(pool.ctypes.data)
        if tensor is None or tensor.shape != pool.shape:
            tensor = torch.from_numpy(pool)
            self._pools = {pool.ctypes.data: tensor}
        return tensor

    def _copy(self, streams: dict[torch.device, torch.cuda.Stream], copy: Callable[[torch.device], None]) -> _Event:
        """Queue `copy` for each device on its stream, after what its compute stream has queued."""
        events = []
        for device, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                copy(device)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
                events.append(event)
        return _Event(events)

    def store(self, pages: Pages, pool: Rows, rows: Sequence[int]) -> Ticket:
        host, stretches = self._pool(pool), runs(pages.tolist(), rows)

        def copy(device: torch.device) -> None:
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                if group[0].device == device:
                    for page, row, count in stretches:
                        host[row : row + count, start:stop].copy_(group[0][page : page + count], non_blocking=True)

        ticket = self._copy(self._stores, copy)
        self._storing = [s for s in self._storing if not s[1].poll()]
        self._storing.append((frozenset(pages.tolist()), ticket))
        return ticket

    def load(self, pool: Rows, rows: Sequence[int], pages: Pages) -> Ticket:
        host, stretches = self._pool(pool), runs(pages.tolist(), rows)

        def copy(device: torch.device) -> None:
            for group, (start, stop) in zip(self._groups, self._parts, strict=True):
                for buffer in group:
                    if buffer.device == device:
                        for page, row, count in stretches:
                            buffer[page : page + count].copy_(host[row : row + count, start:stop], non_blocking=True)

        self.fence(pages)
        ticket = self._copy(self._loads, copy)
        for event, device in zip(ticket.events, self._devices, strict=True):
            torch.cuda.current_stream(device).wait_event(event)
        return ticket

    def fence(self, pages: Pages) -> None:
        if not self._storing:
            return
        self._storing = [s for s in self._storing if not s[1].poll()]
        wanted = set(pages.tolist())
        for stored, ticket in self._storing:
            if not wanted.isdisjoint(stored):
                for event, device in zip(ticket.events, self._devices, strict=True):
                    torch.cuda.current_stream(device).wait_event(event)


def register(pool: Rows) -> str:
    """Page-lock the pool for CUDA in this process, once; why it could not be, or "". Copies work either way."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(pool.ctypes.data, pool.nbytes, 0)
    return "" if int(code) == 0 else f"cudaHostRegister answered {code}"
