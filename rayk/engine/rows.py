"""The decoding requests of an engine as columns, so that a step costs no Python work for each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rayk.engine.generation import Generation
from rayk.engine.sampler import is_plain

Column = npt.NDArray[np.int64]
_NO_STOP = -1


class Advanced(NamedTuple):
    """What one token each made of the rows: those that end, those that end at a stop token, those with a full page."""

    finished: Column
    stopped: npt.NDArray[np.bool_]
    full: Column


class Rows:
    """`generations[i]` is row i of every column. `lengths`: all its tokens; `last`: the one to be processed next."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.generations: list[Generation] = []
        self.numbers = self.lengths = self.last = self._limits = np.empty(0, np.int64)
        self._stops = np.empty((0, 0), np.int64)
        self.plain = True  # every row takes the most likely token, and no more is wanted
        self.special: list[int] = []  # rows whose tokens need a look of their own
        self.ones: list[int] = []

    def __len__(self) -> int:
        return len(self.generations)

    def add(self, generations: Iterable[Generation]) -> None:
        """Append rows for requests whose last token is to be processed next."""
        new = list(generations)
        if not new:
            return
        windows = [each.ctx.tokens for each in new]
        self.generations = self.generations + new
        self.numbers = np.append(self.numbers, [each.number for each in new])
        self.lengths = np.append(self.lengths, [window.length for window in windows])
        self.last = np.append(self.last, [int(window.data[window.length - 1]) for window in windows])
        self._limits = np.append(self._limits, [each.limit for each in new])
        width = max(self._stops.shape[1], *(len(each.stop_ids) for each in new))
        stops = np.full((len(self.generations), width), _NO_STOP, np.int64)
        stops[: len(self._stops), : self._stops.shape[1]] = self._stops
        for row, each in enumerate(new, len(self._stops)):
            stops[row, : len(each.stop_ids)] = each.stop_ids
        self._stops = stops
        self._look()

    def drop(self, rows: Collection[int]) -> None:
        """Take rows out; the others move up and keep their order."""
        if not len(rows):
            return
        gone = set(rows)
        keep = [row for row in range(len(self)) if row not in gone]
        self.generations = [self.generations[row] for row in keep]
        self.numbers, self.lengths = self.numbers[keep], self.lengths[keep]
        self.last, self._limits, self._stops = self.last[keep], self._limits[keep], self._stops[keep]
        self._look()

    def _look(self) -> None:
        self.plain = all(is_plain(each) for each in self.generations)
        self.special = [row for row, each in enumerate(self.generations) if not each.simple]
        self.ones = [1] * len(self)

    def tokens(self) -> torch.Tensor:
        """The tokens to be processed, [rows] int64; valid until the rows change."""
        return torch.from_numpy(self.last)

    def advance(self, tokens: Column) -> Advanced:
        """Every row has a new token, [rows] int64."""
        self.lengths += 1
        self.last = tokens
        stopped = (tokens[:, None] == self._stops).any(axis=1)
        finished = np.flatnonzero(stopped | (self.lengths >= self._limits))
        full = np.flatnonzero((self.lengths - 1) % self._page_size == 0)
        return Advanced(finished, stopped, full)
