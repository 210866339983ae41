"""The cost policy: a request goes where placing it costs everybody least, reckoned in tokens of prefill.

    cost(r) = (waiting(r) + missing(r)) * (1 + requests(r) / STEP)     until its first token, beside what decodes there
            + loading(r)                                               tokens fetched from tiers and other replicas
            + CROWD * waiting(r) * missing(r) / usual                  what those who come after it wait longer
            + KEEP * second copies(r)                                  room taken from what only one replica holds
            + PRESSURE * tokens that do not fit                        it would have to wait for others to finish

waiting(r) are the tokens placed there and not prefilled yet, missing(r) those of the request that nobody can lend it,
usual the mean of missing over past choices. The first line alone is the shortest expected completion. It is selfish
in two ways, and the next lines make up for them:

* Computing what another replica holds keeps this replica from its next requests. How many these are shows in its
  queue: waiting(r) / usual of the usual ones.
* Pages that it stores a second time push out pages that nobody else has. A page with k holders counts 1/k of that: a
  system prompt that a few replicas hold is worth having everywhere, a conversation's history is not.

The weights were fitted by `python -m rayk.simulate.fit` on generated workloads, see docs/simulate.md.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rayk.scheduler.choice import Choice, Parts, Wish
from rayk.scheduler.fleet import Fleet, FloatArray, Int64Array
from rayk.scheduler.index import PrefixIndex, Span


class Weights(NamedTuple):
    """See the module. Prices are parts of what computing the tokens would cost; 1 or more: not worth fetching."""

    crowd: float = 0.5
    keep: float = 3.0
    pressure: float = 4.0
    step: float = 2048.0
    host_price: float = 0.1
    disk_price: float = 0.4
    peer_price: float = 1.0


DEFAULT_WEIGHTS = Weights()


class Cost:
    """See the module. Remembers one number, the usual number of tokens missing."""

    PAST = 0.01  # weight of the latest choice in what is usual

    def __init__(self, index: PrefixIndex, page_size: int, weights: Weights = DEFAULT_WEIGHTS) -> None:
        self._index, self._page_size, self._weights = index, page_size, weights
        self._usual = 0.0
        self._nothing = np.zeros(0), np.zeros(0, np.int64)  # for every replica, shared by the parts of many choices

    def choose(self, wish: Wish, fleet: Fleet) -> Choice:
        """See Policy. About 25 numpy calls over the replicas and a few dozen probes of the index; half of the calls
        and one probe for a request of which nobody has anything."""
        if not self._index.known(wish.keys):
            parts = self._fresh(wish, fleet)
            replica = fleet.lowest(parts.prefill + parts.crowd + parts.pressure)
        else:
            parts = self._parts(wish, fleet)
            replica = fleet.lowest(parts.cost)
        if replica >= 0:
            missing = float(wish.tokens - parts.cached[replica])
            self._usual += (missing - self._usual) * (self.PAST if self._usual else 1.0)
        return Choice(replica, parts)

    def _fresh(self, wish: Wish, fleet: Fleet) -> Parts:
        """_parts() where no replica has any of the pages."""
        weights, tokens, waiting = self._weights, wish.tokens, fleet.work.copy()
        if len(self._nothing[0]) != len(waiting):
            self._nothing = np.zeros(len(waiting)), np.zeros(len(waiting), np.int64)
            for array in self._nothing:
                array.flags.writeable = False
        nothing, none = self._nothing
        prefill = (waiting + tokens) * (1 + fleet.requests / weights.step)
        crowd = waiting * tokens * (weights.crowd / max(self._usual or tokens, 1.0))
        short = fleet.held + tokens - fleet.capacity
        pressure = weights.pressure * np.maximum(short, 0) if int(short.max()) > 0 else nothing
        return Parts(none, waiting, prefill, nothing, crowd, nothing, pressure)

    def _parts(self, wish: Wish, fleet: Fleet) -> Parts:
        weights, page = self._weights, self._page_size
        device, host, disk, spans = self._index.reach(wish.keys)
        cached = disk * page
        loading = np.zeros(len(fleet))
        if host is not device:
            loading += min(weights.host_price, 1.0) * page * (host - device)
        if disk is not host:
            loading += min(weights.disk_price, 1.0) * page * (disk - host)
        if weights.peer_price < 1 and spans:
            longest = np.full(len(fleet), spans[0].pages * page)
            loading += weights.peer_price * (longest - cached)
            cached = longest
        missing = wish.tokens - cached
        waiting = fleet.work
        prefill = (waiting + missing) * (1 + fleet.requests / weights.step)
        crowd = waiting * missing * (weights.crowd / max(self._usual or wish.tokens, 1.0))
        short = fleet.held + wish.tokens - fleet.capacity
        pressure = weights.pressure * np.maximum(short, 0)
        return Parts(cached, waiting.copy(), prefill, loading, crowd, self._keep(disk, spans), pressure)

    def _keep(self, own: Int64Array, spans: list[Span]) -> FloatArray:
        """The cost of storing pages `own`[r] .. spans[0].pages, which others hold, a second time: [replicas]."""
        if not spans or int(own.min()) == spans[0].pages:
            return np.zeros(len(own))
        depths, costs = [float(spans[0].pages)], [0.0]
        each = self._weights.keep * self._page_size
        for span, deeper in zip((*spans[1:], Span(0, 0)), spans, strict=True):
            depths.append(float(span.pages))
            costs.append(costs[-1] + (deeper.pages - span.pages) * each / deeper.holders)
        return np.interp(own, depths[::-1], costs[::-1])
