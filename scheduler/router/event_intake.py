"""The intake of cache events: what replicas report keeps a prefix index true.

Batches of one replica are numbered from 0 on within its epoch. Applied out of order they would leave pages in the index
that are gone, so a batch is applied only when it is the next one, and otherwise a resync is asked for: the replica's
whole content as one batch that starts with AllBlocksCleared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from rayk.protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Hash
from rayk.scheduler.router.prefix_index import PrefixIndex, Tier, short_keys

TIERS: Final[dict[str, Tier]] = {"GPU": Tier.device, "CPU": Tier.host, "DISK": Tier.disk}
"""By what they are called on the wire."""


class Verdict(Enum):
    """What the intake made of a batch."""

    applied = "applied"
    repeated = "repeated"  # it was applied before; nothing was done
    resync = "resync"  # something is missing; nothing was done, and the replica has to send all it has


class Intake:
    """Puts the batches of replicas into an index, each once and in order."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._epoch: dict[int, int] = {}
        self._next: dict[int, int] = {}

    def take(self, replica: int, epoch: int, number: int, events: Sequence[Event]) -> Verdict:
        """Batch `number` of the replica's start `epoch`.

        Batch 0 begins an epoch: what the index had of the replica before is dropped. After a gap, and for an epoch
        whose start was missed, nothing is applied until a batch comes that starts with AllBlocksCleared; old entries
        stay meanwhile, since a stale one costs a miss and none at all costs every hit.
        """
        whole = bool(events) and isinstance(events[0], AllBlocksCleared)
        known = self._epoch.get(replica)
        if known is not None and epoch < known:
            return Verdict.repeated
        if epoch != known:
            if number and not whole:
                return Verdict.resync
            self._index.cleared(replica)
        elif number < self._next[replica]:
            return Verdict.repeated
        elif number > self._next[replica] and not whole:
            return Verdict.resync
        self._epoch[replica], self._next[replica] = epoch, number + 1
        for event in events:
            self._apply(replica, event)
        return Verdict.applied

    def _apply(self, replica: int, event: Event) -> None:
        match event:
            case AllBlocksCleared():
                self._index.cleared(replica)
            case BlockStored(block_hashes=hashes, medium=medium):
                self._change(self._index.stored, replica, hashes, medium)
            case BlockRemoved(block_hashes=hashes, medium=medium):
                self._change(self._index.removed, replica, hashes, medium)

    @staticmethod
    def _change(change: Callable[..., None], replica: int, hashes: Sequence[Hash], medium: str | None) -> None:
        tier = TIERS.get("GPU" if medium is None else medium.upper())
        if tier is not None:  # a tier that we know nothing of is no place to route to
            change(replica, short_keys(hashes), tier)
