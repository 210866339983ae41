"""Time, where a run has its own: when requests are sent, and how long a replica prefills.

    Arrivals   requests are sent as recorded, so many times as fast, at the moments at which `rayk simulate` has them
    Prefill    a replica prefills at a fixed rate, one request after the other, while its decoding requests go on

Both only say when; the driver waits.
"""

from __future__ import annotations

from rayk.bench.request import Workload


class Arrivals:
    """The order in which the requests of a workload are sent, and when: seconds from the start of the run."""

    def __init__(self, workload: Workload, speed: float, seed: int) -> None:
        from rayk.simulate.arrivals import arrivals  # it imports this package

        order, times = arrivals(workload, seed)
        self.order: list[int] = order.tolist()
        self.times: list[float] = (times / speed).tolist()


class Prefill:
    """One replica's prefill clock: `rate` tokens a second. Times are the driver's."""

    __slots__ = ("_free_at", "_rate")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    def due(self, tokens: int, ready_at: float) -> float:
        """When the next one will be done: `tokens` tokens that could begin at `ready_at`. A driver that comes late does
        not delay those behind."""
        return max(self._free_at, ready_at) + tokens / self._rate

    def done(self, at: float) -> None:
        """The next one was done at that moment, which due() said."""
        self._free_at = at
