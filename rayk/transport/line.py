"""The protocol of a line: pages go from one replica's pool into another's, by page index.

    source                                                     target
    pins pages, offer(): how they can be had   -- messages -->  allocates pages, fetch() fills them
    acknowledged, or its time is up: end()     <-- messages --  has them, or does not want them

Messages are the scheduler's; no replica calls another. Nothing that a source does waits for its target, and whatever a
target waits for goes on without the source's own thread, so that copies in both directions at once cannot block each
other. A fetch that fails leaves its pages with unknown content: nobody may read them before they are written again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from rayk.errors import ClusterError
from rayk.pages import Pages

FETCH_SECONDS = 20.0  # a target waits no longer for pages; what has not come by then is computed


class LineError(ClusterError):
    """A line does not carry pages, now or at all; the next one is tried, and what was not copied is computed."""

    kind: str
    peer: int
    reason: str
    text = "line {kind} with replica {peer}: {reason}"


class Peer(NamedTuple):
    """The replica at the other end, and its start: a line is of two processes, not of two indices."""

    replica: int
    epoch: int


class Parcel(NamedTuple):
    """Pages that a source has pinned for a target.

    `pages` are its page ids, `offer` what its line said to be told to the target, `expires` when it unpins them
    whatever happened (seconds of the monotonic clock that all processes of a machine share).
    """

    source: Peer
    export_id: int
    pages: Pages
    offer: bytes
    expires: float


class Line(Protocol):
    """A replica's end of all its lines of one kind. One thread uses it."""

    kind: str

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        """As the source: let `to` fetch these pinned pages; what it has to be told. Does not wait. LineError."""
        ...

    def end(self, export_id: int) -> None:
        """As the source: when this returns nobody reads these pages over this line any more. Ignores unknown ids."""
        ...

    def fetch(self, parcel: Parcel, first: int, pages: Pages) -> None:
        """As the target: fill `pages` with the parcel's pages from number `first` on. LineError, within FETCH_SECONDS.

        When this returns nothing writes to the pages any more, whatever came of it.
        """
        ...

    def drop(self, replica: int) -> None:
        """That replica is gone or replaced: close what is open to it. Unknown ones are ignored."""
        ...

    def close(self) -> None:
        """Close everything."""
        ...


Clock = Callable[[], float]
