"""Which page is in which slot, who holds it, and what goes first."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from rayk.tiers.directory import FULL, PRESENT, Directory

Make = Callable[..., Directory]
Killed = Callable[[str], None]


def key(n: int) -> bytes:
    """The hash of page n."""
    return hashlib.sha256(b"%d" % n).digest()


def keys(*numbers: int) -> list[bytes]:
    return [key(n) for n in numbers]


def fill(d: Directory, *numbers: int) -> list[int]:
    slots = d.reserve(keys(*numbers))
    d.publish([s for s in slots if s >= 0])
    return slots


def there(d: Directory, *numbers: int) -> list[int]:
    return [n for n in numbers if d.contains(key(n))]


def test_a_page_is_found_only_after_it_was_published(directory: Make) -> None:
    d = directory(4)
    [slot] = d.reserve([key(1)])
    assert not d.contains(key(1))
    assert d.pin([key(1)]) == [-1]
    assert d.reserve([key(1)]) == [PRESENT]  # on its way: not written twice
    d.publish([slot])
    assert d.contains(key(1))
    assert d.pin([key(1)]) == [slot]
    d.unpin([slot])
    assert d.used == 1
    d.check_integrity("test")


def test_an_abandoned_slot_is_empty_again(directory: Make) -> None:
    d = directory(1)
    d.abandon(d.reserve([key(1)]))
    assert d.used == 0
    assert fill(d, 2) == [0]
    assert there(d, 1, 2) == [2]


def test_the_least_recently_used_goes_first_and_of_a_run_the_deepest(directory: Make) -> None:
    d = directory(4)
    fill(d, 1, 2), fill(d, 3, 4)
    fill(d, 5)
    assert there(d, 1, 2, 3, 4, 5) == [1, 3, 4, 5]
    d.touch(keys(1))
    fill(d, 6, 7)
    assert there(d, 1, 3, 4, 5, 6, 7) == [1, 5, 6, 7]
    d.unpin(d.pin(keys(5)))  # reading is using
    fill(d, 8)
    assert there(d, 1, 5, 6, 7, 8) == [5, 6, 7, 8]
    d.check_integrity("test")


def test_pinned_pages_stay_and_a_full_tier_says_so(directory: Make) -> None:
    d = directory(2)
    fill(d, 1, 2)
    held = d.pin(keys(1, 9, 2))
    assert held[1] == -1
    assert d.reserve(keys(3)) == [FULL]
    d.unpin([held[0]])
    assert fill(d, 3) == [held[0]]
    assert there(d, 1, 2, 3) == [2, 3]
    assert d.held() == 1
    d.unpin([held[2]])
    assert d.held() == 0


def test_what_comes_together_lies_together(directory: Make) -> None:
    d = directory(64)
    for turn in range(12):  # most of them take the places of others
        numbers = range(16 * turn, 16 * turn + 16)
        slots = fill(d, *numbers)
        assert slots == list(range(slots[0], slots[0] + 16))
    d.check_integrity("test")


def test_to_ask_for_a_place_for_a_page_that_is_there_is_to_use_it(directory: Make) -> None:
    d = directory(4)
    fill(d, 1), fill(d, 2), fill(d, 3), fill(d, 4)
    assert d.reserve(keys(1, 5, 2))[::2] == [PRESENT, PRESENT]
    assert there(d, 1, 2, 3, 4) == [1, 2, 4]
    d.publish([d.reserve(keys(6))[0]])
    assert there(d, 1, 2, 4, 6) == [1, 2, 6]


def test_publishing_can_pin(directory: Make) -> None:
    d = directory(2)
    slots = d.reserve(keys(1, 2))
    d.publish(slots, pin={slots[1]})
    assert d.reserve(keys(3, 4))[1] == FULL
    assert there(d, 1, 2) == [2]


def test_seized_pages_are_found_no_more(directory: Make) -> None:
    d = directory(3)
    [one, two, three] = fill(d, 1, 2, 3)
    [held] = d.pin(keys(2))
    assert not d.seize(held, key(2))
    assert d.seize(one, key(1))
    assert not d.seize(three, key(1))  # the slot has another page by now
    assert d.seize_all() == [three]
    assert there(d, 1, 2, 3) == [2]
    d.abandon([one, three])
    assert (d.used, two) == (1, held)
    d.check_integrity("test")


def test_short_hashes(directory: Make) -> None:
    d = directory(2)
    d.publish(d.reserve([key(1)[:16]]))
    assert d.contains(key(1)[:16])
    assert not d.contains(key(2)[:16])
    d.check_integrity("test")


def test_many_pages_in_a_crowded_table(directory: Make) -> None:
    d = directory(100)
    for n in range(1000):
        fill(d, n)
    assert there(d, *range(1000)) == list(range(900, 1000))
    d.check_integrity("test")


DIE = """
from rayk.tiers.directory import Directory
from rayk.tiers.segment import Segment
d = Directory(Segment.attach(Path({path!r}), Directory.num_bytes({slots}), {slots}, lambda s: None), {slots})
{work}
die()
"""


def test_what_the_dead_held_is_free_again(directory: Make, shm: Path, killed: Killed) -> None:
    d = directory(4, shm)
    fill(d, 1, 2)
    killed(DIE.format(path=str(shm), slots=4, work="d.pin(keys(1)); d.reserve(keys(3, 4))"))
    assert d.held_by_any() == 3
    assert d.reserve(keys(5, 6))[1] == FULL  # 2 made way; 1 is pinned by the dead
    lost = d.reap()
    assert len(lost) == 2
    assert not there(d, 3, 4)  # half-written pages were never to be seen
    d.abandon(lost)
    assert d.held_by_any() == 1  # page 5, which this test is writing
    assert there(d, 1) == [1]
    assert d.reap() == []
    d.check_integrity("test")


def test_a_newcomer_on_a_dead_seat_takes_over_what_was_left(directory: Make, shm: Path, killed: Killed) -> None:
    """Also what others left who died at the same time, each slot once."""
    d = directory(5, shm)
    two = "e = Directory(Segment.attach(Path({path!r}), Directory.num_bytes(5), 5, lambda segment: None), 5); "
    two = two.format(path=str(shm)) + "e.reserve(keys(5)); "
    work = two + "d.reserve(keys(3)); d.publish(d.reserve(keys(4)), pin={1})"
    killed(DIE.format(path=str(shm), slots=5, work=work))
    newcomer = directory(5, shm)
    lost = newcomer.reap(own_seat=True)
    assert len(lost) == len(set(lost)) == 2
    newcomer.abandon(lost)
    assert newcomer.held_by_any() == 0
    assert there(d, 3, 4, 5) == [4]
    d.check_integrity("test")


def test_a_death_in_the_middle_of_a_change_is_repaired(directory: Make, shm: Path, killed: Killed) -> None:
    d = directory(8, shm)
    fill(d, 1, 2, 3)
    # As if killed half-way through: the table lost its cells, a pin was counted once, a page was there twice.
    work = "s = d._segment; s.__enter__(); d._table[:] = 0; d._pinned[d._seat, 0] += 1; d._words[9] = 99\n"
    work += "d._keys[5] = d._keys[0]; d._state[5] = 2"
    killed(DIE.format(path=str(shm), slots=8, work=work))
    d.touch(keys(1))
    assert there(d, 1, 2, 3) == [1, 2, 3]
    assert d.used == 3
    assert d.reap() == []
    assert d.held_by_any() == 0
    d.check_integrity("test")
