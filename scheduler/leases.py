"""Which drivers are alive: each has a lease, which ends when nothing was heard of it for as long.

Only time in which the scheduler ran counts. tick() is called every TICK_SECONDS or so; of a longer gap, in which the
scheduler stood still (a stopped process, a paused machine, a long collection of garbage) and could hear nobody, no more
than LONGEST_TICK counts. So a driver that lives renews its lease first, however long that took.
The clock is given.
"""

from __future__ import annotations

from collections.abc import Callable

TICK_SECONDS = 0.25
LONGEST_TICK = 1.0


class Leases:
    """`clock` in seconds. Drivers are called by the names that their messages bear."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._ran = 0.0  # seconds that the scheduler ran
        self.drivers: dict[str, float] = {}
        """Drivers that have a lease, or had one and did not leave; seconds that each may be silent."""
        self._heard: dict[str, float] = {}  # how long the scheduler had run when a driver was heard of last
        self._ended: set[str] = set()

    @property
    def living(self) -> int:
        """Drivers whose leases have not ended."""
        return len(self.drivers) - len(self._ended)

    def connect(self, driver: str, seconds: float) -> None:
        """From now on the driver must not be silent for longer than that."""
        self.drivers[driver] = seconds
        self.heard(driver)

    def heard(self, driver: str) -> None:
        """The driver sent a message: it lives, and what it claims from now on has a lease again."""
        if driver in self.drivers:
            self._ended.discard(driver)
            self._heard[driver] = self._ran

    def renew(self, driver: str) -> bool:
        """The driver says that it lives. False when it has no lease any more: what it had claimed is released."""
        if driver not in self.drivers or driver in self._ended:
            return False
        self._heard[driver] = self._ran
        return True

    def leave(self, driver: str) -> None:
        """The driver is gone."""
        self.drivers.pop(driver, None)
        self._heard.pop(driver, None)
        self._ended.discard(driver)

    def tick(self) -> list[str]:
        """Let time pass; the drivers whose leases end now, each once."""
        now = self._clock()
        self._ran += min(max(0.0, now - self._last), LONGEST_TICK)
        self._last = now
        late = [d for d, s in list(self.drivers.items()) if d not in self._ended and self._heard[d] + s < self._ran]
        self._ended.update(late)
        return late
