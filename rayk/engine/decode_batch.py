"""The decoding requests of an engine as columns, so that a step costs no Python work for each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rayk.engine.sampler import is_plain
from rayk.engine.sequence import SequenceState
from rayk.kvcache.context_batch import ContextBatch

Column = npt.NDArray[np.int64]
_NO_STOP = -1


class Advanced(NamedTuple):
    """What one token each made of the rows: those that end ([n] int64), and whether that was a stop token ([n])."""

    finished: Column
    stopped: npt.NDArray[np.bool_]


class DecodeBatch:
    """`sequences[i]` and `contexts[i]` are row i of every column. `last`: the token that is to be processed next."""

    def __init__(self) -> None:
        self.sequences: list[SequenceState] = []
        self.contexts = ContextBatch()
        self.numbers = self.last = self._limits = np.empty(0, np.int64)
        self._stops = np.empty((0, 0), np.int64)
        self.plain = True  # every row takes the most likely token, and no more is wanted
        self.special: list[int] = []  # rows whose tokens need a look of their own
        self.ones: list[int] = []

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequences: Iterable[SequenceState]) -> None:
        """Append rows for requests that have processed all, or all but the last, of their tokens."""
        new = list(sequences)
        if not new:
            return
        windows = [each.ctx.tokens for each in new]
        self.last = np.append(self.last, [int(window.data[window.length - 1]) for window in windows])
        for each in new:
            self.contexts.add(each.ctx)
        self.sequences = self.sequences + new
        self.numbers = np.append(self.numbers, [each.number for each in new])
        self._limits = np.append(self._limits, [each.limit for each in new])
        width = max(self._stops.shape[1], *(len(each.stop_ids) for each in new))
        stops = np.full((len(self.sequences), width), _NO_STOP, np.int64)
        stops[: len(self._stops), : self._stops.shape[1]] = self._stops
        for row, each in enumerate(new, len(self._stops)):
            stops[row, : len(each.stop_ids)] = each.stop_ids
        self._stops = stops
        self._look()

    def drop(self, rows: Collection[int]) -> None:
        """Take rows out. As in the ContextBatch, the last row takes the place of each."""
        if not len(rows):
            return
        keep = list(range(len(self)))
        for row in sorted(rows, reverse=True):
            self.contexts.remove(self.sequences[keep[row]].request_id)
            keep[row] = keep[-1]
            keep.pop()
        self.sequences = [self.sequences[row] for row in keep]
        self.numbers, self.last = self.numbers[keep], self.last[keep]
        self._limits, self._stops = self._limits[keep], self._stops[keep]
        self._look()

    def _look(self) -> None:
        self.plain = all(is_plain(each) for each in self.sequences)
        self.special = [row for row, each in enumerate(self.sequences) if not each.simple]
        self.ones = [1] * len(self)

    def advance(self, tokens: Column) -> Advanced:
        """Every row was processed and has a new token, [rows] int64."""
        self.contexts.update(tokens.astype(np.int32))
        self.last = tokens
        stopped = (tokens[:, None] == self._stops).any(axis=1)
        return Advanced(np.flatnonzero(stopped | (self.contexts.lengths >= self._limits)), stopped)
