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

from collections.abc import Sequence
from functools import partial
from operator import sub
from typing import Any, NamedTuple

import numpy as np

from rayk.scheduler.choice import Choice, Parts, Wish
from rayk.scheduler.fleet import Fleet, FloatArray, Int64Array
from rayk.scheduler.index import PrefixIndex, Reach, Span

FEW = 12  # replicas that are reckoned one by one: numpy over so few numbers costs more than the numbers


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
        """See Policy. A few operations a replica if there are few of them; else about 25 numpy calls over the replicas
        and a few dozen probes of the index, half of the calls and one probe for a request of which nobody has
        anything."""
        known = self._index.known(wish.keys)
        if len(fleet.work) <= FEW:
            choice = self._among_few(wish, fleet, known)
        else:
            parts = self._parts(wish, fleet) if known else self._fresh(wish, fleet)
            replica = fleet.lowest(parts.cost if known else parts.prefill + parts.crowd + parts.pressure)
            choice = Choice(replica, int(parts.cached[replica]), lambda: parts)
        if choice.replica >= 0:
            missing = float(wish.tokens - choice.cached)
            self._usual += (missing - self._usual) * (self.PAST if self._usual else 1.0)
        return choice

    def _among_few(self, wish: Wish, fleet: Fleet, known: bool) -> Choice:
        """The same sums in the same order, one number after the other. The parts are reckoned when somebody asks."""
        weights, tokens, usual = self._weights, wish.tokens, self._usual
        work, requests = fleet.work.tolist(), fleet.requests.tolist()
        held, capacity = fleet.held.tolist(), fleet.capacity.tolist()
        weight, step = weights.crowd / max(usual or tokens, 1.0), weights.step
        reach, cached = None, None
        if known:
            reach = self._index.reach(wish.keys)
            cached, loading, keep = self._lent(reach)
            costs = [
                (w + (tokens - c)) * (1 + r / step) + f + w * (tokens - c) * weight + k
                for w, r, c, f, k in zip(work, requests, cached, loading, keep, strict=True)
            ]
        else:
            costs = [(w + tokens) * (1 + r / step) + w * tokens * weight for w, r in zip(work, requests, strict=True)]
        if max(map(sub, held, capacity)) + tokens > 0:
            costs = [
                cost + weights.pressure * max(h + tokens - c, 0)
                for cost, h, c in zip(costs, held, capacity, strict=True)
            ]
        replica = fleet.cheapest(costs)
        why = partial(self._reckon, tokens, reach, (work, requests, held, capacity), usual)
        return Choice(replica, cached[replica] if cached is not None else 0, why)

    def _lent(self, reach: Reach) -> tuple[list[int], list[float], list[float]]:
        """For each replica what it need not compute, and the costs of fetching that and of keeping the rest."""
        if reach.disk is not reach.device or self._weights.peer_price < 1:
            lent, fetching = self._loading(reach)
            cached, loading = lent.tolist(), fetching.tolist()
        else:
            cached = (reach.device * self._page_size).tolist()
            loading = [0.0] * len(cached)
        own = reach.disk.tolist()
        if not reach.spans or min(own) == reach.spans[0].pages:
            return cached, loading, [0.0] * len(own)
        knots = dict(zip(*self._knots(reach.spans), strict=True))  # nobody holds a number of pages between them
        return cached, loading, [knots[pages] for pages in own]

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
        """All of the formula, whatever is known of the request."""
        loads = (fleet.work, fleet.requests, fleet.held, fleet.capacity)
        return self._reckon(wish.tokens, self._index.reach(wish.keys), loads, self._usual)

    def _reckon(self, tokens: int, reach: Reach | None, loads: Sequence[Any], usual: float) -> Parts:
        """_parts() from what it looks at."""
        weights = self._weights
        waiting = np.array(loads[0], np.float64)
        requests, held, capacity = (np.asarray(each, np.int64) for each in loads[1:])
        if reach is None:
            nothing = np.zeros(len(waiting), np.int64)
            reach = Reach(nothing, nothing, nothing, [])
        cached, loading = self._loading(reach)
        missing = tokens - cached
        prefill = (waiting + missing) * (1 + requests / weights.step)
        crowd = waiting * missing * (weights.crowd / max(usual or tokens, 1.0))
        pressure = weights.pressure * np.maximum(held + tokens - capacity, 0)
        return Parts(cached, waiting, prefill, loading, crowd, self._keep(reach.disk, reach.spans), pressure)

    def _loading(self, reach: Reach) -> tuple[Int64Array, FloatArray]:
        """Tokens that need not be computed, and the cost of having them fetched: [replicas] each."""
        weights, page = self._weights, self._page_size
        device, host, disk, spans = reach
        cached, loading = disk * page, np.zeros(len(disk))
        if host is not device:
            loading += min(weights.host_price, 1.0) * page * (host - device)
        if disk is not host:
            loading += min(weights.disk_price, 1.0) * page * (disk - host)
        if weights.peer_price < 1 and spans:
            longest = np.full(len(disk), spans[0].pages * page)
            loading += weights.peer_price * (longest - cached)
            cached = longest
        return cached, loading

    def _keep(self, own: Int64Array, spans: list[Span]) -> FloatArray:
        """The cost of storing pages `own`[r] .. spans[0].pages, which others hold, a second time: [replicas]."""
        if not spans or int(own.min()) == spans[0].pages:
            return np.zeros(len(own))
        depths, costs = self._knots(spans)
        return np.interp(own, depths[::-1], costs[::-1])

    def _knots(self, spans: list[Span]) -> tuple[list[int], list[float]]:
        """How many pages a replica may hold, from the most to none, and what keeping the others would cost it."""
        depths, costs = [spans[0].pages], [0.0]
        each = self._weights.keep * self._page_size
        for span, deeper in zip((*spans[1:], Span(0, 0)), spans, strict=True):
            depths.append(span.pages)
            costs.append(costs[-1] + (deeper.pages - span.pages) * each / deeper.holders)
        return depths, costs
