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
    """Request id -> replica and tokens."""

    def __init__(self) -> None:
        self._placed: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._placed)

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

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored, so that it can be repeated."""
        self._placed.pop(request_id, None)

    def loads(self, replicas: int) -> list[Load]:
        """What is placed on each replica."""
        loads = [Load() for _ in range(replicas)]
        for replica, tokens in self._placed.values():
            loads[replica].requests += 1
            loads[replica].tokens += tokens
        return loads
