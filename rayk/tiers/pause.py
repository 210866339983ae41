"""Waiting after failures: twice as long each time, but never long for what costs little to try again."""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST, LONGEST = 0.1, 60.0  # seconds
SHORTEST = 0.01
SHARE = 100  # a failed try takes at most one part in so many of the time


class Pause:
    """`trouble` says what failed last, "" once something succeeded. `what`: for messages."""

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self.what = what
        self.trouble = ""
        self._clock = clock
        self._seconds = FIRST
        self._until = 0.0

    @property
    def over(self) -> bool:
        """Whether to try."""
        return not self.trouble or self._clock() >= self._until

    def failed(self, why: str, took: float = math.inf, least: float = 0.0) -> None:
        """A try failed after `took` seconds. Those that were under way at that time count once.

        The pause doubles with each failure, up to a hundred times what the try cost: a disk that refuses at once (full,
        read-only, no file descriptors) is asked again within milliseconds, one that hangs is left alone for long.
        `least`: seconds to wait at least.
        """
        now = self._clock()
        if now >= self._until:
            self._until = now + max(least, min(self._seconds, max(SHORTEST, SHARE * took)))
            self._seconds = min(LONGEST, 2 * self._seconds)
        self.trouble = why

    def passed(self) -> None:
        """A try succeeded."""
        if self.trouble:
            self.trouble, self._seconds = "", FIRST
