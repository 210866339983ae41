"""CUDA IPC under a PoolLine: a pool in GPU memory, mapped by another process of the machine.

torch does the sharing: it knows where in a cudaMalloc allocation a pool begins, and keeps one mapping of each
allocation in a process. Every target gets a handle of its own, since torch counts each one's end. What crosses is
numbers and bytes, nothing pickled. The device number that comes with a handle is the source's; the memory is mapped for
the device that holds the same buffer here, which may be another one, given that the two can access each other.

Copies run on a stream of their own, after what the compute stream has queued (earlier readers of pages that were
given to somebody else), and are waited for: a source may reuse its pages as soon as the copy is acknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from rayk.kvcache.page_copies import runs
from rayk.kvcache.page_pool import Pages
from rayk.params import CUDA_IPC
from rayk.transport.pools import check_pages, check_widths


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """What UntypedStorage._share_cuda_() says, but for the device; then where the pool is in the storage."""

    handle: bytes
    storage_bytes: int
    storage_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool
    first_byte: int
    pages: int
    width: int


class CudaMemory:
    """Pools in GPU memory. `buffers` are uint8 `[pages, bytes per page]`, contiguous, sharing memory with the pools."""

    kind = CUDA_IPC

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = list(buffers)
        self._devices = sorted({b.device for b in buffers}, key=str)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def share(self) -> bytes:
        handles = []
        for buffer in self._buffers:
            share: Any = buffer.untyped_storage()._share_cuda_
            _, handle, size, offset, counter, counter_offset, event, sync = share()
            first, (pages, width) = int(buffer.storage_offset()), buffer.shape
            told = (handle, size, offset, counter, counter_offset, event, bool(sync))
            handles.append(_Handle(*told, first, pages, width))
        return msgspec.msgpack.encode(handles)

    def settle(self) -> None:
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()

    def map(self, offer: bytes) -> list[torch.Tensor]:
        handles = msgspec.msgpack.decode(offer, type=list[_Handle])
        check_widths([b.shape[1] for b in self._buffers], [h.width for h in handles])
        pool = []
        for told, mine in zip(handles, self._buffers, strict=True):
            with torch.cuda.device(mine.device):
                storage = torch.UntypedStorage._new_shared_cuda(
                    mine.device.index,
                    told.handle,
                    told.storage_bytes,
                    told.storage_offset,
                    told.counter,
                    told.counter_offset,
                    told.event,
                    told.event_sync,
                )
                whole = torch.empty(0, dtype=torch.uint8, device=mine.device).set_(storage)
                size = told.pages * told.width
                pool.append(whole[told.first_byte : told.first_byte + size].view(told.pages, told.width))
        return pool

    def copy(self, pool: Any, theirs: Pages, mine: Pages) -> None:
        check_pages(theirs, len(pool[0]))
        stretches = runs(mine.tolist(), theirs.tolist())
        for device in self._devices:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in zip(self._buffers, pool, strict=True):
                    if target.device == device:
                        for to, of, count in stretches:
                            target[to : to + count].copy_(source[of : of + count], non_blocking=True)
        for stream in self._streams.values():
            stream.synchronize()
