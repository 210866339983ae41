"""What a routing policy is asked and what it answers, with the reasons if it goes by costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from rayk.scheduler.router.replica_loads import FloatArray, Int64Array, ReplicaLoads


class CostTerms(NamedTuple):
    """What a choice was made from: [replicas] tokens each, cost is the sum. `cached` and `waiting` are facts, not
    costs."""

    cached: Int64Array
    waiting: FloatArray
    prefill: FloatArray
    fetch: FloatArray
    queueing: FloatArray
    duplication: FloatArray
    eviction: FloatArray
    pressure: FloatArray

    @property
    def cost(self) -> FloatArray:
        """The sum of the costs, [replicas]."""
        return self.prefill + self.fetch + self.queueing + self.duplication + self.eviction + self.pressure

    def candidates(self, chosen: int, count: int = 8) -> list[Candidate]:
        """The chosen replica and the cheapest others, cheapest first, at most `count` of them."""
        cost = self.cost
        order: list[int] = np.argsort(cost, kind="stable")[:count].tolist()
        if chosen not in order:
            order[-1:] = [chosen]
        return [Candidate(r, float(cost[r]), *(float(part[r]) for part in self)) for r in order]


class Candidate(msgspec.Struct, frozen=True):
    """One replica's parts in a choice, in tokens; see CostTerms."""

    replica: int
    cost: float
    cached: float
    waiting: float
    prefill: float
    fetch: float
    queueing: float
    duplication: float
    eviction: float
    pressure: float


class RouteRequest(msgspec.Struct, frozen=True, gc=False):
    """A request to be placed. `keys`: of the full pages that it may reuse, in order, never its last token's."""

    tokens: int
    keys: Sequence[int] = ()
    session: str | None = None


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where to place a request, -1 when no replica takes any. `cached` are tokens of it that need not be computed
    there, as far as the policy looked. `why` computes the reasons again, as they were, if there are costs."""

    replica: int
    cached: int = 0
    why: Callable[[], CostTerms] | None = None

    @property
    def parts(self) -> CostTerms | None:
        """What the choice was made from; None if the policy does not go by costs."""
        return self.why() if self.why is not None else None


class Policy(Protocol):
    """Chooses; may remember what it chose, nothing else."""

    def choose(self, request: RouteRequest, loads: ReplicaLoads) -> Decision:
        """The replica for `request`, among those that are ready."""
        ...
