"""The protocol between a replica and whatever keeps its pages beyond the device, and the connector that keeps none.

A connector is made for one replica and used by one thread. It identifies pages by their chained hashes, so that
equal hashes mean equal tokens, salt, adapter and cluster seed. It may lose any page at any time, and must never
give wrong bytes for one: what it cannot vouch for did not land.

Transfers are handles. A load writes device pages only inside load(), poll() and wait() of its transfer, so a caller
that does not call them any more (cancel()) has its pages back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int32]


class Tier:
    """Where lookup() found a page."""

    HOST = 1
    DISK = 2


class Found(NamedTuple):
    """The leading run of the pages looked for: their hashes, and for each whether Tier.HOST or Tier.DISK has it."""

    hashes: list[bytes]
    tiers: list[int]


class Transfer(Protocol):
    """Pages on their way to a device."""

    def poll(self) -> bool:
        """Whether it is over, well or not. Never waits."""
        ...

    def wait(self) -> int:
        """Wait until it is over (on a device with streams: see to it that what is queued from now on comes after it):
        how many leading pages have landed. Never raises."""
        ...

    def cancel(self) -> None:
        """Nobody wants the pages any more; what was read may still be kept in the tier."""
        ...


class Landed(NamedTuple):
    """A transfer that is over."""

    pages: int

    def poll(self) -> bool:
        return True

    def wait(self) -> int:
        return self.pages

    def cancel(self) -> None:
        pass


class TierCounters(msgspec.Struct, kw_only=True):
    """What one replica's connector did, in pages, since it was made."""

    h2d: int = 0  # loaded into device pages
    d2h: int = 0  # copied out of device pages
    disk_written: int = 0
    disk_read: int = 0
    loads_failed: int = 0  # found, but not there (or not sound) when it was loaded: computed again
    skipped: int = 0  # not offloaded: no room, or the tier was busy
    damaged: int = 0  # files with a wrong checksum, a wrong length, or cut short
    foreign: int = 0  # files of another model, layout or seed, or that are no page files
    outdated: int = 0  # files of another version of the format


class TierCount(NamedTuple):
    """Occupancy of this node's tiers in pages, shared by its replicas, and what is wrong with them ("" if nothing)."""

    host_total: int = 0
    host_used: int = 0
    disk_total: int = 0
    disk_used: int = 0
    trouble: str = ""


class Connector(Protocol):
    """Tiers below one replica's device pages. `counters` only grow."""

    counters: TierCounters

    def holds(self, key: bytes) -> bool:
        """Whether a tier seems to have that page. Asked for every new request: it must be cheap, not certain."""
        ...

    def lookup(self, hashes: Iterable[bytes]) -> Found:
        """The leading hashes whose pages are in a tier. Reads no further than the first miss, and changes nothing."""
        ...

    def load(self, hashes: Sequence[bytes], pages: Pages) -> Transfer:
        """Bring found pages of one prefix into device `pages`, which hold nothing yet."""
        ...

    def offload(self, hashes: Sequence[bytes], pages: Pages) -> None:
        """Copy device pages out. Nobody writes to them before reuse()."""
        ...

    def reuse(self, pages: Pages) -> None:
        """These device pages are about to be written: what is still reading them must be waited for, on the device."""
        ...

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Pages of one prefix, in order, were used on the device: keep them longer."""
        ...

    def count(self) -> TierCount:
        """Occupancy and health now."""
        ...

    def poll(self) -> None:
        """Take note of finished work. Never waits."""
        ...

    def reset(self) -> None:
        """Forget all pages that no transfer uses."""
        ...

    def drain(self) -> None:
        """Return when nothing is on its way."""
        ...

    def check_integrity(self) -> None:
        """IntegrityError if its bookkeeping contradicts itself; also if a page is held though nothing is on its way."""
        ...

    def shutdown(self) -> None:
        """Finish what is on its way and let go of everything. Pages on disk stay for the next start."""
        ...


class NullConnector:
    """No tiers: finds nothing, keeps nothing."""

    def __init__(self) -> None:
        self.counters = TierCounters()

    def holds(self, key: bytes) -> bool:
        return False

    def lookup(self, hashes: Iterable[bytes]) -> Found:
        return Found([], [])

    def load(self, hashes: Sequence[bytes], pages: Pages) -> Transfer:
        return Landed(0)

    def offload(self, hashes: Sequence[bytes], pages: Pages) -> None:
        pass

    def reuse(self, pages: Pages) -> None:
        pass

    def touch(self, hashes: Sequence[bytes]) -> None:
        pass

    def count(self) -> TierCount:
        return TierCount()

    def poll(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def check_integrity(self) -> None:
        pass

    def shutdown(self) -> None:
        pass
