"""The check that a replica's bookkeeping agrees with itself: a failure is a bug in rayk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rayk.errors import IntegrityError

if TYPE_CHECKING:
    from rayk.kvcache.replica import ReplicaCore


def check(core: ReplicaCore) -> None:
    """IntegrityError unless every page is in exactly one place and all counts agree with what they count."""
    core.publish()
    seen = np.zeros(core.num_pages, np.int64)
    core.pool.count_into(seen)
    tips = [r.tip for r in core.requests.values() if r.tip is not None]
    core.tree.check_integrity(tips + core.exports.tips, seen)
    where = f"replica {core.replica}"
    for request_id, request in core.requests.items():
        row = core.table.rows[request.row]
        if (row[request.pages :] != core.num_pages).any():
            raise IntegrityError(where, f"request {request_id!r} has pages beyond its {request.pages}")
        if request.dummy:
            continue
        np.add.at(seen, row[request.committed : request.pages], 1)
        path = core.tree.path_pages(request.tip) if request.tip is not None else row[:0]
        if path.tolist() != row[: request.committed].tolist():
            raise IntegrityError(where, f"request {request_id!r} does not show the pages it holds")
    wrong = np.flatnonzero(seen != 1)
    if wrong.size:
        raise IntegrityError(where, f"page {wrong[0]} is in {seen[wrong[0]]} places")
