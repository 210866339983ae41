"""Which kind of line carries pages from one replica to another. The one place where that is decided.

    cuda-ipc        both in GPU memory on one machine: the target reads the source's pool, device to device
    shared-memory   the same for pages in host memory
    group           a torch.distributed group of the two, over the network (gloo; pages on a GPU go through host memory)
    object-store    page data beside the messages, in Ray's object store; always there

The host pool of a node needs no line: what its replicas share there is loaded from it, and nobody asks a peer.
Pure, and without torch, since the scheduler decides.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import msgspec

from rayk.params import AUTO, CUDA_IPC, GROUP, LINES, LOCAL_LINES, OBJECT_STORE, SHARED_MEMORY

ASSUMED_RATES = {  # seconds, bytes a second: what a line is taken to do before anything was copied over it
    CUDA_IPC: (0.5e-3, 50e9),
    SHARED_MEMORY: (0.5e-3, 4e9),
    GROUP: (2e-3, 1e9),
    OBJECT_STORE: (5e-3, 0.5e9),
}


class Peer(NamedTuple):
    """The replica at the other end, and its start: a line is of two processes, not of two indices."""

    replica: int
    epoch: int


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """A replica as an end of lines. `host` is the same for processes that can open each other's memory, `address` where
    others reach it, `lines` the kinds that it has, `page_bytes` what a page of all its buffers weighs."""

    host: str
    address: str
    lines: list[str]
    page_bytes: int


def choose_line(source: Endpoint, target: Endpoint, wanted: str = AUTO, broken: Collection[str] = ()) -> str:
    """The best kind that both have, that reaches from one to the other and is not `broken`.

    `wanted` is preferred to better ones, where it can be used. The object store is left over when nothing else is.
    """
    for kind in (wanted, *LINES):
        here = kind not in LOCAL_LINES or source.host == target.host
        if here and kind in source.lines and kind in target.lines and kind not in broken:
            return kind
    return OBJECT_STORE
