"""How busy a manager's replicas are, and how many there should be: what an autoscaling loop asks.

The loop is the user's (examples/autoscale.py): it takes a snapshot with replica_loads(), asks desired_replicas(), and
calls add_replicas() or drain_replica() and remove_replica(). On Ray every added replica is a placement group of its
own, which is what Ray's autoscaler starts nodes for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from rayk.params import require, require_at_least


class ReplicaLoad(NamedTuple):
    """One replica index. `state`: planned, starting, ready, draining, lost or removed, see rayk.scheduler.membership.

    `requests` are placed there; `waiting` tokens of them are still to be prefilled, `held` tokens is what their pages
    offer, of `capacity` tokens that all its pages do.
    """

    replica: int
    state: str
    requests: int
    waiting: int
    held: int
    capacity: int


class Drained(NamedTuple):
    """What draining came to so far: requests that are still there, and where others were moved."""

    left: list[str]
    moved: dict[str, int]


class Removed(NamedTuple):
    """What became of the pages of a removed replica: `cached` ones that it had, those of them that another replica was
    found to have (`known`), and those that others took (`taken`; two of them may have taken the same one).

    All 0 where nothing was offered: a lost replica, no prefix caching or no copies, or a tier that has the pages.
    """

    cached: int = 0
    known: int = 0
    taken: int = 0


class ScalePolicy(msgspec.Struct, frozen=True):
    """Between `least` and `most` replicas; as many as it takes to hold `full` of their pages and `queue` tokens that
    wait for prefill each. One goes when the others would then be at most `idle` (0..1) as busy as that."""

    least: int = 1
    most: int = 8
    full: float = 0.8
    queue: int = 16_384
    idle: float = 0.6

    def __post_init__(self) -> None:
        require_at_least(0, least=self.least)
        require_at_least(1, most=self.most, queue=self.queue)
        require(self.least <= self.most, f"least is {self.least}, more than most, {self.most}")
        require(0 < self.full <= 1, f"full is {self.full}; it is a part of the pages, above 0 and at most 1")
        require(0 < self.idle <= 1, f"idle is {self.idle}; it is above 0 and at most 1")


def desired_replicas(
    loads: Sequence[ReplicaLoad], policy: ScalePolicy, queued_tokens: int = 0, queued_requests: int = 0
) -> int:
    """How many replicas there should be. `queued_tokens`, of `queued_requests`, wait outside for admission.

    Replicas that are ready or on their way count as there; what drains is carried over to the others.
    """
    require_at_least(0, queued_tokens=queued_tokens, queued_requests=queued_requests)
    here = [load for load in loads if load.state in ("planned", "starting", "ready")]
    carried = [load for load in loads if load.state in ("ready", "draining")]
    size = max((load.capacity for load in carried), default=0)
    held = sum(load.held for load in carried) + queued_tokens
    waiting = sum(load.waiting for load in carried) + queued_tokens
    busy = max(held / (policy.full * size) if size else float(queued_requests > 0), waiting / policy.queue)
    wanted = math.ceil(busy)
    if wanted < len(here) and busy > policy.idle * (len(here) - 1):
        wanted = len(here)  # or it would come back soon
    elif wanted < len(here):
        wanted = max(wanted, len(here) - 1)
    return min(max(wanted, policy.least), policy.most)
