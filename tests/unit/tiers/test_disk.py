"""The disk tier: its budget, restarts, damage, and disks that fail."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rayk.tiers import disk as module
from rayk.tiers import files
from rayk.tiers.connector import TierCounters
from rayk.tiers.disk import DiskTier
from rayk.tiers.files import HEADER_BYTES

BYTES = 500
FILE = BYTES + HEADER_BYTES
Open = Callable[..., DiskTier]


def key(n: int) -> bytes:
    """The hash of page n."""
    return hashlib.sha256(b"%d" % n).digest()


def page(n: int) -> np.ndarray:
    return np.full(BYTES, n % 256, np.uint8)


def read(tier: DiskTier, n: int) -> bool:
    into = np.zeros(BYTES, np.uint8)
    good = tier.read(key(n), into)
    assert not good or np.array_equal(into, page(n))
    return good


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".kv", ".tmp"))


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[Open]:
    tiers: list[DiskTier] = []

    def make(pages: int = 4, fingerprint: int = 1) -> DiskTier:
        counters = TierCounters()
        tiers.append(DiskTier(tmp_path, fingerprint, BYTES, pages * FILE, pages * FILE // BYTES, 32, counters))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


def test_pages_come_back_and_the_oldest_go(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier(4)
    for n in range(4):
        assert tier.write(key(n), page(n))
    assert not tier.write(key(0), page(0))  # it is there
    assert read(tier, 0)
    assert tier.write(key(9), page(9))
    assert [n for n in (0, 1, 2, 3, 9) if tier.contains(key(n))] == [0, 2, 3, 9]
    assert [n for n in (0, 1, 2, 3, 9) if read(tier, n)] == [0, 2, 3, 9]
    assert on_disk(tmp_path) == 4 * FILE
    assert (tier.capacity, tier.used) == (4 * FILE // BYTES, 4)
    tier.check_integrity()


def test_the_budget_holds_at_every_moment(open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    real = os.rename
    monkeypatch.setattr(files.os, "rename", lambda a, b: (peaks.append(on_disk(tmp_path)), real(a, b)))
    tier = open_tier(3)
    for n in range(20):
        tier.write(key(n), page(n))
    assert len(peaks) == 20
    assert max(peaks) == 3 * FILE


def test_a_restart_finds_them_in_order_of_use(open_tier: Open) -> None:
    tier = open_tier(3)
    for n in range(3):
        tier.write(key(n), page(n))
        os.utime(tier._path(n), (n, n))
    os.utime(tier._path(0), (9, 9))  # used last
    tier.close()
    again = open_tier(3)
    assert [n for n in range(3) if read(again, n)] == [0, 1, 2]
    again.close()
    os.utime(again.folder / "0000" / f"{1:08x}.kv", (1, 1))
    third = open_tier(3)
    third.write(key(7), page(7))
    assert [n for n in (0, 1, 2, 7) if third.contains(key(n))] == [0, 2, 7]


def test_a_smaller_budget_keeps_what_fits(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier(6)
    for n in range(6):
        tier.write(key(n), page(n))
    tier.close()
    smaller = open_tier(2)
    assert on_disk(tmp_path) <= 2 * FILE
    assert sum(read(smaller, n) for n in range(6)) == 2


def test_unsound_files_are_misses_counted_and_removed(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier(8)
    for n in range(6):
        tier.write(key(n), page(n))
    paths = [tier._path(n) for n in range(6)]
    good = paths[0].read_bytes()
    paths[0].write_bytes(good[:-1] + b"\xff")
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[2].write_bytes(paths[3].read_bytes())
    paths[4].unlink()
    assert [n for n in range(6) if read(tier, n)] == [3, 5]
    assert (tier._counters.damaged, tier._counters.foreign) == (2, 1)
    assert not any(p.exists() for p in (paths[0], paths[1], paths[2]))
    assert tier.used == 2
    assert tier.write(key(0), page(0))
    assert read(tier, 0)
    tier.check_integrity()


def test_unsound_files_are_found_by_a_scan(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier(8)
    for n in range(5):
        tier.write(key(n), page(n))
    paths = [tier._path(n) for n in range(5)]
    tier.close()
    paths[0].write_bytes(b"RKPG" + bytes([9, 0]) + paths[0].read_bytes()[6:])
    paths[1].write_bytes(paths[1].read_bytes()[:90])
    paths[2].write_bytes(b"something else")
    paths[3].with_suffix(".tmp").write_bytes(b"a write that was cut short")
    (tier.folder / "0000" / "notes.txt").write_text("not ours")
    again = open_tier(8)
    c = again._counters
    assert (c.outdated, c.damaged, c.foreign) == (1, 1, 1)
    assert [n for n in range(5) if read(again, n)] == [3, 4]
    left = sorted(p.name for p in (again.folder / "0000").iterdir())
    assert left == ["00000003.kv", "00000004.kv", "notes.txt"]


def test_models_do_not_see_each_other(open_tier: Open) -> None:
    one, two = open_tier(fingerprint=1), open_tier(fingerprint=2)
    one.write(key(1), page(1))
    assert not two.contains(key(1))


def test_two_processes_share_the_pages_and_the_budget(open_tier: Open, tmp_path: Path) -> None:
    one, two = open_tier(4), open_tier(4)
    one.write(key(1), page(1))
    assert read(two, 1)
    for n in range(10):
        (one, two)[n % 2].write(key(n), page(n))
    assert one.used == two.used == 4
    assert on_disk(tmp_path) == 4 * FILE


def test_another_budget_or_machine_takes_another_lane(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = open_tier(4), open_tier(5)
    assert (one.folder.name[-2:], two.folder.name[-2:]) == ("-0", "-1")
    monkeypatch.setattr(module, "_machine", lambda: 77)
    three = open_tier(4)
    assert three.folder.name[-2:] == "-2"
    one.write(key(1), page(1)), three.write(key(1), page(1))
    assert read(one, 1) and read(three, 1) and not read(two, 1)


def test_a_full_disk_turns_the_tier_off_with_one_warning(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier()
    tier.write(key(1), page(1))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "writev", full)
    with caplog.at_level(logging.WARNING, "rayk"):
        assert not tier.write(key(2), page(2))
        assert not tier.write(key(3), page(3))
    assert "No space left" in tier.trouble
    assert len(caplog.records) == 1
    assert not tier.contains(key(1))
    assert not read(tier, 1)


@pytest.mark.parametrize("what", ["a file", "too small"])
def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, size = tmp_path / "tier", 4 * FILE
    if what == "a file":
        folder.write_text("in the way")
    else:
        size = FILE - 1
    tier = DiskTier(folder, 1, BYTES, size, size // BYTES, 32, TierCounters())
    assert tier.trouble
    assert not tier.write(key(1), page(1))
    assert not tier.contains(key(1))
    tier.reset(), tier.reap(), tier.check_integrity(), tier.close()
    assert len(caplog.records) == 1


DIE = """
import numpy as np
from rayk.tiers.connector import TierCounters
from rayk.tiers.disk import DiskTier
tier = DiskTier(Path({folder!r}), 1, 500, 4 * 564, 4, 32, TierCounters())
if {where!r} == "before the rename":
    os.rename = die
else:
    tier._directory.publish = die
tier.write(key(3), np.full(500, 3, np.uint8))
"""


@pytest.mark.parametrize("where", ["before the rename", "after it"])
def test_a_writer_that_dies_leaves_nothing(
    open_tier: Open, tmp_path: Path, where: str, killed: Callable[[str], None]
) -> None:
    tier = open_tier(4)
    tier.write(key(1), page(1))
    killed(DIE.format(folder=str(tmp_path), where=where))
    assert tier.used == 2
    assert not read(tier, 3)
    tier.reap()
    assert tier.used == 1
    assert on_disk(tmp_path) == FILE
    assert read(tier, 1)
    assert tier.write(key(3), page(3))
    assert read(tier, 3)
    tier.check_integrity()
