"""Who belongs to a cluster and how it stands: one state for each replica index, changed by events only.

    planned    the index is taken, its place is asked for        starting   it has a place, its process comes up
    ready      it takes requests                                 draining   it finishes or hands over what it has
    lost       its process died; it can be replaced or removed   removed    nobody is there; the index stays a hole
    silent     ready or draining, but its process does not answer: it gets nothing new until it does, and can be removed

MOVES says what each event does to each state; any other pair is refused with the state unchanged. Indices are never
reused for another replica, except a lost one's for its replacement and one at which nobody ever was ready. Pure: no
Ray, no clock. The scheduler's core owns one and tells router, index and placements of each event; drivers see by
`version` that theirs is out of date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rayk.errors import ConfigError, IntegrityError, ReplicaIndexError, ReplicaRemovedError, ReplicaStateError


class State(StrEnum):
    """How a replica stands; see the module."""

    planned = "planned"
    starting = "starting"
    ready = "ready"
    draining = "draining"
    lost = "lost"
    removed = "removed"
    silent = "silent"


class Event(StrEnum):
    """What happens to a replica. `fail`: it could not be started. `enter`: it has answered and takes requests."""

    plan = "be planned"
    start = "start"
    fail = "fail to start"
    enter = "enter"
    drain = "drain"
    resume = "resume"
    lose = "be lost"
    remove = "be removed"


MOVES: dict[tuple[State, Event], State] = {
    (State.removed, Event.plan): State.planned,  # only where nobody ever was, see Membership.enlist()
    (State.lost, Event.plan): State.planned,
    (State.planned, Event.start): State.starting,
    (State.starting, Event.enter): State.ready,
    (State.planned, Event.fail): State.removed,  # or lost, if it was to replace a lost one
    (State.starting, Event.fail): State.removed,  # likewise
    (State.ready, Event.drain): State.draining,
    (State.draining, Event.drain): State.draining,
    (State.draining, Event.resume): State.ready,
    (State.ready, Event.resume): State.ready,
    (State.ready, Event.lose): State.lost,
    (State.draining, Event.lose): State.lost,
    (State.lost, Event.lose): State.lost,
    (State.draining, Event.remove): State.removed,
    (State.lost, Event.remove): State.removed,
}

MOST = 4096  # indices of one cluster
HERE = frozenset({State.ready, State.draining})
KNOWN = frozenset({State.ready, State.draining, State.lost})


@dataclass
class Member:
    """One index. `epoch` is the start of whoever was there last, 0 when nobody ever was."""

    state: State
    epoch: int = 0
    silent: bool = False


class Membership:
    """Members by index. `version` grows with every change, `joined` is the version of the last entry."""

    def __init__(self, epochs: Sequence[int]) -> None:
        self.version = self.joined = 1
        self._members = [Member(State.ready, epoch) for epoch in epochs]
        self._derive()

    def __len__(self) -> int:
        """Indices that are or were in use."""
        return len(self._members)

    def _derive(self) -> None:
        """What is asked for with every batch."""
        states = list(enumerate(member.state for member in self._members))
        self.ready = [r for r, state in states if state is State.ready and not self._members[r].silent]
        """Indices that take new requests."""
        self.here = [r for r, state in states if state in HERE]
        """Indices at which a process is: ready and draining ones, and those of them that are silent."""
        self.known = [r for r, state in states if state in KNOWN]
        """The same with lost ones."""
        self._takes = set(self.ready)

    @property
    def epochs(self) -> list[int]:
        """The start of each index's replica, 0 where nobody ever was."""
        return [member.epoch for member in self._members]

    @property
    def states(self) -> list[State]:
        """How each index stands."""
        return [State.silent if member.silent else member.state for member in self._members]

    def state(self, replica: int) -> State:
        """How that replica stands, or would if it answered; ReplicaIndexError when there is no such index."""
        if not 0 <= replica < len(self._members):
            raise ReplicaIndexError(replica, len(self._members))
        return self._members[replica].state

    def check(self, replica: int) -> None:
        """ReplicaIndexError unless there is such a replica, ReplicaRemovedError for a hole."""
        if self.state(replica) is State.removed:
            raise ReplicaRemovedError(replica, len(self._members))

    def check_takes(self, replica: int) -> None:
        """The same, and ReplicaStateError unless it may be given new requests. A lost one is let through, and so is a
        silent one: who asks it hears what was lost, or that it does not answer."""
        if replica not in self._takes:
            self.check(replica)
            state = self._members[replica].state
            if state not in (State.lost, State.ready):
                raise ReplicaStateError(replica, state, "take new requests")

    def restore(self, states: Sequence[State], epochs: Sequence[int], version: int) -> None:
        """Stand as another membership did; `version` is above all that it had."""
        self._members = [Member(state, epoch) for state, epoch in zip(states, epochs, strict=True)]
        self.version = self.joined = version
        self._derive()

    # -- events ------------------------------------------------------------------------------------

    def vacant(self, count: int) -> list[int]:
        """Indices for `count` more replicas: first in place of lost ones, then where nobody ever was, then new ones."""
        free = [r for r, member in enumerate(self._members) if member.state is State.lost]
        free += [r for r, m in enumerate(self._members) if m.state is State.removed and not m.epoch]
        return free[:count] + list(range(len(self), len(self) + count - min(count, len(free))))

    def enlist(self, count: int) -> list[int]:
        """Plan `count` replicas at vacant() indices, and return these. ConfigError for fewer than 1, or more than a
        cluster can have."""
        if not 1 <= count <= MOST:
            raise ConfigError(f"{count} replicas cannot be added: at least 1, and a cluster has at most {MOST:,}")
        if self.vacant(count)[-1] >= MOST:
            raise ConfigError(
                f"{count} more replicas are too many: a cluster has at most {MOST:,} indices, and {len(self):,} are or "
                "were in use; add fewer, or start another cluster"
            )
        return self.plan(self.vacant(count))

    def plan(self, replicas: Sequence[int]) -> list[int]:
        """Plan replicas at those indices, of vacant() ones."""
        for replica in replicas:
            while replica >= len(self):
                self._members.append(Member(State.removed))
            self.apply(replica, Event.plan)
        return list(replicas)

    def apply(self, replica: int, event: Event, epoch: int = 0) -> State:
        """Let `event` happen and return the new state. `epoch` is the new start's, for `start`.

        ReplicaStateError, and nothing changes, for an event that does not fit the state.
        """
        before = self.state(replica)
        after = MOVES.get((before, event))
        if after is None:
            self.check(replica)
            raise ReplicaStateError(replica, before, event)
        member = self._members[replica]
        if event is Event.plan and before is State.removed and member.epoch:
            raise ReplicaRemovedError(replica, len(self._members))
        if event is Event.fail and member.epoch:
            after = State.lost
        if event is Event.enter:
            member.epoch = epoch
        if after not in HERE:
            member.silent = False
        if after is not before:
            member.state = after
            self.version += 1
            if event is Event.enter:
                self.joined = self.version
            self._derive()
        return after

    def silent(self, replica: int) -> bool:
        """Whether the replica does not answer."""
        return self._members[replica].silent

    def set_silent(self, replica: int, silent: bool) -> None:
        """The process of a replica that is here does not answer any more, or does again."""
        member = self._members[replica]
        if member.silent != silent and member.state in HERE:
            member.silent = silent
            self.version += 1
            self._derive()

    def touch(self) -> None:
        """Requests changed their place: who goes by an older version has to look."""
        self.version += 1

    # -- checking ------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """IntegrityError unless what is derived from the states is right."""
        for what, wanted in (("ready", {State.ready}), ("here", HERE), ("known", KNOWN)):
            found = [r for r, member in enumerate(self._members) if member.state in wanted]
            if what == "ready":
                found = [r for r in found if not self._members[r].silent]
            if getattr(self, what) != found:
                raise IntegrityError("membership", f"{what} is {getattr(self, what)}, the states say {found}")
        for replica, member in enumerate(self._members):
            if member.state in KNOWN and not member.epoch:
                raise IntegrityError("membership", f"replica {replica} is {member.state} and never joined")
            if member.silent and member.state not in HERE:
                raise IntegrityError("membership", f"replica {replica} is {member.state} and silent")
        if self._takes != set(self.ready) or not 1 <= self.joined <= self.version:
            raise IntegrityError("membership", f"version {self.version}, last join {self.joined}")
