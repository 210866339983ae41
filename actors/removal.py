"""The end of detached clusters whose drivers are gone: what a name stands for in Ray is found by that name alone, so
that it can be removed also when its start, or the start of a replica, was never finished."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

from rayk.actors.deployment import Deployment, await_roster
from rayk.actors.interface import Actor, ActorGoneError, Placement, Runtime
from rayk.actors.launch import PlacedActor, proof_for
from rayk.actors.serving_roster import ServingRoster
from rayk.errors import ConfigError, RaykError, SecretError

ROSTER_SECONDS = 10.0  # for a scheduler that says which tiers are to be written out


class Ended(NamedTuple):
    """What was there."""

    actors: int
    groups: int


def remove_session(runtime: Runtime, name: str, force: bool = False) -> Ended:
    """End all actors of the sessions called `name` and give all their places back, whoever uses them; ConfigError when
    there are none. Tiers are written out where a scheduler still says what has any. SecretError, and nothing is done,
    where one has another secret than the runtime's, unless `force`."""
    names, groups = runtime.actor_names(), runtime.groups(name)
    if not names and not groups:
        raise ConfigError(f"no rayk cluster of the name {name!r} runs here, and nothing is left of one")
    schedulers, rosters = [], []
    for each in [each for each in names if each.endswith("/scheduler")]:
        scheduler = runtime.find(each)
        if scheduler is not None:
            schedulers.append(scheduler)
            try:
                rosters.append(_roster(runtime, scheduler, each == f"{name}/cluster/scheduler"))
            except SecretError:
                if not force:
                    raise
            except (RaykError, ActorGoneError):
                pass  # it says nothing any more
    runtime.stop(schedulers, None)
    for roster in rosters:
        with suppress(RaykError, ActorGoneError):
            roster.stop(runtime)
    left = [actor for each in runtime.actor_names() if (actor := runtime.find(each)) is not None]
    runtime.stop(left, None)
    for group in runtime.groups(name):
        runtime.stop((), group)
    runtime.forget(f"{name}/")
    return Ended(len(names), len(groups))


def _roster(runtime: Runtime, scheduler: Actor, serves: bool) -> Deployment | ServingRoster:
    if not serves:
        return await_roster(runtime, scheduler, ROSTER_SECONDS)
    call = scheduler.call("roster", proof_for(runtime, scheduler, ROSTER_SECONDS), control=True)
    served: ServingRoster = runtime.get(call, "the scheduler", ROSTER_SECONDS)
    return served


class Strays(NamedTuple):
    """What drivers that are gone had begun to start."""

    actors: list[Actor]
    groups: list[Placement]

    def end(self, runtime: Runtime) -> None:
        """End them."""
        runtime.stop(self.actors, None)
        for group in self.groups:
            runtime.stop((), group)


def find_strays(runtime: Runtime, name: str, part: str, running: Iterable[PlacedActor]) -> Strays:
    """What bears a detached cluster's `name`, of the `part`s of which these are running, and is none of them; nobody
    may begin to start anything meanwhile."""
    running = list(running)
    known = {placed.actor.name for placed in running}
    begun = [each for each in runtime.actor_names() if each.startswith(f"{name}/{part}-")]
    actors = [actor for each in begun if each not in known and (actor := runtime.find(each)) is not None]
    used = {runtime.group_key(placed.bundle.placement) for placed in running}
    groups = [group for group in runtime.groups(name) if runtime.group_key(group) not in used]
    return Strays(actors, groups)


def end_strays(runtime: Runtime, name: str, part: str, running: Iterable[PlacedActor]) -> None:
    """End them in a thread."""
    strays = find_strays(runtime, name, part, running)
    Thread(target=strays.end, args=(runtime,), name="rayk-sweep", daemon=True).start()
