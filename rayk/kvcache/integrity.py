"""The check that a replica's bookkeeping agrees with itself: a failure is a bug in rayk."""

from __future__ import annotations

import numpy as np

from rayk.errors import IntegrityError
from rayk.kvcache.state import CacheState


def check(state: CacheState) -> None:
    """IntegrityError unless every page is in exactly one place and all counts agree with what they count."""
    state.publish()
    seen = np.zeros(state.num_pages, np.int64)
    state.pool.count_into(seen)
    tips = [r.tip for r in state.requests.values() if r.tip is not None]
    state.tree.check_integrity(tips + state.exports.tips, seen)
    where = f"replica {state.replica}"
    for request_id, request in state.requests.items():
        row = state.table.rows[request.row]
        if (row[request.pages :] != state.num_pages).any():
            raise IntegrityError(where, f"request {request_id!r} has pages beyond its {request.pages}")
        if request.dummy:
            continue
        np.add.at(seen, row[request.committed : request.pages], 1)
        path = request.tip.path_pages() if request.tip is not None else row[:0]
        if path.tolist() != row[: request.committed].tolist():
            raise IntegrityError(where, f"request {request_id!r} does not show the pages it holds")
    wrong = np.flatnonzero(seen != 1)
    if wrong.size:
        raise IntegrityError(where, f"page {wrong[0]} is in {seen[wrong[0]]} places")
