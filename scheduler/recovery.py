"""A scheduler's second life: what it knew and nobody else does is kept outside of it, and the rest is asked for.

    Kept        written down whenever it changes: who is a member and how each stands, the target, leases, the owner
    ClaimSeen   what a replica says of a claim that it has; the books are made of these
    Rejoin      what a driver says of its claims: those that it was never told of are taken back, those that are gone
                are named

The index of pages needs nothing: a replica tells all that it has cached to a scheduler that knows nothing of it. Claims
get their numbers from the time on at which the scheduler began, so that none is given out twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayk import protocol as m
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.membership import Membership, State
from rayk.scheduler.router.router import Router
from rayk.scheduler.script import Script

GIVEN_OUT = 10**12  # more numbers than one scheduler gives out


class ClaimSeen(NamedTuple):
    """A claim as its replica has it; `tokens` are those that its pages hold."""

    request_id: str
    client: str
    generation: int
    tokens: int


@dataclass(frozen=True)
class Kept:
    """`roster` is what drivers attach by, and all that there is at first. `schedulers` are the names of those that came
    before: replicas do nothing any more that they say. Reset tokens and counters of removed replicas are as in
    SchedulerCore."""

    roster: Any
    epochs: list[int]
    states: list[str]
    target: int | None = None
    leaving: list[int] = field(default_factory=list)
    owner: str = ""
    leases: dict[str, float] = field(default_factory=dict)
    reset: bytes | None = None
    left: Any = None
    schedulers: list[str] = field(default_factory=list)


def keep(core: SchedulerCore, roster: Any, schedulers: Sequence[str]) -> Kept:
    """What is to be written down now."""
    members, supervisor = core.members, core.supervisor
    states, leases = list(map(str, members.states)), dict(core.leases.drivers)
    more = (core.lifecycle.target, supervisor.leaving, core.owner, leases, core.reset, core.left)
    return Kept(roster, list(members.epochs), states, *more, list(schedulers))


def restore(core: SchedulerCore, kept: Kept, born: int) -> None:
    """Have a new core, which began at `born`, go on with what was kept."""
    restore_members(core.members, core.router, kept.states, kept.epochs, born)
    core.placer.generations = itertools.count(born)
    core.owner, core.reset = kept.owner, kept.reset
    core.left = kept.left if kept.left is not None else core.left
    core.supervisor.restore(kept.target, kept.leaving)
    for driver, seconds in kept.leases.items():
        core.leases.connect(driver, seconds)
    core.born = born


def born_after(before: int, now: int) -> int:
    """When a scheduler began whose predecessor began at `before`, in microseconds: it is above all numbers that the
    latter gave out from there on, one in a microsecond at most, also where the clock was put back meanwhile."""
    return now if now > before else before + GIVEN_OUT


def restore_members(
    members: Membership, router: Router, states: Sequence[str], epochs: Sequence[int], born: int
) -> None:
    """Have the members, and the router of these, stand as was kept; `born` is above all versions that there were."""
    members.restore([_settled(*each) for each in zip(states, epochs, strict=True)], epochs, born)
    while len(router.loads) < len(members):
        router.join()
    for r in range(len(members)):
        if r not in members.here:
            router.lost(r)
        elif members.state(r) is State.draining:
            router.cordon(r)


def claim_again(core: SchedulerCore, claims: Mapping[int, Sequence[ClaimSeen] | None]) -> None:
    """Put the claims of each replica that is there into the books; None of one that did not answer."""
    core.unheard = {r: core.members.epochs[r] for r, seen in claims.items() if seen is None}
    for r, seen in claims.items():
        for claim in seen or ():
            if core.placer.holder(claim.request_id) is None:
                _put(core, claim.client, claim.request_id, claim.generation, r, claim.tokens)


def _settled(state: str, epoch: int) -> State:
    """How a replica stands whose driver, if it was being started, has to begin again."""
    if state in (State.planned, State.starting):
        return State.lost if epoch else State.removed
    return State.ready if state == State.silent else State(state)


def _put(core: SchedulerCore, client: str, request_id: str, generation: int, replica: int, tokens: int) -> None:
    core.placer.put(request_id, replica, tokens)
    core.placer.adopt((client, generation), request_id, replica)


def rejoin(core: SchedulerCore, client: str, command: m.Rejoin) -> Script:
    """A driver goes on with a scheduler that began anew: where each of its claims is, -1 for those that are gone. What
    an earlier scheduler had claimed for it, and it was never told of, is released."""
    placer = core.placer
    if command.lease_seconds is not None:
        core.leases.connect(client, command.lease_seconds)
    if command.owner:
        core.owner = client
    members = core.members
    unheard = [r for r in members.here if core.unheard.get(r) == members.epochs[r]]  # and no other there since
    found = []
    for request_id, replica, generation in zip(command.ids, command.replicas, command.generations, strict=True):
        [owner] = placer.owners_of([request_id])
        holder = placer.holder(request_id)
        if holder is not None and owner == (client, generation):
            replica = holder
        elif holder is None and replica in unheard:
            _put(core, client, request_id, generation, replica, 0)
        else:
            replica = -1
        found.append(replica)
    told = dict(zip(command.ids, command.generations, strict=True))
    strays = {
        request_id: owner
        for request_id, owner in placer.owned_by(client).items()
        if owner[1] < core.born and told.get(request_id) != owner[1]
    }
    yield from placer.take_back(strays)
    return m.Located(found)
