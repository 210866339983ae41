"""What is done about a target of replicas: which are taken out, which are started again, by whom, and when no more.

    lost        its process died                                           replaced at once
    silent      its process answers nothing any more                       taken out after `hang_seconds`
    stuck       it answers, and its work makes no progress                 taken out after `stuck_seconds`
    poisoned    an error after which nothing it computes can be trusted    taken out at once

Starting a replica takes a driver: whoever asks is granted the indices that are due, so that exactly one of them starts
each, and loses the grant when it leaves or its lease ends. A replacement that cannot be started, or is lost right
after it joined, is tried again later and later, and given up after so many times in a row, with the reason; a place
that is not there is no such failure and is asked for again and again. add_replicas() begins anew.

What a caller adds, drains and removes moves the target. Pure: the clock is given.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rayk.errors import IntegrityError
from rayk.scheduler.lifecycle import ReplicaLifecycle
from rayk.scheduler.membership import State

log = logging.getLogger("rayk.scheduler")


@dataclass(frozen=True)
class RestartPolicy:
    """Seconds, and how often. A replacement that was lost within `early` seconds counts as a failed one; the first
    failure is followed by a pause of `pause` seconds, which doubles up to `longest_pause`. `attempts` failures in a
    row, or `most` replacements of one index within `window` seconds, are the end of it."""

    hang: float = 5.0
    stuck: float = 30.0
    early: float = 2.0
    pause: float = 0.5
    longest_pause: float = 30.0
    place_pause: float = 2.0  # after a place was not there
    attempts: int = 5
    most: int = 30
    window: float = 600.0


POLICY = RestartPolicy()


class Replacement(NamedTuple):
    """What is done about one index that somebody is missing at. `seconds`: until the next attempt, at least."""

    replica: int
    reason: str
    failures: int
    given_up: bool
    seconds: float


@dataclass
class _Trouble:
    """Why nobody is at an index, since somebody was."""

    reason: str
    due: float = 0.0
    failures: int = 0  # in a row
    given_up: bool = False
    joins: deque[float] = field(default_factory=deque)  # when replacements did, of late


class Supervisor:
    """See the module. With `replace`, the replicas that are there now are the target; without one, nobody is replaced,
    and grants are kept all the same."""

    def __init__(
        self,
        lifecycle: ReplicaLifecycle,
        clock: Callable[[], float],
        replace: bool,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.policy = policy or POLICY
        self.lifecycle = lifecycle
        self._members = lifecycle.members
        self._clock = clock
        self._troubles: dict[int, _Trouble] = {}
        self._grants: dict[int, str] = {}  # index -> who starts a replica there
        self.lost = self.replaced = 0
        """How many were lost, and how many took the place of one, since the start."""
        self._leaving: set[int] = set()  # drained by a caller: not wanted any more
        if replace:
            lifecycle.set_target(len(self._members.here))

    @property
    def leaving(self) -> list[int]:
        """Indices whose replicas are not wanted any more."""
        return sorted(self._leaving)

    def restore(self, target: int | None, leaving: Sequence[int]) -> None:
        """Go on for another supervisor; nobody has a grant."""
        self.lifecycle.set_target(target)
        self._leaving = set(leaving)

    @property
    def replaces(self) -> bool:
        """Whether there is a target that is kept."""
        return self.lifecycle.target is not None

    def _move_target(self, by: int) -> None:
        target = self.lifecycle.target
        if target is not None:
            self.lifecycle.set_target(max(0, target + by))

    # -- who is to be taken out ------------------------------------------------------------------

    def sick(self, silence: float, answers: bool, poison: str) -> str | None:
        """Why a replica is to be taken out that made no progress for `silence` seconds, if it is. `answers`: its
        process does; `poison` is what it says of an error that it will not recover from."""
        if not self.replaces:
            return None
        if poison:
            return f"it cannot go on: {poison}"
        if not answers and silence >= self.policy.hang:
            return f"its process did not answer for {silence:.0f} s"
        if answers and silence >= self.policy.stuck:
            return f"its work made no progress for {silence:.0f} s"
        return None

    # -- what happens ----------------------------------------------------------------------------

    def lose(self, replica: int, epoch: int, reason: str) -> list[str]:
        """The replica of that start is gone: what was placed on it."""
        members = self._members
        fits = members.epochs[replica] == epoch and members.state(replica) in (State.ready, State.draining)
        placed = self.lifecycle.lose(replica, epoch)
        if fits:
            self.lost += 1
            log.warning("replica %d is lost with %d request(s) placed there: %s", replica, len(placed), reason)
            self._failed(replica, reason)
        return placed

    def _failed(self, replica: int, reason: str) -> None:
        now, policy = self._clock(), self.policy
        trouble = self._troubles.setdefault(replica, _Trouble(reason))
        trouble.reason, trouble.due = reason, now
        while trouble.joins and trouble.joins[0] < now - policy.window:
            trouble.joins.popleft()
        trouble.given_up = len(trouble.joins) >= policy.most
        if trouble.joins and now - trouble.joins[-1] < policy.early:
            self._count(trouble, now)
        elif trouble.joins:
            trouble.failures = 0

    def _count(self, trouble: _Trouble, now: float) -> None:
        """Another failure in a row."""
        trouble.failures += 1
        trouble.due = now + min(self.policy.pause * 2.0 ** (trouble.failures - 1), self.policy.longest_pause)
        trouble.given_up |= trouble.failures >= self.policy.attempts

    def give_up(self, replica: int, error: str, placeless: bool = False) -> None:
        """It could not be started; `placeless`: there was no place for it."""
        self.lifecycle.give_up(replica)
        self._grants.pop(replica, None)
        now = self._clock()
        trouble = self._troubles.setdefault(replica, _Trouble(error))
        trouble.reason = error
        if placeless:
            trouble.due = now + self.policy.place_pause
        else:
            self._count(trouble, now)

    def join(self, replica: int, epoch: int, pages: int) -> list[int]:
        """See ReplicaLifecycle.join()."""
        follow = self.lifecycle.join(replica, epoch, pages)
        self._grants.pop(replica, None)
        self._leaving.discard(replica)
        if (trouble := self._troubles.get(replica)) is not None:
            trouble.joins.append(self._clock())
            self.replaced += 1
        if self.lifecycle.target is not None:
            self.lifecycle.set_target(max(self.lifecycle.target, self._wanted_here))
        return follow

    @property
    def _wanted_here(self) -> int:
        return sum(self._members.state(r) is State.ready for r in self._members.here)

    def drain(self, replica: int, leaving: bool = True) -> None:
        """Nothing new goes there. With `leaving` it is not wanted any more; without, another has to take its place."""
        self.lifecycle.drain(replica)
        if leaving and replica not in self._leaving:
            self._leaving.add(replica)
            self._move_target(-1)

    def resume(self, replica: int) -> None:
        """It takes requests again, and is wanted."""
        self.lifecycle.resume(replica)
        if replica in self._leaving:
            self._leaving.discard(replica)
            self._move_target(+1)

    def remove(self, replica: int) -> None:
        """Nobody is at that index any more, and nobody is wanted there; DrainError while requests are."""
        self.lifecycle.remove(replica)
        if replica not in self._leaving:
            self._move_target(-1)
        self._leaving.discard(replica)
        self._troubles.pop(replica, None)

    # -- who starts what -------------------------------------------------------------------------

    def enlist(self, count: int, who: str) -> list[int]:
        """Indices for `count` replicas that `who` is going to start, whatever became of earlier ones there."""
        replicas = self.lifecycle.enlist(count)
        for replica in replicas:
            self._troubles.pop(replica, None)
        self._grants.update(dict.fromkeys(replicas, who))
        return replicas

    def due(self) -> list[int]:
        """Indices at which a replacement is to be started now."""
        now = self._clock()
        return [r for r in self.lifecycle.reconcile().start if self._may_start(r, now)]

    def _may_start(self, replica: int, now: float) -> bool:
        trouble = self._troubles.get(replica)
        return trouble is None or (not trouble.given_up and trouble.due <= now)

    def take(self, who: str) -> list[int]:
        """Grant what is due: `who` starts it, or gives it up."""
        replicas = self.lifecycle.enlist_at(self.due())
        self._grants.update(dict.fromkeys(replicas, who))
        return replicas

    def forget(self, who: str) -> list[int]:
        """Somebody is gone: the indices at which it was starting replicas, which are free again."""
        left = [replica for replica, driver in self._grants.items() if driver == who]
        for replica in left:
            del self._grants[replica]
            self.lifecycle.give_up(replica)
        return left

    @property
    def granted(self) -> bool:
        """Whether somebody starts a replica."""
        return bool(self._grants)

    @property
    def hopeful(self) -> bool:
        """Whether a replica is on its way, or will be started."""
        return bool(self._grants) or self.seconds() is not None

    def seconds(self) -> float | None:
        """Until something is due that nobody starts, as far as it is known now; None when nothing will be."""
        now = self._clock()
        waits = [
            max(0.0, trouble.due - now) if trouble is not None else 0.0
            for trouble in map(self._troubles.get, self.lifecycle.reconcile().start)
            if trouble is None or not trouble.given_up
        ]
        return min(waits, default=None)

    def replacements(self) -> list[Replacement]:
        """What is done about the indices at which somebody is missing."""
        now = self._clock()
        return [
            Replacement(r, each.reason, each.failures, each.given_up, max(0.0, each.due - now))
            for r, each in sorted(self._troubles.items())
            if self._members.state(r) in (State.lost, State.planned, State.starting)
        ]

    def check_integrity(self) -> None:
        """IntegrityError unless grants are of replicas on their way, and what leaves is still known."""
        for replica, who in self._grants.items():
            if (state := self._members.state(replica)) not in (State.planned, State.starting):
                raise IntegrityError("supervisor", f"{who} was granted replica {replica}, which is {state}")
        for replica in self._leaving:
            if self._members.state(replica) is State.ready:
                raise IntegrityError("supervisor", f"replica {replica} is ready and not wanted")
