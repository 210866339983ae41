"""The links between replicas: which kind of line (rayk.transport.choice) a pair uses, how fast it is, and what broke.

A replica introduces itself with its first answer about copies. A link that failed is not used for a while, longer each
time; meanwhile the next best kind is. The first failure of a link is logged as a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from rayk.params import AUTO, OBJECT_STORE
from rayk.protocol.from_replica import LineState
from rayk.scheduler.transfers.copy_cost import LinkEstimate
from rayk.transport.choice import ASSUMED_RATES, Endpoint, Peer, choose_line

log = logging.getLogger("rayk.scheduler")

REST_SECONDS = 30.0  # of a link that failed; doubled with each failure
LONGEST_REST = 1800.0


class _Link(NamedTuple):
    """From a replica to another, by one kind of line."""

    source: int
    target: int
    kind: str


class _Record:
    """What is known of a link."""

    def __init__(self, kind: str) -> None:
        self.rate = LinkEstimate(*ASSUMED_RATES[kind])
        self.failures = 0
        self.rests_until = 0.0
        self.trouble = ""


class LinkTable:
    """`wanted` is a kind of line, or "auto"."""

    def __init__(self, clock: Callable[[], float], wanted: str = AUTO) -> None:
        self.wanted = wanted
        self._clock = clock
        self.peers: dict[int, Peer] = {}
        """Replicas that have introduced themselves."""
        self.gone: dict[int, set[int]] = {}
        """Replica -> those that it may have links to, and that have left."""
        self._endpoints: dict[int, Endpoint] = {}
        self._records: dict[_Link, _Record] = {}

    # -- ends --------------------------------------------------------------------------------------

    def joined(self, replica: int, epoch: int, endpoint: Endpoint) -> None:
        """A replica introduced itself."""
        if self.peers.get(replica, Peer(replica, epoch)).epoch != epoch:
            self.left(replica)
        self.peers[replica], self._endpoints[replica] = Peer(replica, epoch), endpoint

    def left(self, replica: int) -> None:
        """A replica was lost, removed or replaced: nothing that was known of its links is of use."""
        for known in (self.peers, self._endpoints, self.gone):
            known.pop(replica, None)
        for link in [each for each in self._records if replica in (each.source, each.target)]:
            del self._records[link]
            other = link.target if link.source == replica else link.source
            if other in self.peers:
                self.gone.setdefault(other, set()).add(replica)

    def keep(self, here: Mapping[int, int]) -> None:
        """Only these replicas, with these epochs, run."""
        for replica, peer in list(self.peers.items()):
            if here.get(replica) != peer.epoch:
                self.left(replica)

    def peers_to_disconnect(self) -> dict[int, list[int]]:
        """Who has to be told, once, to close the links to which replicas."""
        gone, self.gone = self.gone, {}
        return {replica: sorted(left) for replica, left in gone.items()}

    # -- choosing ----------------------------------------------------------------------------------

    def kind(self, source: int, target: int) -> str:
        """The kind of line for the next copy."""
        here, there = self._endpoints.get(source), self._endpoints.get(target)
        if here is None or there is None:
            return OBJECT_STORE
        now = self._clock()
        links = [link for kind in ASSUMED_RATES if (link := _Link(source, target, kind)) in self._records]
        broken = {link.kind for link in links if self._records[link].rests_until > now}
        return choose_line(here, there, self.wanted, broken)

    def use(self, source: int, target: int) -> str:
        """kind() for a copy that is made: from now on there may be a link to close."""
        kind = self.kind(source, target)
        self._record(_Link(source, target, kind))
        return kind

    def seconds(self, source: int, target: int, pages: int) -> float:
        """What a copy of so many pages will take over the link that it would use."""
        size = pages * self.page_bytes(target)
        return self._record(_Link(source, target, self.kind(source, target))).rate.seconds(size)

    def page_bytes(self, replica: int) -> int:
        """What a page of that replica weighs, 0 while that is not known."""
        known = self._endpoints.get(replica)
        return known.page_bytes if known is not None else 0

    def quickest(self, sources: Iterable[int], target: int, pages: int) -> list[int]:
        """The sources, those first over whose link such a copy takes the least time."""
        return sorted(sources, key=lambda source: self.seconds(source, target, pages))

    def _record(self, link: _Link) -> _Record:
        record = self._records.get(link)
        if record is None:
            record = self._records[link] = _Record(link.kind)
        return record

    # -- what came of it -----------------------------------------------------------------------------

    def carried(self, source: int, target: int, kind: str, pages: int, seconds: float) -> None:
        """A copy arrived."""
        known = self._endpoints.get(target)
        if known is not None:
            self._record(_Link(source, target, kind)).rate.seen(pages * known.page_bytes, seconds)

    def failed(self, source: int, target: int, kind: str, reason: str) -> None:
        """A copy did not arrive: the link rests. The object store never does, for there is nothing else."""
        record = self._record(_Link(source, target, kind))
        record.failures += 1
        record.trouble = reason
        rest = min(REST_SECONDS * 2 ** (record.failures - 1), LONGEST_REST)
        record.rests_until = self._clock() + rest
        tell = log.warning if record.failures == 1 else log.info
        tell(
            "copies from replica %d to replica %d by %s failed (%s): using %s for %.0f s",
            source, target, kind, reason, self.kind(source, target), rest,
        )  # fmt: skip

    def table(self) -> list[LineState]:
        """The links that were used or failed."""
        return [
            LineState(*link, r.rate.copies, r.rate.bytes, r.rate.latency, r.rate.bandwidth, r.failures, r.trouble)
            for link, r in sorted(self._records.items())
            if r.rate.copies or r.failures
        ]
