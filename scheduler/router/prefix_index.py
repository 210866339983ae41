"""Which replica holds which page, in which tier: the prefix index that routers look into.

A page is a *key*: the hash of its tokens and all before them, as an int. The index does not care how it was made;
`short_keys` cuts hashes of any kind to 8 bytes, and two pages that share these cost a miss, never a wrong answer.

    _holders   key -> bit set: bit 3 * slot + tier says that the replica in that slot holds the page in that tier

A replica holds a page only with all pages before it (they are evicted from the end), tier by tier, so the set of
holders never grows along a request. Lookups rely on it and bisect. An entry that breaks the rule costs a miss.

A request that was just placed will store its pages soon. `promise` enters them at once, so that those who share its
prefix and arrive together find them; they stay when the replica reports them, and `withdraw` takes the others back.

Clearing a replica gives it a fresh slot. What is in its old one is swept up in small pieces beside later changes, so
that no call takes long; then that slot is used again.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import repeat
from typing import NamedTuple

import numpy as np

from rayk.errors import IntegrityError
from rayk.kvcache.page_hash import PageHash, RootKey
from rayk.kvcache.page_pool import Pages
from rayk.scheduler.router.replica_loads import Int64Array

KNOWN = 4096  # bit sets that are kept taken apart
SWEEP = 256  # entries looked at by a change while an old slot is being swept up
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
    """How many leading pages of a request each replica holds, [replicas] int64 each: in its device tier, in device and
    host, in all three (the same array where the lower tiers add nothing). The longest span comes first."""

    device: Int64Array
    host: Int64Array
    disk: Int64Array
    spans: list[Span]


class _Members(NamedTuple):
    """A bit set, taken apart: the replicas by tier, and how many different ones they are."""

    by_tier: list[Int64Array]
    replicas: int


def short_keys(hashes: Sequence[int | bytes]) -> Sequence[int]:
    """Keys of page hashes: their first 8 bytes, or the low 64 bits of a number."""
    try:
        array("Q", hashes)  # type: ignore[type-var]  # the quick way to see that they are keys already
    except (TypeError, OverflowError):
        return [
            each & 0xFFFFFFFFFFFFFFFF if isinstance(each, int) else int.from_bytes(each[:8], "little")
            for each in hashes
        ]
    return hashes  # type: ignore[return-value]


class PrefixIndex:
    """Pages of `replicas` replicas; more may join. Lookups change nothing.

    An entry takes about 80 bytes, its key included (`rayk bench core` weighs it); a page with many holders less for
    each of them.
    """

    def __init__(self, replicas: int = 0) -> None:
        self._holders: dict[int, int] = {}
        self._slot: list[int] = []  # replica -> slot
        self._replica: list[int] = []  # slot -> replica, -1 while it is swept up
        self._at: Int64Array = np.zeros(0, np.int64)  # the same as an array
        self._known: dict[int, _Members] = {}
        self._bit: list[list[int]] = []  # slot -> its bits by tier, made once, so that pages of one holder share them
        self._counts: list[list[int]] = []  # slot -> entries by tier
        self._unsure: dict[int, int] = {}  # key -> those of its bits that are promises
        self._live = 0  # bits of slots that replicas have
        self._devices = 0  # bits of the device tier, of all slots
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
        self._moved()

    def _take_slot(self, replica: int) -> None:
        if self._free:
            slot = self._free.pop()
            self._replica[slot], self._counts[slot] = replica, [0] * _TIERS
        else:
            slot = len(self._replica)
            self._replica.append(replica)
            self._counts.append([0] * _TIERS)
            self._bit.append([1 << _TIERS * slot + tier for tier in range(_TIERS)])
            self._devices |= self._bit[slot][Tier.device]
        self._slot[replica] = slot
        self._live |= _EVERY_TIER << _TIERS * slot

    def _moved(self) -> None:
        """Slots changed hands: what was derived from them is out of date."""
        self._at = np.array(self._replica, np.int64)
        self._known.clear()

    def stored(self, replica: int, keys: Iterable[int], tier: Tier = Tier.device) -> None:
        """The replica holds these pages now. Pages that it held already stay as they are."""
        slot = self._slot[replica]
        bit = self._bit[slot][tier]
        holders, unsure = self._holders, self._unsure
        keys = list(keys)
        before = len(holders)
        if list(map(holders.get, keys)).count(None) == len(keys):  # what nobody had
            holders.update(dict.fromkeys(keys, bit))
            self._counts[slot][tier] += len(holders) - before
        elif unsure and list(map(unsure.get, keys)).count(bit) == len(keys):  # what it alone promised
            deque(map(unsure.pop, keys, repeat(None)), maxlen=0)
        else:
            self._counts[slot][tier] += self._store(keys, bit)
        if self._sweeping:
            self.sweep()

    def _store(self, keys: Sequence[int], bit: int) -> int:
        """stored(), whatever is known of the keys; how many did not have the bit."""
        holders, get, unsure = self._holders, self._holders.get, self._unsure
        fresh = 0
        before, after = 0, bit  # neighbours have the same holders as a rule, and then share one bit set
        for key in keys:
            old = get(key, 0)
            if not old & bit:
                if old != before:
                    before, after = old, old | bit
                holders[key] = after
                fresh += 1
            elif unsure and unsure.get(key, 0) & bit:
                self._settle(key, bit)
        return fresh

    def removed(self, replica: int, keys: Iterable[int], tier: Tier = Tier.device) -> None:
        """The replica does not hold these pages any more; those that it did not hold are ignored."""
        slot = self._slot[replica]
        bit = self._bit[slot][tier]
        holders, get, unsure = self._holders, self._holders.get, self._unsure
        keys = list(keys)
        entries = len(holders)
        alone = len(keys) > 1 and list(map(get, keys)).count(bit) == len(keys)
        if alone and unsure.keys().isdisjoint(keys):  # what it alone held
            deque(map(holders.pop, keys, repeat(None)), maxlen=0)
            self._counts[slot][tier] -= entries - len(holders)
        else:
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
                    if unsure and unsure.get(key, 0) & bit:
                        self._settle(key, bit)
            self._counts[slot][tier] -= gone
        if self._sweeping:
            self.sweep()

    def _settle(self, key: int, bits: int) -> None:
        """What was a promise is so, or is not."""
        if left := self._unsure[key] & ~bits:
            self._unsure[key] = left
        else:
            del self._unsure[key]

    def depth(self, replica: int, keys: Sequence[int]) -> int:
        """How many leading pages of `keys` the replica holds in its device tier, or promised to."""
        bit, get = self._bit[self._slot[replica]][0], self._holders.get
        low, high = 0, len(keys)
        if not high or not get(keys[0], 0) & bit:
            return 0
        while low < high:
            mid = (low + high) // 2
            if get(keys[mid], 0) & bit:
                low = mid + 1
            else:
                high = mid
        return low

    def promise(self, replica: int, keys: Sequence[int], depth: int | None = None) -> Sequence[int]:
        """The replica will hold these pages soon, in its device tier. Returns those that it did not hold or promise
        before, for `withdraw`; `keys` themselves if it is all. `depth`: theirs, if it was just looked up."""
        slot = self._slot[replica]
        bit, holders, unsure = self._bit[slot][0], self._holders, self._unsure
        if depth is None:
            depth = self.depth(replica, keys)
        rest = keys[depth:] if depth else keys
        shared: list[int] = []
        if len(rest) == 1 and rest[0] not in holders:  # what nobody has
            holders[rest[0]] = unsure[rest[0]] = bit
            self._counts[slot][0] += 1
            if self._sweeping:
                self.sweep()
            return rest
        known = list(map(holders.get, rest))
        if any(known):
            new = known.count(None)
            split = len(rest) if None in known[: len(rest) - new] else len(rest) - new
            shared, rest = self._share(rest[:split], bit), rest[split:]
        if rest:
            entries = dict.fromkeys(rest, bit)
            holders.update(entries)
            unsure.update(entries)
            if len(entries) < len(rest):
                rest = list(entries)
        fresh = [*shared, *rest] if shared else rest
        self._counts[slot][0] += len(fresh)
        if self._sweeping:
            self.sweep()
        return fresh

    def _share(self, keys: Sequence[int], bit: int) -> list[int]:
        """promise() of pages some of which others hold; those that did not have the bit."""
        holders, get, unsure = self._holders, self._holders.get, self._unsure
        fresh: list[int] = []
        before, after = 0, bit  # as in stored()
        for key in keys:
            old = get(key, 0)
            if not old & bit:
                if old != before:
                    before, after = old, old | bit
                holders[key] = after
                promised = unsure.get(key)
                unsure[key] = bit if promised is None else promised | bit
                fresh.append(key)
        return fresh

    def withdraw(self, replica: int, keys: Iterable[int]) -> None:
        """Nobody will store these pages any more: those that the replica has not reported go."""
        bit, unsure = self._bit[self._slot[replica]][0], self._unsure
        if promised := [key for key in keys if unsure.get(key, 0) & bit]:
            self.removed(replica, promised)

    def cleared(self, replica: int) -> None:
        """The replica holds nothing any more, in no tier."""
        slot = self._slot[replica]
        if any(self._counts[slot]):
            bits = _EVERY_TIER << _TIERS * slot
            for key in [key for key, promised in self._unsure.items() if promised & bits]:
                self._settle(key, bits)
            self._live &= ~bits
            self._replica[slot] = -1
            self._dirty |= bits
            self._take_slot(replica)
            self._moved()
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

    def known(self, keys: Sequence[int]) -> bool:
        """Whether any replica holds any leading part of `keys`, so that the lookups below find something."""
        return bool(keys) and bool((self._holders.get(keys[0], 0) | self._holders.get(keys[-1], 0)) & self._live)

    def more_elsewhere(self, replica: int, keys: Sequence[int]) -> bool:
        """Whether another replica holds more leading pages of `keys` in its device tier, or promised to, than this one
        holds; what it only promised does not count."""
        mine, get, unsure = self._bit[self._slot[replica]][0], self._holders.get, self._unsure
        others = self._devices & self._live & ~mine
        low, high = 0, len(keys)
        if not high or not get(keys[0], 0) & others:
            return False
        while low < high:
            mid = (low + high) // 2
            if get(keys[mid], 0) & mine and not unsure.get(keys[mid], 0) & mine:
                low = mid + 1
            else:
                high = mid
        return low < len(keys) and bool(get(keys[low], 0) & others)

    def _deepest(self, keys: Sequence[int]) -> tuple[int, int]:
        """How many leading keys anybody holds, and who holds the last of them. All or none of a request are the usual
        answers, so its ends are looked at first."""
        if not keys:
            return 0, 0
        get, live = self._holders.get, self._live
        low, high = 1, len(keys) - 1
        if found := get(keys[high], 0) & live:
            return high + 1, found
        if not (found := get(keys[0], 0) & live):
            return 0, 0
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
        depths: list[Int64Array | None] = [None] * _TIERS
        spans: list[Span] = []
        for depth, holders in reversed(self.steps(keys)):
            members = self._apart(holders)
            for tier, replicas in enumerate(members.by_tier):
                if len(replicas):
                    array = depths[tier]
                    if array is None:
                        array = depths[tier] = np.zeros(len(self._slot), np.int64)
                    array[replicas] = depth
            spans.append(Span(depth, members.replicas))
        spans.reverse()
        device = depths[0] if depths[0] is not None else np.zeros(len(self._slot), np.int64)
        host = device if depths[1] is None else np.maximum(device, depths[1])
        disk = host if depths[2] is None else np.maximum(host, depths[2])
        return Reach(device, host, disk, spans)

    def _apart(self, holders: int) -> _Members:
        """The members of a bit set; those of large sets are remembered, since popular pages share them."""
        known = self._known.get(holders)
        if known is None:
            at = np.array(_bits(holders), np.int64)
            replicas, tiers = self._at[at // _TIERS], at % _TIERS
            by_tier = [replicas[tiers == tier] for tier in range(_TIERS)]
            known = _Members(by_tier, len(at) if len(by_tier[0]) == len(at) else len(np.unique(replicas)))
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[holders] = known
        return known

    def check_integrity(self) -> None:
        """IntegrityError unless the counts are those of the entries, and nothing is left where nobody looks."""
        for key, promised in self._unsure.items():
            if promised & ~self._holders.get(key, 0) or not promised:
                raise IntegrityError("prefix index", f"promises {promised:b} of a page held by others")
        counts = [[0] * _TIERS for _ in self._replica]
        for holders in self._holders.values():
            for at in _bits(holders):
                counts[at // _TIERS][at % _TIERS] += 1
        for slot, replica in enumerate(self._replica):
            if replica >= 0 and (self._slot[replica] != slot or counts[slot] != self._counts[slot]):
                raise IntegrityError("prefix index", f"replica {replica}: {self._counts[slot]}, found {counts[slot]}")
            if replica < 0 and slot in self._free and any(counts[slot]):
                raise IntegrityError("prefix index", f"free slot {slot} has {counts[slot]} entries")


class IndexFeed:
    """Tells an index at once what a replica of this process caches: a listener of its prefix tree."""

    def __init__(self, index: PrefixIndex, replica: int) -> None:
        self._index = index
        self._replica = replica

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        """See PageListener."""
        self._index.stored(self._replica, short_keys(hashes))

    def removed(self, hashes: Sequence[PageHash]) -> None:
        """See PageListener."""
        self._index.removed(self._replica, short_keys(hashes))


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
