"""Waiting after failures: for twice as long each time, until a try succeeds."""

from __future__ import annotations

from collections.abc import Callable

FIRST, LONGEST = 0.1, 60.0  # seconds


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

    def failed(self, why: str, least: float = 0.0) -> None:
        """A try failed. Those that were under way at that time count once. `least`: seconds to wait at least."""
        now = self._clock()
        if now >= self._until:
            self._until = now + max(least, self._seconds)
            self._seconds = min(LONGEST, 2 * self._seconds)
        self.trouble = why

    def passed(self) -> None:
        """A try succeeded."""
        if self.trouble:
            self.trouble, self._seconds = "", FIRST
