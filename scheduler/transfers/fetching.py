"""Which prefix a request had better get from another replica than compute: for whoever places requests by an index of
pages and has no time to ask replicas what they hold. A wrong guess costs a message, and what did not come is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from rayk.scheduler.router.prefix_index import PrefixIndex
from rayk.scheduler.transfers.copy_cost import Span, profitable_spans
from rayk.scheduler.transfers.links import LinkTable
from rayk.transport.choice import Endpoint

USUAL = 16  # pages of a copy by which a price is reckoned
NEWS = 0.1  # part by which a rate has to change


class CopyPlan(NamedTuple):
    """Pages start .. stop of a request's prefix are to come from `source` over a line of that kind."""

    source: int
    start: int
    stop: int
    kind: str


class CopyPlanner:
    """`shares_tiers`: replicas of one machine have a host tier in common, in which each finds what others cached."""

    def __init__(self, index: PrefixIndex, lines: LinkTable, page_size: int, shares_tiers: bool) -> None:
        self.lines = lines
        self._index = index
        self.page_size = page_size
        self.shares_tiers = shares_tiers
        self._stations: dict[int, Endpoint] = {}
        self._rates: dict[int, float] = {}

    def joined(self, replica: int, epoch: int, station: Endpoint) -> None:
        """A replica from which and to which pages can be copied."""
        self._stations[replica] = station
        self.lines.joined(replica, epoch, station)

    def left(self, replica: int) -> None:
        """It is gone, with what it had."""
        self._stations.pop(replica, None)
        self._rates.pop(replica, None)
        self.lines.left(replica)

    def prefills(self, replica: int, rate: float) -> bool:
        """A replica computes so many tokens of prompts in a second; whether that is news."""
        known = self._rates.get(replica, 0.0)
        if rate <= 0 or abs(rate - known) < NEWS * known:
            return False
        self._rates[replica] = rate
        return True

    def plan(self, target: int, keys: Sequence[int], without: Collection[int] = ()) -> CopyPlan | None:
        """What the request with these pages had better get from another replica than compute on `target`, if anything.

        Before the target's index has promises for it. While it is not known how fast the target computes, all that
        others hold. `without`: replicas that are not asked.
        """
        here = self._stations.get(target)
        if here is None or not self._index.known(keys):
            return None
        held = self._index.reach(keys).device.tolist()
        have, rate = held[target], self._rates.get(target)
        best, saved = None, 0.0
        for source, station in self._stations.items():
            if source == target or source in without or held[source] <= have:
                continue
            if self.shares_tiers and station.host == here.host:
                continue
            span = Span(source, have, held[source])
            seconds = self.lines.seconds(source, target, span.stop - have)
            if not profitable_spans([span], lambda _, s=seconds: s, self.page_size, rate):  # type: ignore[misc]  # mypy does not infer defaults
                continue
            gain = (span.stop - have) * self.page_size / (rate or 1.0) - (seconds if rate else 0.0)
            if gain > saved:
                best, saved = span, gain
        if best is None:
            return None
        return CopyPlan(best.replica, best.start, best.stop, self.lines.use(best.replica, target))

    @property
    def price(self) -> float:
        """What fetching a token costs, as a part of what computing it does: the mean over pairs, at most 1.

        1 while that is not known.
        """
        pairs = [(s, t) for s in self._stations for t in self._rates if s != t and t in self._stations]
        if not pairs:
            return 1.0
        tokens = USUAL * self.page_size
        shares = [min(1.0, self.lines.seconds(s, t, USUAL) * self._rates[t] / tokens) for s, t in pairs[:64]]
        return sum(shares) / len(shares)
