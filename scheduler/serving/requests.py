"""A request as the scheduler of a Cluster keeps it, and what its driver is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from rayk.errors import RaykError
from rayk.protocol.serving import PlaceRequest
from rayk.scheduler.transfers.copy_cost import Span


class ServedRequest(msgspec.Struct, gc=False, eq=False):
    """A request from when it is asked for until it is over. `key` is its id among those of all drivers; `replica` where
    it is placed, -1 while it is not."""

    want: PlaceRequest
    driver: int
    key: str
    late_at: float | None
    replica: int = -1
    since: float = 0.0  # it waits

    @property
    def ticket(self) -> int:
        """Its number."""
        return self.want.ticket


class PlacedRequest(NamedTuple):
    """The request with that ticket goes to `replica`, which gets `spans` of its prefix from others first."""

    ticket: int
    replica: int
    spans: Sequence[Span]


class RefusedRequest(NamedTuple):
    """The request with that ticket gets no place any more, for that reason."""

    ticket: int
    error: RaykError
