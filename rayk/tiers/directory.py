"""Which page is in which slot of a tier, for all processes of a node: a table in shared memory.

The truth is one record per slot: its state, key (page hash), tick of last use, and who holds it. Everything else is
derived and rebuilt when a process died while changing it: the hash table over the slots and the sums.

    EMPTY --reserve()--> WRITING --publish()--> READY --(reserve() of another page)--> WRITING
                            `-----abandon()----> EMPTY    '--seize()--> WRITING

A page can be found only when it is READY, that is after its bytes were written: a writer that dies leaves a WRITING
slot, which reap() takes over. READY slots that somebody has pinned are not given away. contains() takes no lock and
may be wrong for a moment; pin() decides.

Order of eviction: least recently used first; in a run of pages that were used together the deepest first.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rayk.errors import IntegrityError
from rayk.tiers.segment import MAX_PARTICIPANTS, Segment

KEY_BYTES = 32  # shorter hashes are padded with zeros
PRESENT = -1  # reserve(): the page is there or on its way
FULL = -2  # reserve(): every slot is pinned or being written

_CLOCK, _USED = 8, 9  # words of the segment
_LOW = (1 << 32) - 1


EMPTY, WRITING, READY = 0, 1, 2

# In a loop over pages these are several times as fast as slices of a memoryview.
_number = struct.Struct("<Q").unpack_from  # of a key: where it is in the table
_read_key = struct.Struct(f"{KEY_BYTES}s").unpack_from
_write_key = struct.Struct(f"{KEY_BYTES}s").pack_into


class Directory:
    """`slots` records in `segment`; `data` is the rest of its body. All changes are made under the segment's lock."""

    def __init__(self, segment: Segment, slots: int) -> None:
        self.slots = slots
        self._segment = segment
        self._seat = segment.seat
        self._words = segment.words
        at = 0

        def take(dtype: str, *shape: int) -> np.ndarray:
            nonlocal at
            array = segment.body[at : at + int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
            at += -(-array.nbytes // 64) * 64
            return array

        self._table = take("uint64", _table_size(slots))  # tag << 32 | slot + 1; 0: nothing
        self._ticks = take("uint64", slots)
        self._keys = take("uint8", slots, KEY_BYTES)
        self._state = take("uint8", slots)
        self._owner = take("uint8", slots)  # seat of the writer
        self._pins = take("int16", slots)  # the sum over _pinned
        self._pinned = take("int16", MAX_PARTICIPANTS, slots)
        self.data = segment.body[at:]
        self._mask = len(self._table) - 1
        self._cells = self._table.data  # scalars of a memoryview are the cheap ones
        self._states = self._state.data
        self._owners = self._owner.data
        self._stamps = self._ticks.data
        self._sums = self._pins.data
        self._mine = self._pinned[self._seat].data
        self._counts = segment.words.data
        self._key_bytes = self._keys.data.cast("B")
        self._queue: deque[tuple[int, int]] = deque()  # (slot, tick) to give away next; checked when met
        segment.repair = self._repair

    @staticmethod
    def num_bytes(slots: int) -> int:
        """Bytes of the records in a segment, before its data."""
        per_slot = (8, KEY_BYTES, 1, 1, 2, 2 * MAX_PARTICIPANTS)
        return sum(-(-slots * size // 64) * 64 for size in per_slot) + -(-_table_size(slots) * 8 // 64) * 64

    @property
    def cells(self) -> tuple[memoryview, int]:
        """The table and its mask: an empty cell at `int.from_bytes(key[:8], "little") & mask` is a certain miss."""
        return self._cells, self._mask

    # -- looking: no lock ----------------------------------------------------------------------

    def contains(self, key: bytes) -> bool:
        """Whether the page was READY a moment ago. A miss costs about a microsecond and no system call."""
        (number,) = _number(key)
        cells, mask = self._cells, self._mask
        at = number & mask
        while cell := cells[at]:
            if cell >> 32 == number >> 32:
                slot = (cell & _LOW) - 1
                there: bytes = _read_key(self._key_bytes, slot * KEY_BYTES)[0]
                if there.startswith(key):
                    return bool(self._states[slot] == READY)
            at = (at + 1) & mask
        return False

    @property
    def used(self) -> int:
        """Slots that hold a page or are being written."""
        return self._counts[_USED]

    # -- writing -------------------------------------------------------------------------------

    def reserve(self, keys: Sequence[bytes]) -> list[int]:
        """A slot to write each page into, PRESENT or FULL; the keys are distinct. Publish or abandon every
        slot got.

        Pages that are PRESENT were used just now, in order. Slots grow with the pages: what comes together lies
        together, as far as possible.
        """
        assert len(set(keys)) == len(keys)
        states, owners, key_bytes, seat = self._states, self._owners, self._key_bytes, self._seat
        with self._segment:
            found = self._find(keys)
            answer = [FULL if slot < 0 else PRESENT for slot in found]
            new = [i for i, slot in enumerate(found) if slot < 0]
            if len(new) < len(found):
                self._use([slot for slot in found if slot >= 0 and states[slot] == READY])
            slots = self._take(len(new))
            for i, slot in zip(new, slots, strict=False):
                answer[i] = slot
                _write_key(key_bytes, slot * KEY_BYTES, keys[i])
                owners[slot] = seat
                states[slot] = WRITING
            self._insert(slots)
            self._counts[_USED] += len(slots)
        return answer

    def publish(self, slots: Sequence[int], pin: Collection[int] = ()) -> None:
        """The pages are written: let them be found, the first one evicted last. The caller holds those in `pin`."""
        states, owners, seat = self._states, self._owners, self._seat
        with self._segment:
            self._use(slots)
            for slot in slots:
                assert states[slot] == WRITING and owners[slot] == seat
                states[slot] = READY
            self._pin(pin, 1)

    def abandon(self, slots: Sequence[int]) -> None:
        """The pages were not written: free their slots."""
        with self._segment:
            assert all(self._states[slot] == WRITING and self._owners[slot] == self._seat for slot in slots)
            self._empty(slots)

    # -- reading -------------------------------------------------------------------------------

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """The slot of each page, -1 where it is not READY; those found are held until unpin()."""
        with self._segment:
            found = self._ready(keys)
            got = found if min(found, default=0) >= 0 else [slot for slot in found if slot >= 0]
            self._pin(got, 1)
            self._use(got)
            return found

    def unpin(self, slots: Sequence[int]) -> None:
        """Let go of pinned pages."""
        with self._segment:
            assert all(self._mine[slot] > 0 for slot in slots)
            self._pin(slots, -1)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Pages of one prefix, in order, were used just now."""
        with self._segment:
            self._use([slot for slot in self._ready(keys) if slot >= 0])

    def seize(self, slot: int, key: bytes) -> bool:
        """Take an unreadable page from the readers, unless somebody holds it. Then clean up and abandon() its slot."""
        with self._segment:
            if self._ready([key]) != [slot] or self._sums[slot]:
                return False
            self._states[slot] = WRITING
            self._owners[slot] = self._seat
            return True

    def seize_all(self) -> list[int]:
        """The same for all pages that nobody holds or writes; their slots."""
        with self._segment:
            found = np.flatnonzero((self._state == READY) & (self._pins == 0))
            self._owner[found] = self._seat
            self._state[found] = WRITING
            return found.tolist()

    def clear(self) -> None:
        """Forget them where there is nothing to clean up: their slots are free at once."""
        with self._segment:
            self._empty(np.flatnonzero((self._state == READY) & (self._pins == 0)).tolist())

    def restore(self, slot: int, key: bytes) -> bool:
        """While the tier is opened: the page is in that slot already. False if the slot or the page is taken."""
        with self._segment:
            if self._states[slot] != EMPTY or self._find([key]) != [-1]:
                return False
            _write_key(self._key_bytes, slot * KEY_BYTES, key)
            self._use([slot])
            self._states[slot] = READY
            self._counts[_USED] += 1
            self._insert([slot])
            return True

    def empty_slots(self) -> list[int]:
        """Slots without a page."""
        return np.flatnonzero(self._state == EMPTY).tolist()

    # -- the dead --------------------------------------------------------------------------------

    def reap(self, own_seat: bool = False) -> list[int]:
        """Take over what participants held that died: their pins are gone, and the slots that they were writing are
        the caller's to clean up and abandon(). With `own_seat` also what the last holder of this seat left behind."""
        with self._segment:
            return self._reap(own_seat)

    def free_dead(self, own_seat: bool = False) -> None:
        """reap() where there is nothing to clean up: the slots are free at once."""
        with self._segment:
            self._empty(self._reap(own_seat))

    def _reap(self, own_seat: bool) -> list[int]:
        dead = self._segment.dead_seats()
        lost: list[int] = []
        for seat in [self._seat, *dead] if own_seat else dead:  # what the dead left is this seat's from then on
            lost += self._reap_seat(seat)
            if seat != self._seat:
                self._segment.seats[seat] = 0
        return lost

    def _reap_seat(self, seat: int) -> list[int]:
        row = self._pinned[seat]
        for slot in np.flatnonzero(row):
            self._pins[slot] -= row[slot]
            row[slot] = 0
        lost = np.flatnonzero((self._state == WRITING) & (self._owner == seat))
        self._owner[lost] = self._seat
        return lost.tolist()

    def _repair(self) -> None:
        """Somebody died while changing the records: rebuild what is derived from them."""
        self._table[:] = 0
        self._words[_USED] = np.count_nonzero(self._state)
        self._pins[:] = self._pinned.sum(axis=0)
        for slot in np.flatnonzero(self._state).tolist():
            if self._find([self._key(slot)]) == [-1]:
                self._insert([slot])
            else:  # never two slots for one page
                self._states[slot] = EMPTY
                self._counts[_USED] -= 1
        self._words[_CLOCK] = max(int(self._words[_CLOCK]), int(self._ticks.max(initial=0)))

    # -- inside the lock ---------------------------------------------------------------------------

    def _key(self, slot: int) -> bytes:
        return bytes(self._keys[slot].data)

    def _find(self, keys: Sequence[bytes]) -> list[int]:
        """The slot of each page in any state, -1 where there is none."""
        cells, mask, key_bytes = self._cells, self._mask, self._key_bytes
        found = []
        for key in keys:
            (number,) = _number(key)
            at = number & mask
            slot = -1
            while cell := cells[at]:
                if cell >> 32 == number >> 32:
                    slot = (cell & _LOW) - 1
                    if _read_key(key_bytes, slot * KEY_BYTES)[0].startswith(key):
                        break
                    slot = -1
                at = (at + 1) & mask
            found.append(slot)
        return found

    def _ready(self, keys: Sequence[bytes]) -> list[int]:
        states = self._states
        return [slot if slot >= 0 and states[slot] == READY else -1 for slot in self._find(keys)]

    def _insert(self, slots: Sequence[int]) -> None:
        """Let pages that are not in the table be found in it."""
        cells, mask, key_bytes = self._cells, self._mask, self._key_bytes
        for slot in slots:
            (number,) = _number(key_bytes, slot * KEY_BYTES)
            at = number & mask
            while cells[at]:
                at = (at + 1) & mask
            cells[at] = (number >> 32) << 32 | (slot + 1)

    def _empty(self, slots: Sequence[int]) -> None:
        """Take pages out of the table and free their slots; later cells of a chain move up: no gap hides them."""
        cells, mask, key_bytes, states = self._cells, self._mask, self._key_bytes, self._states
        for slot in slots:
            states[slot] = EMPTY
            at = _number(key_bytes, slot * KEY_BYTES)[0] & mask
            while cells[at] & _LOW != slot + 1:
                at = (at + 1) & mask
            gap = at
            while cell := cells[(at := (at + 1) & mask)]:
                home = _number(key_bytes, ((cell & _LOW) - 1) * KEY_BYTES)[0]
                if (at - home) & mask >= (at - gap) & mask:
                    cells[gap] = cell
                    gap = at
            cells[gap] = 0
        self._counts[_USED] -= len(slots)

    def _pin(self, slots: Collection[int], by: int) -> None:
        mine, sums = self._mine, self._sums
        for slot in slots:
            mine[slot] += by
            sums[slot] += by

    def _use(self, slots: Sequence[int]) -> None:
        """Stamp slots as used now, the first latest, so that the deepest page of a run goes first."""
        clock = self._counts[_CLOCK] + len(slots)
        self._counts[_CLOCK] = clock
        stamps = self._stamps
        for slot in slots:
            stamps[slot] = clock
            clock -= 1

    def _take(self, count: int) -> list[int]:
        """Slots for so many new pages, or fewer, in the order of their numbers: empty ones, else the least recently
        used ones that nobody holds."""
        states, stamps, sums, queue = self._states, self._stamps, self._sums, self._queue
        if self.used < self.slots and (not queue or states[queue[0][0]] != EMPTY):
            queue.clear()  # empty ones first
        got: list[int] = []
        while len(got) < count:
            if not queue:
                self._refill(got)
                if not queue:
                    break
            slot, tick = queue.popleft()
            state = states[slot]
            if state == EMPTY or (state == READY and stamps[slot] == tick and not sums[slot]):
                got.append(slot)
        self._empty([slot for slot in got if states[slot] != EMPTY])
        got.sort()
        return got

    def _refill(self, but: Sequence[int]) -> None:
        """Look for slots to give away next, others than `but`. What is looked for once lasts for many calls, and its
        order is exact: whatever is used later bears a later tick than all that were found."""
        batch = max(1024, self.slots // 16)
        found = self._others(np.flatnonzero(self._state == EMPTY), but)[:batch]
        if not len(found):
            found = self._others(np.flatnonzero((self._state == READY) & (self._pins == 0)), but)
            if len(found) > batch:
                found = found[np.argpartition(self._ticks[found], batch)[:batch]]
            found = found[np.argsort(self._ticks[found])]
        self._queue.extend(zip(found.tolist(), self._ticks[found].tolist(), strict=True))

    @staticmethod
    def _others(found: npt.NDArray[np.int64], but: Sequence[int]) -> npt.NDArray[np.int64]:
        return found[~np.isin(found, but)] if but else found

    # -- checking ----------------------------------------------------------------------------------

    def held(self) -> int:
        """Slots that this participant has pinned or is writing."""
        writing = (self._state == WRITING) & (self._owner == self._seat)
        return int(np.count_nonzero(self._pinned[self._seat]) + np.count_nonzero(writing))

    def held_by_any(self) -> int:
        """Slots that anybody has pinned or is writing."""
        return int(np.count_nonzero(self._pins) + np.count_nonzero(self._state == WRITING))

    def check_integrity(self, where: str | Path) -> None:
        """IntegrityError unless the table and all sums agree with the records."""
        with self._segment:
            used = np.flatnonzero(self._state)
            listed = sorted((int(c) & _LOW) - 1 for c in self._table if c)
            self._check(where, listed == used.tolist(), f"{len(listed)} pages listed, {len(used)} in slots")
            self._check(where, self.used == len(used), f"{self.used} slots counted, {len(used)} used")
            for slot in used.tolist():
                self._check(where, self._find([self._key(slot)]) == [slot], f"slot {slot} is not found by its key")
            self._check(where, bool((self._pinned.sum(axis=0) == self._pins).all()), "pins do not add up")

    @staticmethod
    def _check(where: str | Path, ok: bool, message: str) -> None:
        if not ok:
            raise IntegrityError(f"tier at {where}", message)


def _table_size(slots: int) -> int:
    return 1 << max(6, (4 * slots - 1).bit_length())
