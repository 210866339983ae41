"""Decode steps of a ContextBatch on one replica, as operations on arrays over the batch.

Each function does what its namesake of ReplicaCore does for the contexts one by one, and only when that is
possible (`ready`): every context is bound to its request here and decodes exactly one token. What a batch has
processed is put into the prefix tree only when somebody could notice, see ReplicaCore.publish().

The lookup table of the last batch stays where it is. While nobody joins or leaves and no row is changed from
outside, a step writes only the cells of new pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from rayk.kvcache.block_table import BlockTable, Int32Array
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.lookup_table import bounded, table_width
from rayk.kvcache.runtime_inputs import BatchShape

if TYPE_CHECKING:
    from rayk.kvcache.replica import ReplicaCore


class Shown(NamedTuple):
    """What the host table shows: this batch, as it and the block table were at these versions."""

    batch: ContextBatch
    order: int
    version: int
    cells: Int32Array
    lengths: Int32Array

    def by(self, batch: ContextBatch, table: BlockTable) -> bool:
        """Whether it shows that batch and no row was changed from outside since."""
        return self.batch is batch and self.order == batch.order and self.version == table.version


def ready(core: ReplicaCore, batch: ContextBatch) -> bool:
    """Whether the functions below may be used for the batch now."""
    return batch.decoding and ((batch.bound_to is core and batch.bound_epoch == core.table.epoch) or _bind(core, batch))


def _bind(core: ReplicaCore, batch: ContextBatch) -> bool:
    """Find each context's request and remember its row. False when one has none, no page, or another context."""
    table = core.table
    if batch.bound_to is core:
        missing = np.flatnonzero(table.serial[batch.row] != batch.serial).tolist()
    else:
        batch.bound_to, missing = core, list(range(len(batch)))
        batch.serial[:] = -1
    batch.allocated = -1
    for at in missing:
        ctx = batch[at]
        request = core.requests.get(ctx.request_id)
        if request is None or request.ctx is not ctx or not request.pages or request.dummy:
            return False
        if not request.bound:
            core.bind(request)
        batch.row[at], batch.serial[at], batch.requests[at] = request.row, request.bound, request
    batch.bound_epoch = table.epoch
    return True


def alloc(core: ReplicaCore, batch: ContextBatch) -> bool:
    """A page more for each context whose pages are full. False, and nothing is changed, when there are too few."""
    need, room = batch.need, batch.room
    np.add(batch.length, core.extra_slots, out=need)
    core.table.room.take(batch.row, out=room, mode="clip")  # rows are in range; "raise" would go through a copy
    at = np.less(room, need, out=batch.short).nonzero()[0]
    if at.size and not _grow(core, batch, at, room[at], need[at]):
        return False
    core.input_tokens += len(batch)
    batch.allocated = batch.moves
    return True


def _grow(
    core: ReplicaCore,
    batch: ContextBatch,
    at: npt.NDArray[np.intp],
    room: npt.NDArray[np.int64],
    need: npt.NDArray[np.int64],
) -> bool:
    size, table = core.page_size, core.table
    if (need - room).max() > size or not core.make_room(len(at)):
        return False
    columns = room // size
    if columns.max() >= table.width:
        table.widen(int(columns.max()) + 1)
    pages, rows = core.take(len(at)), batch.row[at]
    table.cells[rows, columns] = pages
    table.room[rows] = room + size
    shown = core.stage.shown
    if type(shown) is Shown and shown.by(batch, table) and columns.max() < shown.cells.shape[1]:
        shown.cells[at, columns] = pages
    for i in at.tolist():
        request = batch.requests[i]
        assert request is not None
        request.pages += 1
        request.room += size
    return True


def fill(core: ReplicaCore, batch: ContextBatch) -> tuple[int, int, BatchShape] | None:
    """fill_batch() for a batch whose pages just suffice; None when the other one has to look at each context."""
    table, rows = core.table, len(batch)
    shape = BatchShape(rows, 1, batch.longest + core.params.num_draft_tokens)
    longest, shape = bounded(core, -(-(batch.longest + core.extra_slots) // core.page_size), shape, None, None)
    width = table_width(longest)
    shown = core.stage.shown
    if not (
        type(shown) is Shown
        and shown.by(batch, table)
        and shown.cells.shape == (rows, width)
        and batch.allocated == batch.moves
    ):
        spare = (table.room[batch.row] - core.extra_slots) - batch.length
        if spare.min() < 0 or spare.max() >= core.page_size:
            return None
        cells, lengths = core.stage.host_views(rows, width)
        filled = min(width, table.width)
        cells[:, :filled] = table.cells[batch.row, :filled]
        cells[:, filled:] = core.num_pages
        core.stage.shown = shown = Shown(batch, batch.order, table.version, cells, lengths)
    shown.lengths[:] = batch.done
    return rows, width, shape


def step(core: ReplicaCore, batch: ContextBatch) -> bool:
    """Note what the batch has processed. False when a context has processed more than its pages hold."""
    if batch.allocated != batch.moves - 1 and (batch.done > core.table.room[batch.row]).any():
        return False
    batch.stepped[:] = batch.done
    return True
