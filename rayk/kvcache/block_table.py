"""Block tables: which pages each request of a replica has, in sequence order, as rows of one int32 array.

A request owns one row from claim to release. Beyond its pages a row is filled with the null page, so that a
batch's lookup table is a gather of rows. The array doubles when rows or columns run out: it grows with the
number and length of running requests, never with the pool.

For requests in a ContextBatch (*bound* ones) the table also keeps columns over its rows, so that rayk.kvcache.decode
can look at a whole batch at once. They are written when a request is bound and whenever it changes after that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Column = npt.NDArray[np.int64]


class BlockTable:
    """Rows of page ids. `cells` and its `rows` are replaced when it grows: read anew after acquire() and widen()."""

    def __init__(self, null_page: int, rows: int, width: int = 64) -> None:
        self.null_page = null_page
        self._set(np.full((max(1, rows), width), null_page, np.int32))
        self._free = list(range(len(self.cells) - 1, -1, -1))
        self._columns = np.zeros((3, len(self.cells)), np.int64)
        self._name_columns()
        self.epoch = 0  # changes when a bound row is dropped or gets another context
        self.version = 0  # changes when cells of a bound row change, but by rayk.kvcache.decode itself
        self._bound = 0

    def _name_columns(self) -> None:
        # Of each row what its Request has: slot_capacity, next_commit_at, bound.
        self.slot_capacity, self.next_commit_at, self.serial = self._columns

    def _set(self, cells: Int32Array) -> None:
        self.cells = cells
        self.width = cells.shape[1]
        self.rows: list[Int32Array] = list(cells)  # a view of each row: cheaper to index than the whole array

    def acquire(self) -> int:
        """The index of a row that is all null; the caller owns it until drop()."""
        if not self._free:
            rows = len(self.cells)
            self._set(np.concatenate((self.cells, np.full_like(self.cells, self.null_page))))
            self._free = list(range(2 * rows - 1, rows - 1, -1))
            self._columns = np.concatenate((self._columns, np.zeros_like(self._columns)), axis=1)
            self._name_columns()
        return self._free.pop()

    def bind(self, row: int, slot_capacity: int, next_commit_at: int) -> int:
        """Keep the columns of that row from now on: a number that no other bound row has or had, never 0."""
        self._bound = self.serial[row] = self._bound + 1
        self.slot_capacity[row], self.next_commit_at[row] = slot_capacity, next_commit_at
        return self._bound

    def changed(self) -> None:
        """Cells of a bound row were replaced."""
        self.version += 1

    def unbind(self, row: int) -> None:
        """The row is not that request's any more, or shows another context of it."""
        self.serial[row] = 0
        self.epoch += 1

    def drop(self, row: int, used: int) -> None:
        """Give a row back; its first `used` cells may hold page ids."""
        self.rows[row][:used] = self.null_page
        self._free.append(row)

    def widen(self, pages: int) -> None:
        """Make rows at least `pages` wide."""
        rows, width = self.cells.shape
        if pages > width:
            grown = np.full((rows, max(pages, 2 * width)), self.null_page, np.int32)
            grown[:, :width] = self.cells
            self._set(grown)
