"""The count of what is placed where: exact and local, a request counts from the moment it is chosen a place."""

from __future__ import annotations

from dataclasses import dataclass

from rayk.errors import AlreadyClaimedError


@dataclass(slots=True)
class Load:
    """What is placed on one replica now."""

    requests: int = 0
    tokens: int = 0


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
