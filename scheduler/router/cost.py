"""The cost policy: a request goes where placing it costs everybody least, in tokens of prefill.

    cost(r) = (waiting(r) + missing(r)) * (1 + requests(r) / STEP)     until its first token, beside what decodes there
            + fetch(r)                                                 tokens fetched from tiers and other replicas
            + QUEUEING * waiting(r) * missing(r) / usual               what those who come after it wait longer
            + DUPLICATION * second copies(r) - regret                  room taken from what only one replica holds
            + EVICTION * missing(r) * outflow(r) / mean inflow         what storing it pushes out before its time
            + PRESSURE * tokens that do not fit                        it would have to wait for others to finish

waiting(r) are the tokens placed there and not prefilled yet, missing(r) those of the request that nobody can lend it,
usual the mean of missing over past choices. The first line alone is the shortest expected completion. It is selfish
in three ways, and the next lines make up for them:

* Computing what another replica holds keeps this replica from its next requests. How many these are shows in its
  queue: waiting(r) / usual of the usual ones.
* Pages that it stores a second time push out pages that nobody else has. A page with k holders counts 1/k of that: a
  system prompt that a few replicas hold is worth having everywhere, a conversation's history is not.
* Pages leave a full cache the sooner the more it takes in. inflow(r) are the missing tokens of the latest choices that
  fell on r, each choice counting less by 1 / (LONG * replicas), outflow(r) those that came when r had taken in as
  much as it holds: who took in much lately throws away what is still in use, and who has room nothing.

A second copy costs once and serves all who come later, which one request cannot know. So what they wait for want of
one is added up: regret are the tokens that those who asked for the same prefix stood behind at its holders, more than
they would have on the idlest replica. When it has reached the price of a copy, the copy is free, is made where it
helps, and the regret begins anew: all that is lost by waiting is at most what a copy costs (as one rents skis until
the rent has reached their price). Regret fades by 1/e in SHORT * replicas choices, so that only a prefix of which a
replica cannot serve all that comes gets there.

The weights were fitted by `python -m rayk.simulate.fit` on generated workloads, see docs/simulate.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import numpy as np

from rayk.scheduler.router.policy import CostTerms, Decision, RouteRequest
from rayk.scheduler.router.prefix_index import PrefixIndex, Reach, Span
from rayk.scheduler.router.replica_loads import FloatArray, Int64Array, ReplicaLoads

FEW = 12  # replicas that are computed one by one: numpy over so few numbers costs more than the numbers
LONG = 30.0  # choices a replica that count in its inflow and outflow
SHORT = 2.0  # choices a replica in which a regret fades
REGRETTED = 16_384  # prefixes whose regret is known; of more, the one that was asked for longest ago is forgotten


class Weights(NamedTuple):
    """See the module. Prices are parts of what computing the tokens would cost; 1 or more: not worth fetching."""

    queueing: float = 0.5
    duplication: float = 2.5
    eviction: float = 0.3
    pressure: float = 4.0
    step: float = 2048.0
    host_price: float = 0.1
    disk_price: float = 0.4
    peer_price: float = 1.0


DEFAULT_WEIGHTS = Weights()


class _Seen(msgspec.Struct, frozen=True, gc=False):
    """What a choice was made from, in as little room as that takes: thousands are kept, hardly any is ever asked for.

    Calling it does the sums again. `loads` is ReplicaLoads.snapshot(), `outflow` raw float64 [replicas]. `eviction`
    is the cost of storing a token by outflow, `queueing` that of a token beside one that waits.
    """

    policy: Cost
    tokens: int
    reach: Reach | None
    loads: bytes
    outflow: bytes
    eviction: float
    queueing: float
    regret: float

    def __call__(self) -> CostTerms:
        return self.policy._terms(self)


class Cost:
    """See the module. Remembers what is usual, the flows, and the regrets."""

    wants_keys = True
    weighs_running = True
    PAST = 0.01  # weight of the latest choice in what is usual

    def __init__(self, index: PrefixIndex, page_size: int, weights: Weights = DEFAULT_WEIGHTS) -> None:
        self._index, self._page_size, self._weights = index, page_size, weights
        self._usual = 0.0
        self._taken: list[float] = []  # tokens that each replica ever had to store
        self._outflow = np.zeros(0)  # in units that shrink, so that a choice changes one number
        self._growth = 1.0  # of what the latest choice counts
        self._inflow = 0.0  # of all replicas
        self._unit = 1.0
        self._turn = 0  # choices made
        self._regrets: OrderedDict[int, tuple[float, int]] = OrderedDict()  # last shared page: tokens, at which turn

    def reprice(self, peer_price: float) -> None:
        """Copying from other replicas costs so much now."""
        self._weights = self._weights._replace(peer_price=peer_price)

    def choose(self, request: RouteRequest, loads: ReplicaLoads) -> Decision:
        """See Policy. A few operations a replica if there are few of them; else about 25 numpy calls over the replicas
        and a few dozen probes of the index, half of the calls and one probe for a request of which nobody has
        anything."""
        reach, regret, tokens = None, 0.0, request.tokens
        if self._index.known(request.keys):
            reach = self._index.reach(request.keys)
            regret = self._regret(request, reach)
        seen = self._see(tokens, loads, reach, regret)
        among = self._among_few if len(self._taken) <= FEW else self._among_many
        replica, cached = among(seen, loads)
        if replica >= 0:
            self._learn(replica, request, tokens - cached, loads, reach, regret)
        return Decision(replica, cached, seen)

    # -- what is remembered ------------------------------------------------------------------------

    def _regret(self, request: RouteRequest, reach: Reach) -> float:
        """That of the longest prefix of the request that anybody holds, in tokens."""
        if not self._regrets or not reach.spans:
            return 0.0
        regret, turn = self._regrets.get(request.keys[reach.spans[0].pages - 1], (0.0, 0))
        return regret * math.exp((turn - self._turn) / (SHORT * len(reach.disk))) if regret else 0.0

    def _see(self, tokens: int, loads: ReplicaLoads, reach: Reach | None, regret: float) -> _Seen:
        weights, replicas, inflow, usual = self._weights, len(self._taken), self._inflow, self._usual or tokens
        if replicas < len(loads.prefill_backlog):
            new, replicas = len(loads) - replicas, len(loads)
            self._taken += [0.0] * new
            self._outflow = np.append(self._outflow, np.zeros(new))
            self._growth = 1 + 1 / (LONG * replicas)
        eviction = weights.eviction * replicas / (inflow if inflow > 1.0 else 1.0)
        queueing = weights.queueing / (usual if usual > 1.0 else 1.0)
        return _Seen(self, tokens, reach, loads.snapshot(), self._outflow.tobytes(), eviction, queueing, regret)

    def _learn(
        self,
        replica: int,
        request: RouteRequest,
        missing: float,
        loads: ReplicaLoads,
        reach: Reach | None,
        regret: float,
    ) -> None:
        """A request was placed, and `missing` tokens will be stored there."""
        usual, unit, taken = self._usual, self._unit, self._taken[replica] + missing
        self._usual = usual + (missing - usual) * (self.PAST if usual else 1.0)
        self._inflow += missing * unit
        self._taken[replica] = taken
        if taken > loads.limit(replica):
            self._outflow[replica] += missing * unit
        self._unit = unit * self._growth
        if self._unit > 1e30:
            self._outflow /= self._unit
            self._inflow /= self._unit
            self._unit = 1.0
        self._turn += 1
        if reach is None or not reach.spans:
            return
        longest, regrets = reach.spans[0].pages, self._regrets
        key = request.keys[longest - 1]
        if reach.disk[replica] < longest:
            regrets.pop(key, None)  # there is a copy more
            return
        idle = loads.lowest(loads.prefill_backlog, fair=False)
        longer = float(loads.prefill_backlog[replica] - loads.prefill_backlog[idle])
        if longer > 0:
            regrets[key] = regret + longer, self._turn
            regrets.move_to_end(key)
            if len(regrets) > REGRETTED:
                regrets.popitem(last=False)

    # -- the sums ----------------------------------------------------------------------------------

    def _among_few(self, seen: _Seen, loads: ReplicaLoads) -> tuple[int, int]:
        """The cheapest replica and what it need not compute: the same sums in the same order as in _terms, one number
        after the other."""
        tokens, eviction, queueing, step = float(seen.tokens), seen.eviction, seen.queueing, self._weights.step
        numbers, replicas, flows, cached = loads.numbers(seen.loads), len(self._taken), self._outflow.tolist(), None
        backlog, requests = numbers[:replicas], numbers[replicas : 2 * replicas]
        if seen.reach is not None:
            cached, fetch, duplication = self._lent(seen.reach, seen.regret)
            costs = [
                (w + (tokens - c)) * (1 + r / step)
                + f
                + w * (tokens - c) * queueing
                + k
                + (tokens - c) * (o * eviction)
                for w, r, c, f, k, o in zip(backlog, requests, cached, fetch, duplication, flows, strict=True)
            ]
        else:
            costs = [
                (w + tokens) * (1 + r / step) + w * tokens * queueing + tokens * (o * eviction)
                for w, r, o in zip(backlog, requests, flows)  # noqa: B905  # to check that costs a tenth of it
            ]
        if not loads.fits_everywhere(seen.tokens):
            held, capacity = numbers[2 * replicas : 3 * replicas], numbers[3 * replicas :]
            pressure = self._weights.pressure
            costs = [
                cost + pressure * max(h + seen.tokens - c, 0) for cost, h, c in zip(costs, held, capacity, strict=True)
            ]
        replica = loads.cheapest(costs)
        return replica, cached[replica] if cached is not None else 0

    def _lent(self, reach: Reach, regret: float) -> tuple[list[int], list[float], list[float]]:
        """For each replica what it need not compute, and the costs of fetching that and of keeping the rest."""
        if reach.disk is not reach.device or self._weights.peer_price < 1:
            lent, fetching = self._fetch(reach)
            cached, fetch = lent.tolist(), fetching.tolist()
        else:
            cached = (reach.device * self._page_size).tolist()
            fetch = [0.0] * len(cached)
        own = reach.disk.tolist()
        if not reach.spans or min(own) == reach.spans[0].pages:
            return cached, fetch, [0.0] * len(own)
        knots = dict(zip(*self._knots(reach.spans, regret), strict=True))
        return cached, fetch, [knots[pages] for pages in own]

    def _among_many(self, seen: _Seen, loads: ReplicaLoads) -> tuple[int, int]:
        """_among_few() in arrays, with what is nothing left out."""
        weights, backlog, reach, cached, fetch = self._weights, loads.prefill_backlog, seen.reach, None, None
        missing: Any = seen.tokens
        if reach is not None:
            cached, fetch = self._fetch(reach)
            missing = seen.tokens - cached
        cost: FloatArray = (backlog + missing) * (1 + loads.requests / weights.step)
        if fetch is not None:
            cost += fetch
        cost += backlog * missing * seen.queueing
        if reach is not None:
            cost += self._duplication(reach, seen.regret)
        cost += missing * (self._outflow * seen.eviction)
        short = loads.held + seen.tokens - loads.capacity
        if int(short.max()) > 0:
            cost += weights.pressure * np.maximum(short, 0)
        replica = loads.lowest(cost)
        return replica, int(cached[replica]) if cached is not None else 0

    def _terms(self, seen: _Seen) -> CostTerms:
        """All of the formula, from what a choice looked at."""
        weights, tokens, reach = self._weights, seen.tokens, seen.reach
        waiting, requests, held, capacity = ReplicaLoads.from_snapshot(seen.loads)
        if reach is None:
            nothing = np.zeros(len(waiting), np.int64)
            reach = Reach(nothing, nothing, nothing, [])
        cached, fetch = self._fetch(reach)
        missing = tokens - cached
        return CostTerms(
            cached=cached,
            waiting=waiting,
            prefill=(waiting + missing) * (1 + requests / weights.step),
            fetch=fetch,
            queueing=waiting * missing * seen.queueing,
            duplication=self._duplication(reach, seen.regret),
            eviction=missing * (np.frombuffer(seen.outflow) * seen.eviction),
            pressure=weights.pressure * np.maximum(held + tokens - capacity, 0),
        )

    def _fetch(self, reach: Reach) -> tuple[Int64Array, FloatArray]:
        """Tokens that need not be computed, and the cost of having them fetched: [replicas] each."""
        weights, page = self._weights, self._page_size
        device, host, disk, spans = reach
        cached, fetch = disk * page, np.zeros(len(disk))
        if host is not device:
            fetch += min(weights.host_price, 1.0) * page * (host - device)
        if disk is not host:
            fetch += min(weights.disk_price, 1.0) * page * (disk - host)
        if weights.peer_price < 1 and spans:
            longest = np.full(len(disk), spans[0].pages * page)
            fetch += weights.peer_price * (longest - cached)
            cached = longest
        return cached, fetch

    def _duplication(self, reach: Reach, regret: float) -> FloatArray:
        """The cost of storing what others hold a second time: [replicas]."""
        own, spans = reach.disk, reach.spans
        if not spans or int(own.min()) == spans[0].pages:
            return np.zeros(len(own))
        depths, costs = self._knots(spans, regret)
        by_pages = np.empty(depths[0] + 1)
        by_pages[depths] = costs
        return by_pages[own]

    def _knots(self, spans: list[Span], regret: float) -> tuple[list[int], list[float]]:
        """How many pages a replica may hold, from the most to none (nobody holds a number between them), and what
        keeping the others would cost it: what is regretted is paid already, up to all that computing them costs."""
        depths, costs, copies = [spans[0].pages], [0.0], 0.0
        each = self._weights.duplication * self._page_size
        for span, deeper in zip((*spans[1:], Span(0, 0)), spans, strict=True):
            copies += (deeper.pages - span.pages) * each / deeper.holders
            depths.append(span.pages)
            costs.append(max(copies - regret, (span.pages - depths[0]) * self._page_size) if regret else copies)
        return depths, costs
