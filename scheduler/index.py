"""Which replica holds which page, in which tier: the prefix index that routers look into.

A page is a *key*: the hash of its tokens and all before them, as an int. The index does not care how it was made;
`short_keys` cuts hashes of any kind to 8 bytes, and two pages that share these cost a miss, never a wrong answer.

    _holders   key -> bit set: bit 3 * slot + tier says that the replica in that slot holds the page in that tier

A replica holds a page only with all pages before it (they are evicted from the end), tier by tier, so the set of
holders never grows along a request. Lookups rely on it: they bisect, a dozen probes for a request of any length. An
entry that breaks the rule costs a miss.

Clearing a replica gives it a fresh slot at once. What its old slot left behind is not looked at any more and is swept
up in small pieces beside later changes, so that no call takes long; then the slot is used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rayk.errors import IntegrityError

Int64Array = npt.NDArray[np.int64]

SWEEP = 4096  # entries looked at by a change while an old slot is being swept up
_TIERS = 3
_EVERY_TIER = (1 << _TIERS) - 1


class Tier(IntEnum):
    """Where a replica holds a page, nearest first."""

    device = 0
    host = 1
    disk = 2


class Step(NamedTuple):
    """`replicas` hold the first `pages` pages of a request in the tier that was asked about, and not more."""

    pages: int
    replicas: list[int]


class Best(NamedTuple):
    """The longest prefix that any replica holds, and a replica that does: the one of lowest index; -1 for none."""

    pages: int
    replica: int


class Span(NamedTuple):
    """`holders` replicas hold the first `pages` pages (or more), in whatever tier."""

    pages: int
    holders: int


class Reach(NamedTuple):
    """`pages[t, r]` is how many leading pages replica r holds in tiers up to t, [3, replicas] int64; the longest span
    comes first."""

    pages: Int64Array
    spans: list[Span]


def short_keys(hashes: Sequence[int | bytes]) -> list[int]:
    """Keys of page hashes: their first 8 bytes, or the low 64 bits of a number."""
    if hashes and all(type(each) is bytes for each in hashes):
        return [int.from_bytes(each[:8], "little") for each in hashes]  # type: ignore[index]
    return [
        each & 0xFFFFFFFFFFFFFFFF if isinstance(each, int) else int.from_bytes(each[:8], "little") for each in hashes
    ]


class PrefixIndex:
    """Pages of `replicas` replicas; more may join. Changes only through stored, removed, cleared, join and sweep."""

    def __init__(self, replicas: int = 0) -> None:
        self._holders: dict[int, int] = {}
        self._slot: list[int] = []  # replica -> slot
        self._replica: list[int] = []  # slot -> replica, -1 while it is swept up
        self._counts: list[list[int]] = []  # slot -> entries by tier
        self._live = 0  # bits of slots that replicas have
        self._free: list[int] = []  # slots swept clean
        self._sweeping: list[int] = []  # keys still to be looked at
        self._swept = 0  # bits that the current sweep takes away
        self._dirty = 0  # bits that the next sweep will take away
        self.join(replicas)

    def __len__(self) -> int:
        """Entries: pairs of a replica's tier and a page."""
        return sum(sum(self._counts[slot]) for slot in self._slot)

    @property
    def replicas(self) -> int:
        """How many replicas there are."""
        return len(self._slot)

    def pages(self, replica: int, tier: Tier = Tier.device) -> int:
        """How many pages the replica holds in that tier."""
        return self._counts[self._slot[replica]][tier]

    # -- changes ----------------------------------------------------------------------------------

    def join(self, replicas: int = 1) -> None:
        """Add `replicas` replicas, which hold nothing yet; they get the next indices."""
        for _ in range(replicas):
            self._slot.append(-1)
            self._take_slot(len(self._slot) - 1)

    def _take_slot(self, replica: int) -> None:
        if self._free:
            slot = self._free.pop()
            self._replica[slot], self._counts[slot] = replica, [0] * _TIERS
        else:
            slot = len(self._replica)
            self._replica.append(replica)
            self._counts.append([0] * _TIERS)
        self._slot[replica] = slot
        self._live |= _EVERY_TIER << _TIERS * slot

    def stored(self, replica: int, keys: Iterable[int], tier: Tier = Tier.device) -> None:
        """The replica holds these pages now. Pages that it held already stay as they are."""
        slot = self._slot[replica]
        bit = 1 << _TIERS * slot + tier
        holders, get = self._holders, self._holders.get
        fresh = 0
        before, after = 0, bit  # neighbours have the same holders as a rule, and then share one bit set
        for key in keys:
            old = get(key, 0)
            if not old & bit:
                if old != before:
                    before, after = old, old | bit
                holders[key] = after
                fresh += 1
        self._counts[slot][tier] += fresh
        if self._sweeping:
            self.sweep()

    def removed(self, replica: int, keys: Iterable[int], tier: Tier = Tier.device) -> None:
        """The replica does not hold these pages any more; those that it did not hold are ignored."""
        slot = self._slot[replica]
        bit = 1 << _TIERS * slot + tier
        holders, get = self._holders, self._holders.get
        gone = 0
        before, after = bit, 0
        for key in keys:
            old = get(key, 0)
            if old & bit:
                if old != before:
                    before, after = old, old ^ bit
                if after:
                    holders[key] = after
                else:
                    del holders[key]
                gone += 1
        self._counts[slot][tier] -= gone
        if self._sweeping:
            self.sweep()

    def cleared(self, replica: int) -> None:
        """The replica holds nothing any more, in no tier."""
        slot = self._slot[replica]
        if any(self._counts[slot]):
            bits = _EVERY_TIER << _TIERS * slot
            self._live &= ~bits
            self._replica[slot] = -1
            self._dirty |= bits
            self._take_slot(replica)
            if not self._sweeping:
                self._start_sweep()

    def _start_sweep(self) -> None:
        self._swept, self._dirty = self._dirty, 0
        self._sweeping = list(self._holders)
        self.sweep()

    def sweep(self, entries: int = SWEEP) -> bool:
        """Look at `entries` more keys for what cleared replicas left; whether that is all there was."""
        holders = self._holders
        for key in self._sweeping[-entries:]:
            old = holders.get(key, 0)
            if old & self._swept:
                if left := old & ~self._swept:
                    holders[key] = left
                else:
                    del holders[key]
        del self._sweeping[-entries:]
        if not self._sweeping and self._swept:
            self._free += [s for s, r in enumerate(self._replica) if r < 0 and self._swept >> _TIERS * s & 1]
            self._swept = 0
            if self._dirty:
                self._start_sweep()
        return not self._sweeping

    # -- lookups: these change nothing ------------------------------------------------------------

    def best(self, keys: Sequence[int]) -> Best:
        """The longest prefix of `keys` that a replica holds, in whatever tier."""
        pages, holders = self._deepest(keys)
        if not pages:
            return Best(0, -1)
        low = (holders & -holders).bit_length() - 1
        if holders == holders & -holders:
            return Best(pages, self._replica[low // _TIERS])
        return Best(pages, min(self._members(holders)))

    def _deepest(self, keys: Sequence[int]) -> tuple[int, int]:
        """How many leading keys anybody holds, and who holds the last of them."""
        get, live = self._holders.get, self._live
        low, high, found = 0, len(keys), 0
        while low < high:
            mid = (low + high) // 2
            if holders := get(keys[mid], 0) & live:
                low, found = mid + 1, holders
            else:
                high = mid
        return low, found

    def steps(self, keys: Sequence[int]) -> list[tuple[int, int]]:
        """All of who holds how much, longest first: (pages, bit set of those who hold that many or more)."""
        pages, holders = self._deepest(keys)
        if not pages:
            return []
        get, live = self._holders.get, self._live
        out = [(pages, holders)]
        while pages > 1 and get(keys[0], 0) & live != holders:
            low, high = 1, pages - 1  # key low - 1 has other holders; so may those up to high - 1
            wider = get(keys[0], 0) & live
            while low < high:
                mid = (low + high + 1) // 2
                there = get(keys[mid - 1], 0) & live
                if there != holders:
                    low, wider = mid, there
                else:
                    high = mid - 1
            pages, holders = low, wider | holders
            out.append((pages, holders))
        return out

    def _members(self, holders: int) -> set[int]:
        """The replicas in a bit set."""
        return {self._replica[at // _TIERS] for at in _bits(holders)}

    def holding(self, keys: Sequence[int], tier: Tier = Tier.device) -> list[Step]:
        """The replicas that hold a part of `keys` in `tier`, longest first; each replica comes once."""
        out: list[Step] = []
        seen: set[int] = set()
        for pages, holders in self.steps(keys):
            there = {self._replica[at // _TIERS] for at in _bits(holders) if at % _TIERS == tier} - seen
            if there:
                out.append(Step(pages, sorted(there)))
                seen |= there
        return out

    def reach(self, keys: Sequence[int]) -> Reach:
        """How many leading pages each replica holds, tier by tier, and by how many replicas they are held."""
        pages = np.zeros((_TIERS, len(self._slot)), np.int64)
        spans: list[Span] = []
        seen = 0
        held: set[int] = set()
        for depth, holders in self.steps(keys):
            for at in _bits(holders & ~seen):
                replica = self._replica[at // _TIERS]
                pages[at % _TIERS, replica] = depth
                held.add(replica)
            seen |= holders
            spans.append(Span(depth, len(held)))
        np.maximum.accumulate(pages, axis=0, out=pages)
        return Reach(pages, spans)

    def check_integrity(self) -> None:
        """IntegrityError unless the counts are those of the entries, and nothing is left where nobody looks."""
        counts = [[0] * _TIERS for _ in self._replica]
        for holders in self._holders.values():
            for at in _bits(holders):
                counts[at // _TIERS][at % _TIERS] += 1
        for slot, replica in enumerate(self._replica):
            if replica >= 0 and (self._slot[replica] != slot or counts[slot] != self._counts[slot]):
                raise IntegrityError("prefix index", f"replica {replica}: {self._counts[slot]}, found {counts[slot]}")
            if replica < 0 and slot in self._free and any(counts[slot]):
                raise IntegrityError("prefix index", f"free slot {slot} has {counts[slot]} entries")


def _bits(number: int) -> list[int]:
    """The places of the ones in `number`, ascending."""
    if number.bit_count() > 16:
        raw = np.frombuffer(number.to_bytes((number.bit_length() + 7) // 8, "little"), np.uint8)
        places: list[int] = np.flatnonzero(np.unpackbits(raw, bitorder="little")).tolist()
        return places
    places = []
    while number:
        low = number & -number
        places.append(low.bit_length() - 1)
        number ^= low
    return places
