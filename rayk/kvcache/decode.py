"""Decode steps of a ContextBatch on one replica, as operations on arrays over the batch.

Each function does what its namesake of ReplicaCore does for the contexts one by one, and only when that is
possible (`ready`): every context is bound to its request here and decodes exactly one token. What a batch has
processed is put into the prefix tree only when a reader could notice, see CacheState.publish().

The lookup table of the last batch stays where it is. While the batch keeps its contexts and their rows are changed
only here, a step writes only the cells of new pages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rayk.kvcache.block_table import BlockTable, Column, Int32Array
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.lookup_table import bounded, table_width
from rayk.kvcache.runtime_inputs import BatchShape
from rayk.kvcache.state import CacheState


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


def ready(state: CacheState, batch: ContextBatch) -> bool:
    """Whether the functions below may be used for the batch now: every context is bound to its request here."""
    return batch.decoding and (
        (batch.bound_to is state and batch.bound_epoch == state.table.epoch)
        or batch.bind(state, state.table, state.decoding_request)
    )


def alloc(state: CacheState, batch: ContextBatch) -> bool:
    """A page more for each context whose pages are full. False, and nothing is changed, when there are too few."""
    need, capacity = batch.need, batch.capacity
    np.add(batch.length, state.extra_slots, out=need)
    # Rows are in range; "raise" would go through a copy.
    state.table.slot_capacity.take(batch.row, out=capacity, mode="clip")
    at = np.less(capacity, need, out=batch.short).nonzero()[0]
    if at.size and not _grow(state, batch, at, capacity[at], need[at]):
        return False
    state.count(len(batch))
    batch.note_allocated()
    return True


def _grow(state: CacheState, batch: ContextBatch, at: npt.NDArray[np.intp], capacity: Column, need: Column) -> bool:
    size, table = state.page_size, state.table
    if (need - capacity).max() > size:
        return False
    if len(at) > state.pool.empty:
        if len(at) > state.free:
            return False
        state.tree.make_room(len(at))
    columns = capacity // size
    last = int(columns.max())
    if last >= table.width:
        table.widen(last + 1)
    requests = [request for i in at.tolist() if (request := batch.requests[i]) is not None]
    pages = state.add_pages(requests, batch.row[at], columns)
    shown = state.stage.shown
    if type(shown) is Shown and shown.by(batch, table) and last < shown.cells.shape[1]:
        shown.cells[at, columns] = pages
    return True


def fill(state: CacheState, batch: ContextBatch) -> tuple[int, int, BatchShape] | None:
    """fill_batch() for a batch whose pages just suffice; None when that one has to look at each context."""
    table, rows, extra = state.table, len(batch), state.extra_slots
    shape = BatchShape(rows, 1, batch.longest + state.params.num_draft_tokens)
    longest, shape = bounded(state, -(-(batch.longest + extra) // state.page_size), shape, None, None)
    width = table_width(longest)
    shown = state.stage.shown
    if not (
        type(shown) is Shown
        and shown.by(batch, table)
        and shown.cells.shape == (rows, width)
        and batch.allocated == batch.moves
    ):
        spare = (table.slot_capacity[batch.row] - extra) - batch.length
        if spare.min() < 0 or spare.max() >= state.page_size:
            return None
        cells, lengths = state.stage.host_views(rows, width)
        filled = min(width, table.width)
        cells[:, :filled] = table.cells[batch.row, :filled]
        cells[:, filled:] = state.num_pages
        shown = Shown(batch, batch.order, table.version, cells, lengths)
        state.stage.show(shown)
    shown.lengths[:] = batch.done
    return rows, width, shape


def step(state: CacheState, batch: ContextBatch) -> bool:
    """Note what the batch has processed. False when a context has processed more than its pages hold."""
    if batch.allocated != batch.moves - 1 and (batch.done > state.table.slot_capacity[batch.row]).any():
        return False
    if batch.note_stepped(state.publish if state.caching else None):
        state.unpublished.append(batch)
    return True
