"""How long requests stay once they are let in, learned from those that left: what a deadline is held against.

    expected(n) = usual + slope * (n - usual n)        of one that may generate n tokens, in the usual crowd
    within(n)   = expected(n) + margin * spread        nearly all; less in a smaller crowd, down to the quickest

The slope is that of a regression over those that left. Where the tokens that a request may generate say nothing about
how long it stays, since all may generate as many or few do, it is next to 0 by itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

SMOOTHING = 0.1  # weight of the latest stay in what is usual
TREND = 0.03  # and in the slope: what ten requests say of that is chance
FEW = 8  # requests that left before there is a slope
FORGETTING = 1.01  # by which the quickest stay is taken to be longer with each that leaves
LEAST_MARGIN, MARGIN, MOST_MARGIN = 3.0, 3.5, 10.0  # spreads beyond what is expected that a deadline leaves
MISSED, MET = 0.5, 0.0025  # by which that grows with a deadline that was missed and shrinks with one that was met
SIZES, LONG = 256, 0.95  # requests that came last, and the part of them that a long one is longer than


class ServiceTimeEstimator:
    """Seconds; all 0 while nobody left."""

    def __init__(self) -> None:
        self.usual = 0.0
        self.spread = 0.0
        """The mean distance of what was from what was expected."""
        self.quickest = 0.0
        self.margin = MARGIN
        self.slope = 0.0
        """Seconds a token."""
        self._output = 0.0  # tokens that the usual one may generate
        self._crowd = 0.0  # pages that are held, usually, when one comes that stays so long
        self._variance = self._covariance = 0.0
        self._left = 0
        self._came: deque[int] = deque()  # tokens of the latest that came, and the same in order
        self._sizes: list[int] = []

    def came(self, output: int) -> None:
        """A request that may generate so many tokens came, whatever becomes of it."""
        self._came.append(output)
        insort(self._sizes, output)
        if len(self._came) > SIZES:
            del self._sizes[bisect_left(self._sizes, self._came.popleft())]

    @property
    def long(self) -> int:
        """The tokens that a long request may generate."""
        return self._sizes[int(LONG * len(self._sizes))] if self._sizes else 0

    def expected(self, output: int) -> float:
        """In the usual crowd."""
        return max(self.quickest, self.usual + self.slope * (output - self._output))

    def within(self, pages: int, output: int | None = None) -> float:
        """In which nearly all are done that are let in while so many pages are held. `output`: the tokens that it may
        generate, as many as are usual if not given."""
        full = (self.usual if output is None else self.expected(output)) + self.margin * self.spread
        part = min(1.0, pages / self._crowd) if self._crowd else 1.0
        return self.quickest + part * (full - self.quickest)

    def left(self, stayed: float, crowd: int, output: int) -> None:
        """One that was let in with `crowd` pages held is done."""
        if not self._left:
            self.usual, self._output, self._crowd, self.quickest = stayed, output, crowd, stayed
            self.spread = SMOOTHING * stayed / 2
        else:
            self.spread += (abs(stayed - self.expected(output)) - self.spread) * SMOOTHING
            self._learn(output - self._output, stayed - self.usual)
            self._crowd += (crowd - self._crowd) * SMOOTHING
            self.quickest = min(stayed, self.quickest * FORGETTING)
        self._left += 1

    def _learn(self, longer: float, later: float) -> None:
        weight = max(TREND, 1 / (self._left + 1))
        self._variance += (longer * longer - self._variance) * weight
        self._covariance += (longer * later - self._covariance) * weight
        if self._left >= FEW and self._variance > 0:
            self.slope = max(0.0, self._covariance / self._variance)
        self._output += longer * SMOOTHING
        self.usual += later * SMOOTHING

    def judge(self, late: bool) -> None:
        """A deadline was missed, or met. At rest where one of 200 is missed."""
        self.margin = min(MOST_MARGIN, max(LEAST_MARGIN, self.margin + (MISSED if late else -MET)))
