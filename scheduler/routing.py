"""Which replica a request goes to, and the count of what is placed where that the choice is made from.

`Placements` is exact and local: a request counts from the moment it is chosen a place, so that a burst does
not herd onto one replica. Routers see it and nothing else here; they are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayk.errors import AlreadyClaimedError, ConfigError


@dataclass(slots=True)
class Load:
    """What is placed on one replica now."""

    requests: int = 0
    tokens: int = 0


class Router(Protocol):
    """Chooses a replica index; may keep state of its own choices."""

    def choose(self, tokens: int, loads: Sequence[Load]) -> int:
        """The replica for a request of `tokens` tokens, given the loads of all replicas."""
        ...


class RoundRobin:
    """Replica i, i + 1, .. in turn, whatever they carry."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, tokens: int, loads: Sequence[Load]) -> int:
        replica = self._next % len(loads)
        self._next = replica + 1
        return replica


class LeastLoaded:
    """The replica with the fewest placed tokens, then the fewest requests, then the lowest index."""

    def choose(self, tokens: int, loads: Sequence[Load]) -> int:
        return min(range(len(loads)), key=lambda i: (loads[i].tokens, loads[i].requests, i))


ROUTERS: dict[str, Callable[[], Router]] = {"round-robin": RoundRobin, "least-loaded": LeastLoaded}


def make_router(name: str) -> Router:
    """The router of that name; ConfigError lists the names."""
    if name not in ROUTERS:
        raise ConfigError(f"router {name!r} is not one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()


class Placements:
    """Request id -> replica, with the load of each replica kept beside it."""

    def __init__(self, replicas: int) -> None:
        self.loads = [Load() for _ in range(replicas)]
        self._placed: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def join(self) -> None:
        """One more replica, at the next index."""
        self.loads.append(Load())

    def holder(self, request_id: str) -> int | None:
        """The replica that has the request, or None."""
        placed = self._placed.get(request_id)
        return placed[0] if placed is not None else None

    def on(self, replica: int) -> list[str]:
        """The requests placed on a replica."""
        return [request_id for request_id, (r, _) in self._placed.items() if r == replica]

    def add(self, request_id: str, replica: int, tokens: int = 0) -> None:
        """Place a request; AlreadyClaimedError when it has a place."""
        placed = self._placed.get(request_id)
        if placed is not None:
            raise AlreadyClaimedError(request_id, placed[0])
        self._placed[request_id] = (replica, tokens)
        load = self.loads[replica]
        load.requests += 1
        load.tokens += tokens

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored, so that it can be repeated."""
        placed = self._placed.pop(request_id, None)
        if placed is not None:
            replica, tokens = placed
            self.loads[replica].requests -= 1
            self.loads[replica].tokens -= tokens
