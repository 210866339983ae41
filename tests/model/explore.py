"""All histories of a small world, up to a number of events: depth first, each state once.

A world is made anew and played again for each history, since what it is made of cannot be copied. It says which events
may happen now, does one, checks itself, and names its state; `settle()` plays on without faults until nothing is left,
and fails when that does not come.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

Event = tuple[Hashable, ...]


class World(Protocol):
    def events(self) -> list[Event]: ...
    def do(self, event: Event) -> None: ...
    def check(self) -> None: ...
    def state(self) -> Hashable: ...
    def settle(self) -> None: ...


@dataclass
class Explored:
    """What was seen; `ends` are histories that were played on until nothing was left."""

    states: int = 0
    events: int = 0
    ends: int = 0
    deepest: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.states} states, {self.events} events ({kinds}), {self.ends} ends, {self.seconds:.1f} s"


class WrongError(AssertionError):
    """A history at whose end something is wrong."""


def explore(make: Callable[[], World], depth: int, most: int | None = None) -> Explored:
    """Play all histories of `depth` events. WrongError names the history of what fails. `most`: give up there."""
    found, began = Explored(), perf_counter()
    best: dict[int, int] = {}  # how many events were left when a state was seen

    def play(history: Sequence[Event]) -> World:
        world = make()
        for event in history:
            world.do(event)
        return world

    def visit(world: World, history: list[Event]) -> None:
        name, left = hash(world.state()), depth - len(history)
        if best.get(name, -1) >= left or (most is not None and found.states >= most):
            return
        found.states += name not in best
        best[name] = left
        found.deepest = max(found.deepest, len(history))
        events = world.events()
        if not left or not events:
            found.ends += 1
            guarded(history, world.settle)
            return
        for at, event in enumerate(events):
            found.events += 1
            found.kinds[str(event[0])] = found.kinds.get(str(event[0]), 0) + 1
            then = [*history, event]
            here = world if at == len(events) - 1 else None  # the last one needs no world of its own
            if here is None:
                here = play(history)

            def step(here: World = here, event: Event = event) -> None:
                here.do(event)
                here.check()

            guarded(then, step)
            visit(here, then)

    def guarded(history: Sequence[Event], what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            shown = "\n  ".join(" ".join(map(str, event)) for event in history)
            raise WrongError(f"{type(error).__name__}: {error}, after\n  {shown}") from error

    visit(make(), [])
    found.seconds = perf_counter() - began
    return found
