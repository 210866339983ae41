"""Pages that several rows of a batch have in common, found in their block tables.

Rows whose requests share a prefix have the pages of the same segments of the prefix tree, in the same columns. So
equal page ids at the beginning of two rows are all that has to be looked at, and what is found is a tree again:

    rows 0-63   pages 7 3 9          a system prompt
    rows 0-9    pages 7 3 9 | 4 4    and a document that ten of them ask about
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

LEAST_SAVED = 128
"""Tokens that are not read again, below which reading pages once costs more than it saves."""


class SharedPages(NamedTuple):
    """`pages` stand in the table of each of `rows` (ascending) from column `first` on, all of them full."""

    rows: Ints
    first: int
    pages: Ints


def shared_pages(table: Ints, full: Ints, page_size: int, least_saved: int = LEAST_SAVED) -> list[SharedPages]:
    """What rows have in common, from the first column on; of each row, columns without a gap.

    table: `[rows, width]`. full: pages of each row that lie wholly before its tokens in this batch, `[rows]`: those may
    be read for all its tokens without a mask.
    """
    found: list[SharedPages] = []
    waiting = [(np.flatnonzero(full > 0), 0)]
    while waiting:
        rows, column = waiting.pop()
        if len(rows) < 2:
            continue
        ids = table[rows, column]
        order = np.argsort(ids, kind="stable")
        cuts = np.flatnonzero(np.diff(ids[order])) + 1
        for group in np.split(rows[order], cuts):
            if len(group) < 2:
                continue
            until = int(full[group].min())
            part = table[group, column:until]
            same = (part == part[0]).all(axis=0)
            count = int(same.argmin()) if not same.all() else until - column
            if (len(group) - 1) * count * page_size < least_saved:
                continue
            found.append(SharedPages(np.sort(group), column, part[0, :count].copy()))
            waiting.append((group[full[group] > column + count], column + count))
    return found
