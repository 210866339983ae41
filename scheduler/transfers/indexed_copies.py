"""Prefix copies planned by an index of pages, for a Cluster, which has no time to ask replicas what they hold. A wrong
guess costs a message."""

from __future__ import annotations

from collections.abc import Sequence

from rayk.scheduler.router.prefix_index import PrefixIndex
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Endpoint

USUAL = 16  # pages of a copy whose price is that of all
CHANGE = 0.1  # part by which a rate has to change to be noted


class CopyPlanner:
    """`shares_tiers`: replicas of one machine have a host tier in common, in which each finds what others cached."""

    def __init__(self, index: PrefixIndex, transfers: PageTransfers, shares_tiers: bool) -> None:
        self.transfers = transfers
        self.links = transfers.links
        self._index = index
        self.shares_tiers = shares_tiers
        self._endpoints: dict[int, Endpoint] = {}
        self._rates: dict[int, float] = {}

    def joined(self, replica: int, epoch: int, endpoint: Endpoint) -> None:
        """A replica from which and to which pages can be copied."""
        self._endpoints[replica] = endpoint
        self.links.joined(replica, epoch, endpoint)

    def left(self, replica: int) -> None:
        """It is gone, with what it had."""
        self._endpoints.pop(replica, None)
        self._rates.pop(replica, None)
        self.links.left(replica)

    def prefills(self, replica: int, rate: float) -> bool:
        """A replica computes so many tokens of prompts in a second; whether that changes prices."""
        known = self._rates.get(replica, 0.0)
        if rate <= 0 or abs(rate - known) < CHANGE * known:
            return False
        self._rates[replica] = rate
        return True

    def plan(self, target: int, keys: Sequence[int]) -> list[Span]:
        """What the request with these pages gets from other replicas than `target`; before the index has promises for
        it there."""
        here = self._endpoints.get(target)
        if here is None or not self._index.known(keys):
            return []
        held = self._index.reach(keys).device.tolist()
        have = held[target]
        for replica in range(len(held)):
            endpoint = self._endpoints.get(replica)
            if endpoint is None or (self.shares_tiers and endpoint.host == here.host):
                held[replica] = 0
        return self.transfers.plan(target, held, have, len(keys), self._rates.get(target))

    @property
    def price(self) -> float:
        """What fetching a token costs, as a part of what computing it does: the mean over pairs, at most 1.

        1 while that is not known.
        """
        pairs = [(s, t) for s in self._endpoints for t in self._rates if s != t and t in self._endpoints]
        if not pairs:
            return 1.0
        tokens = USUAL * self.transfers.page_size
        shares = [min(1.0, self.links.seconds(s, t, USUAL) * self._rates[t] / tokens) for s, t in pairs[:64]]
        return sum(shares) / len(shares)
