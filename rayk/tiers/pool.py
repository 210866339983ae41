"""The host tier of a node: one pool of page rows in shared memory for all replicas of a cluster on that node."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from rayk.kvcache.page_copies import Rows
from rayk.tiers.directory import Directory
from rayk.tiers.folder import POOLS, SHARED_MEMORY
from rayk.tiers.segment import HEADER_BYTES, Segment, sweep

ALIGNMENT = 4096


class HostPool:
    """`rows[slot]` is the page in that slot of `directory`. `name` is the cluster's; None makes a private pool.

    PlanError when a new pool of `pages` pages of `page_bytes` needs more than `free_bytes`.
    """

    def __init__(self, name: str | None, pages: int, page_bytes: int, free_bytes: int | None = None) -> None:
        records = _rows_start(pages)
        size = records + pages * page_bytes
        sweep(SHARED_MEMORY, POOLS)
        self._segment = Segment.attach(pool_path(name), size, page_bytes, lambda _: None, free_bytes)
        self.directory = Directory(self._segment, pages)
        if not self._segment.fresh:
            self.reap(own_seat=True)
        self.rows: Rows = self._segment.body[records:].reshape(pages, page_bytes)
        self.pages = pages

    def reap(self, own_seat: bool = False) -> None:
        """Free what dead replicas held."""
        self.directory.free_dead(own_seat)

    def reset(self) -> None:
        """Forget all pages that nobody holds."""
        self.reap()
        self.directory.clear()

    def close(self) -> None:
        """Detach; the last one gives the memory back."""
        self._segment.close()


def _rows_start(pages: int) -> int:
    """Where the rows begin in a segment's body."""
    return -(-Directory.num_bytes(pages) // ALIGNMENT) * ALIGNMENT


def map_rows(name: str, pages: int, page_bytes: int) -> Rows:
    """The rows of a cluster's pool alone, for a process of a replica that is attached to it by another one."""
    path, start = pool_path(name), HEADER_BYTES + _rows_start(pages)
    assert path is not None
    return np.memmap(path, np.uint8, "r+", start, (pages, page_bytes))


def pool_path(name: str | None) -> Path | None:
    """Where the pool of that cluster is on this node."""
    if name is None:
        return None
    return SHARED_MEMORY / f"{POOLS}{os.getuid()}-{hashlib.sha256(name.encode()).hexdigest()[:24]}"
