"""What every event of membership means for the rest of a scheduler's state, so that all of it knows at once.

    members      the state of each replica                  router       its loads and its index
    placed_on    which requests are on a replica            forget       drops requests from all books

Managers on Ray and inline have one, and so has the dispatcher of a Cluster. It may have a target, how many replicas are
wanted; reconcile() says what is missing or too many, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rayk.errors import DrainError
from rayk.params import require_at_least
from rayk.scheduler.membership import HERE, KNOWN, Event, Membership, State
from rayk.scheduler.router.router import Router, RouterSettings


class Steps(NamedTuple):
    """What leads to a target: indices at which replicas are to be started, and replicas to be drained."""

    start: list[int]
    drain: list[int]


def reconcile(members: Membership, target: int, requests: Sequence[int]) -> Steps:
    """The steps to `target` ready replicas; `requests[r]` are placed on replica r.

    Ready replicas and those on their way are enough; draining and lost ones are replaced. None is drained in view of
    one that is still on its way, which may fail. Silent ones are drained first, for they serve nothing, then those with
    the fewest requests, of equals the one of the highest index.
    """
    ready = [r for r in members.here if members.state(r) is State.ready]
    coming = sum(state in (State.planned, State.starting) for state in members.states)
    order = sorted(ready, key=lambda r: (not members.silent(r), requests[r], -r))
    return Steps(members.vacant(max(0, target - len(ready) - coming)), sorted(order[: max(0, len(ready) - target)]))


class ReplicaLifecycle:
    """See the module; `settings` are those that the router was made from."""

    def __init__(
        self,
        members: Membership,
        router: Router,
        placed_on: Callable[[int], list[str]],
        forget: Callable[[Sequence[str]], None],
        settings: RouterSettings,
    ) -> None:
        self.members = members
        self._router = router
        self._placed_on = placed_on
        self._forget = forget
        self._settings = settings
        self.target: int | None = None
        self.on_replica_gone: Callable[[int, Sequence[str]], None] = lambda replica, request_ids: None
        """Told when a replica is gone, with those requests, or another one is in its place."""

    def set_target(self, replicas: int | None) -> None:
        """So many replicas are wanted (rayk.scheduler.scaling.desired_replicas); None: those that there are."""
        if replicas is not None:
            require_at_least(0, replicas=replicas)
        self.target = replicas

    def reconcile(self) -> Steps:
        """The steps to the target, none where there is none. They change nothing until they are carried out."""
        if self.target is None:
            return Steps([], [])
        return reconcile(self.members, self.target, self._router.loads.requests.tolist())

    def enlist(self, count: int) -> list[int]:
        """Take indices for `count` replicas that somebody is going to start."""
        return self._known(self.members.enlist(count))

    def enlist_at(self, replicas: Sequence[int]) -> list[int]:
        """The same for those indices, which are vacant."""
        return self._known(self.members.plan(replicas))

    def _known(self, replicas: list[int]) -> list[int]:
        while len(self._router.loads) < len(self.members):
            self._router.join()
        return replicas

    def start(self, replica: int) -> None:
        """It has a place, and its process comes up."""
        self.members.apply(replica, Event.start)

    def give_up(self, replica: int) -> None:
        """It could not be started."""
        self.members.apply(replica, Event.fail)

    def join(self, replica: int, epoch: int, pages: int) -> list[int]:
        """It takes requests from now on. The replicas that have to tell of their pages because of that, if any: there
        is a choice now."""
        members, router = self.members, self._router
        members.apply(replica, Event.enter, epoch)
        before = self._placed_on(replica)  # lost with the one before
        self._forget(before)
        self.on_replica_gone(replica, before)
        router.renew(replica, pages * self._settings.page_size)
        if router.keys is not None or not self._settings.wants_keys:
            return []
        router.follow(self._settings.keys())
        return [r for r in members.here if r != replica]

    def drain(self, replica: int) -> None:
        """Nothing new goes there."""
        self.members.apply(replica, Event.drain)
        self._router.cordon(replica)

    def resume(self, replica: int) -> None:
        """It takes requests again."""
        self.members.apply(replica, Event.resume)
        if not self.members.silent(replica):
            self._router.uncordon(replica)

    def answers(self, replica: int, epoch: int, late: bool, silent: bool) -> None:
        """The replica of that start has left something unanswered for long, or nothing any more; it is silent when its
        process does not answer at all."""
        members, router = self.members, self._router
        if members.epochs[replica] == epoch and replica in members.here:
            members.set_silent(replica, silent)
            router.set_aside(replica, late)
            (router.uncordon if replica in members.ready else router.cordon)(replica)
            router.loads.away[replica] = silent

    def lose(self, replica: int, epoch: int) -> list[str]:
        """The replica of that start is gone: what was placed on it."""
        members = self.members
        if members.epochs[replica] != epoch or replica not in members.known:
            return []  # it was replaced or removed since
        members.apply(replica, Event.lose)
        self._router.lost(replica)
        placed = self._placed_on(replica)
        self.on_replica_gone(replica, placed)
        return placed

    def begin_removal(self, replica: int) -> bool:
        """It is about to be removed: nothing new goes there. DrainError, and nothing changes, while requests are there,
        unless it is silent: they go with it. Whether anybody answers at that index; a lost one need not be asked for
        anything."""
        members = self.members
        silent = members.silent(replica) if members.state(replica) in HERE else False
        if members.state(replica) in HERE:
            left = self._placed_on(replica)
            if left and not silent:
                raise DrainError(replica, dict.fromkeys(left, "it was neither released nor handed over"))
            self.drain(replica)
        return replica in members.here and not silent

    def remove(self, replica: int) -> None:
        """Nobody is at that index any more; DrainError while requests are. One that is ready drains first."""
        members = self.members
        self.begin_removal(replica)
        left = self._placed_on(replica) if members.state(replica) in KNOWN else []
        members.apply(replica, Event.remove)
        self._forget(left)
        self._router.lost(replica)
        self.on_replica_gone(replica, left)
