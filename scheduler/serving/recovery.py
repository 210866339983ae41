"""The second life of a Cluster's scheduler: what it knew and nobody else does is kept outside of it.

    KeptServing    written down whenever it changes: engines and how each stands, the target, drivers, leases, the owner
    adopt()        of ServingCore, for what drivers say of their requests that have a place
    Return         holds back what waits until those who have places have said so

The index of pages needs nothing: an engine tells a new reader all that it has cached. Tokens went past the scheduler
before, and do so meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayk.protocol.serving import PlaceRequest
from rayk.scheduler.recovery import restore_members
from rayk.scheduler.serving.core import ServingCore

RETURN_SECONDS = 2.0  # for which the drivers of before are waited for


@dataclass(frozen=True)
class KeptServing:
    """`roster` is what drivers attach by, and all that there is at first; `drivers` are names by number, `last` is the
    last number that was given to one."""

    roster: Any
    epochs: list[int]
    states: list[str]
    target: int | None = None
    leaving: list[int] = field(default_factory=list)
    owner: str = ""
    leases: dict[str, float] = field(default_factory=dict)
    drivers: dict[int, str] = field(default_factory=dict)
    last: int = 0
    begun: bool = False  # a scheduler has run with it

    def restore(self, core: ServingCore, born: int) -> None:
        """Have a new core, which began at `born` (microseconds), go on with it."""
        restore_members(core.members, core.router, self.states, self.epochs, born)
        core.supervisor.restore(self.target, self.leaving)


def keep(
    core: ServingCore, roster: Any, owner: str, leases: Mapping[str, float], drivers: Mapping[int, str], last: int
) -> KeptServing:
    """What is to be written down now."""
    members, supervisor = core.members, core.supervisor
    standing = core.lifecycle.target, supervisor.leaving
    states = list(map(str, members.states))
    return KeptServing(roster, list(members.epochs), states, *standing, owner, dict(leases), dict(drivers), last, True)


class Return:
    """The drivers of before, until each has said what it has: nobody new is given a place that one of them holds."""

    def __init__(self, drivers: Iterable[int], clock: Callable[[], float]) -> None:
        self._away = set(drivers)
        self._clock = clock
        self._until = clock() + RETURN_SECONDS
        self._wants: dict[int, PlaceRequest] = {}  # by ticket

    def back(self, driver: int) -> None:
        """That one has said it, or will not come."""
        self._away.discard(driver)

    def hold(self, wants: Sequence[PlaceRequest]) -> None:
        """Those wait until all are back."""
        self._wants.update((want.ticket, want) for want in wants)

    def drop(self, tickets: Iterable[int]) -> None:
        """Those are not wanted any more."""
        for ticket in tickets:
            self._wants.pop(ticket, None)

    @property
    def over(self) -> bool:
        """Whether all are back, or were waited for long enough."""
        return not self._away or self._clock() >= self._until

    def take(self) -> list[PlaceRequest]:
        """What waited."""
        wants, self._wants = list(self._wants.values()), {}
        return wants
