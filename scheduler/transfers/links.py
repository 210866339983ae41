"""What the scheduler knows of the lines between replicas: which one a pair uses, how fast it is, and what broke.

A replica says with its first answer about copies what kind of end it is. A line that failed is not used for a while,
longer each time; meanwhile the next best one is. The first failure of a line is logged as a warning.
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

REST_SECONDS = 30.0  # of a line that failed; doubled with each failure
LONGEST_REST = 1800.0


class _Wire(NamedTuple):
    """One kind of line from a replica to another."""

    source: int
    target: int
    kind: str


class _Record:
    """What is known of a line."""

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
        self._ends: dict[int, tuple[Peer, Endpoint]] = {}
        self._records: dict[_Wire, _Record] = {}
        self._gone: dict[int, set[int]] = {}  # replica -> those that it may have lines to, and that have left

    # -- ends --------------------------------------------------------------------------------------

    def unknown(self, replica: int) -> bool:
        """Whether the replica has to be asked who it is."""
        return replica not in self._ends

    def joined(self, replica: int, epoch: int, station: Endpoint) -> None:
        """A replica introduced itself."""
        known = self._ends.get(replica)
        if known is not None and known[0].epoch != epoch:
            self.left(replica)
        self._ends[replica] = Peer(replica, epoch), station

    def left(self, replica: int) -> None:
        """A replica was lost, removed or replaced: nothing that was known of its lines is of use."""
        self._ends.pop(replica, None)
        self._gone.pop(replica, None)
        for wire in [w for w in self._records if replica in (w.source, w.target)]:
            del self._records[wire]
            other = wire.target if wire.source == replica else wire.source
            if other in self._ends:
                self._gone.setdefault(other, set()).add(replica)

    def keep(self, here: Mapping[int, int]) -> None:
        """Only these replicas, with these starts, are there."""
        for replica, (peer, _) in list(self._ends.items()):
            if here.get(replica) != peer.epoch:
                self.left(replica)

    def peers_to_disconnect(self) -> dict[int, list[int]]:
        """Who has to be told, once, that lines to which replicas are to be closed."""
        gone, self._gone = self._gone, {}
        return {replica: sorted(left) for replica, left in gone.items()}

    def peer(self, replica: int) -> Peer:
        """The replica and its start; of one that did not introduce itself the start is 0."""
        known = self._ends.get(replica)
        return known[0] if known is not None else Peer(replica, 0)

    # -- choosing ----------------------------------------------------------------------------------

    def kind(self, source: int, target: int) -> str:
        """The kind of line for the next copy."""
        ends = self._ends.get(source), self._ends.get(target)
        if ends[0] is None or ends[1] is None:
            return OBJECT_STORE
        now = self._clock()
        broken = {w.kind for w in self._wires(source, target) if self._records[w].rests_until > now}
        return choose_line(ends[0][1], ends[1][1], self.wanted, broken)

    def use(self, source: int, target: int) -> str:
        """kind() for a copy that is made: from now on there may be a line to close."""
        kind = self.kind(source, target)
        self._record(_Wire(source, target, kind))
        return kind

    def _wires(self, source: int, target: int) -> list[_Wire]:
        return [wire for kind in ASSUMED_RATES if (wire := _Wire(source, target, kind)) in self._records]

    def seconds(self, source: int, target: int, pages: int) -> float:
        """What a copy of so many pages will take over the line that it would use."""
        size = pages * self.page_bytes(target)
        return self._record(_Wire(source, target, self.kind(source, target))).rate.seconds(size)

    def page_bytes(self, replica: int) -> int:
        """What a page of that replica weighs, 0 while that is not known."""
        known = self._ends.get(replica)
        return known[1].page_bytes if known is not None else 0

    def quickest(self, sources: Iterable[int], target: int, pages: int) -> list[int]:
        """The sources, those first over whose line such a copy takes the least time."""
        return sorted(sources, key=lambda source: self.seconds(source, target, pages))

    def _record(self, wire: _Wire) -> _Record:
        record = self._records.get(wire)
        if record is None:
            record = self._records[wire] = _Record(wire.kind)
        return record

    # -- what came of it -----------------------------------------------------------------------------

    def carried(self, source: int, target: int, kind: str, pages: int, seconds: float) -> None:
        """A copy arrived."""
        known = self._ends.get(target)
        if known is not None:
            self._record(_Wire(source, target, kind)).rate.seen(pages * known[1].page_bytes, seconds)

    def failed(self, source: int, target: int, kind: str, reason: str) -> None:
        """A copy did not arrive: the line rests. The object store never does, for there is nothing else."""
        record = self._record(_Wire(source, target, kind))
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
        """The lines that were used or failed."""
        return [
            LineState(*wire, r.rate.copies, r.rate.bytes, r.rate.latency, r.rate.bandwidth, r.failures, r.trouble)
            for wire, r in sorted(self._records.items())
            if r.rate.copies or r.failures
        ]
