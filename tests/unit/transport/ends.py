"""Two replicas' pools in this process, and exported pages from one to the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayk import MHAKVCacheParams
from rayk.kvcache.buffers import PageBuffers
from rayk.transport.choice import Peer
from rayk.transport.line import Line, PageExportRef

SOURCE, TARGET = Peer(0, 100), Peer(1, 101)
FOREVER = float("inf")


def buffers(pages: int = 8, shared: bool = False, heads: int = 1, dtype: str = "float32") -> PageBuffers:
    """Every page full of its own number."""
    params = MHAKVCacheParams(
        dtype=dtype,
        n_kv_heads=heads,
        head_dim=4,
        num_layers=2,
        page_size=2,
        devices=["cpu"],
        enable_prefix_caching=True,
    )
    made = PageBuffers(params, pages, ["cpu"], shared)
    for raw in made.all_bytes:
        for page in range(pages + 1):
            raw[page] = page + 1
    return made


def blank(pages: int = 8, **kwargs) -> PageBuffers:
    made = buffers(pages, **kwargs)
    for raw in made.all_bytes:
        raw.zero_()
    return made


def content(of: PageBuffers) -> list[int]:
    """What each page is full of; -1 when it is not full of one value."""
    values = []
    for page in range(of.num_pages + 1):
        found = {int(v) for raw in of.all_bytes for v in np.unique(raw[page].numpy())}
        values.append(found.pop() if len(found) == 1 else -1)
    return values


def ids(pages: Sequence[int]) -> np.ndarray:
    return np.array(pages, np.int32)


def exported(line: Line, pages: Sequence[int], export_id: int = 1, expires: float = FOREVER) -> PageExportRef:
    """What `line`, an end of SOURCE, offers of its pages."""
    offer = line.offer(TARGET, export_id, ids(pages))
    return PageExportRef(SOURCE, export_id, ids(pages), offer, expires)
