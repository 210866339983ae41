"""The disk tier: its budget, restarts, damage, and disks that fail."""

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rayk.kvcache.connector import TierCounters
from rayk.tiers import disk as module
from rayk.tiers import files, folder
from rayk.tiers.disk import DiskTier
from rayk.tiers.files import HEADER_BYTES
from rayk.tiers.identity import take_seed
from rayk.tiers.pause import Pause

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


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_tier(tmp_path: Path, clock: Clock) -> Iterator[Open]:
    tiers: list[DiskTier] = []

    def make(pages: int = 4, fingerprint: int = 1) -> DiskTier:
        counters = TierCounters()
        tiers.append(DiskTier(tmp_path, fingerprint, BYTES, pages * FILE, pages * FILE // BYTES, 32, counters, clock))
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


def test_nobody_else_reads_its_files(open_tier: Open, tmp_path: Path) -> None:
    """Whatever the umask is: pages, locks, and the seed that names them."""
    before = os.umask(0)
    try:
        tier = open_tier(8)
        assert tier.write(key(1), page(1))
        take_seed(tmp_path)
    finally:
        os.umask(before)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) >= 3 and {path.stat().st_mode & 0o777 for path in found} == {0o600}


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
    one, two = open_tier(4, fingerprint=1), open_tier(8, fingerprint=2)
    one.write(key(1), page(1)), two.write(key(2), page(2))
    assert not two.contains(key(1)) and two.contains(key(2))


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
    one, two = open_tier(4), open_tier(9)
    assert (one.folder.name[-2:], two.folder.name[-2:]) == ("-0", "-1")
    monkeypatch.setattr(folder, "machine", lambda: 77)
    three = open_tier(12)
    assert three.folder.name[-2:] == "-2"
    assert (one.slots, two.slots, three.slots) == (4, 5, 3), "what each was given includes what the others have"
    one.write(key(1), page(1)), three.write(key(1), page(1))
    assert read(one, 1) and read(three, 1) and not read(two, 1)


def test_a_full_disk_pauses_writes_with_one_warning_until_there_is_room(
    open_tier: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier()
    tier.write(key(1), page(1))

    def full(*_: object) -> int:
        clock.now += 0.01  # a try that costs something
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "writev", full)
    with caplog.at_level(logging.WARNING, "rayk"):
        assert not tier.write(key(2), page(2))
        assert not tier.write(key(3), page(3))
    assert "No space left" in tier.trouble
    assert len(caplog.records) == 1
    assert read(tier, 1), "what is there can be read"
    assert not tier.writes and tier.used == 1
    clock.now += 1
    assert tier.writes and not tier.write(key(2), page(2))
    clock.now += 0.15
    assert not tier.writes, "the second pause is longer"
    monkeypatch.undo()
    clock.now += 1
    assert tier.write(key(2), page(2)) and read(tier, 2)
    assert tier.trouble == "" and len(caplog.records) == 1
    tier.check_integrity()


def test_a_disk_that_refuses_at_once_is_back_at_once(
    open_tier: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(8)
    for n in range(4):
        tier.write(key(n), page(n))
    real = files.os.open

    def failing(*_: object) -> int:
        clock.now += 30e-6
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for _ in range(20):  # failures of one moment, each after the pause of the last
        monkeypatch.setattr(files.os, "open", failing)
        assert not read(tier, 0) and not tier.write(key(9), page(9))
        assert not tier.contains(key(0)) and not tier.writes
        clock.now += 0.01
        monkeypatch.setattr(files.os, "open", real)
        assert tier.contains(key(0)) and tier.writes
    assert all(read(tier, n) for n in range(4)) and tier.write(key(9), page(9))
    assert tier.trouble == ""


def test_a_disk_that_takes_its_time_to_fail_is_left_alone_for_longer_each_time(clock: Clock) -> None:
    pause, waited = Pause("read from", clock), list[float]()
    for took in (2.0, 2.0, 2.0, 2.0, 0.5, 2.0, *[2.0] * 8):
        clock.now += took
        pause.failed("Input/output error", took)
        began = clock.now
        while not pause.over:
            clock.now += 0.05
        waited.append(round(clock.now - began, 1))
    assert waited[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2] and waited[-1] == 60.0
    pause.passed()
    pause.failed("Input/output error", 2.0)
    assert pause.trouble and not pause.over
    clock.now += 0.15
    assert pause.over, "a success starts anew"


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
from rayk.kvcache.connector import TierCounters
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


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": lambda path: (path / "inside").mkdir(parents=True),
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "link to a pipe": lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to(path.parent / "pipe")),
}


@pytest.mark.parametrize("running", [False, True], ids=["before a start", "while it runs"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_costs_only_itself(open_tier: Open, kind: str, running: bool) -> None:
    tier = open_tier(4)
    for n in range(4):
        tier.write(key(n), page(n))
    path = tier._path(1)
    if not running:
        tier.close()
    path.unlink()
    KINDS[kind](path)
    if not running:
        tier = open_tier(4)
    assert [read(tier, n) for n in range(4)] == [True, False, True, True]
    for n in range(4, 12):
        tier.write(key(n), page(n))
    assert sum(read(tier, n) for n in range(12)) >= 3
    assert not tier.trouble
    assert kind != "folder" or path.is_dir(), "what is in a folder is not ours to remove"
    tier.check_integrity()
    assert tier.held() == 0


@pytest.mark.parametrize("where", ["read_page", "read_head"])
def test_a_file_that_cannot_be_read_now_is_a_miss_and_stays(
    open_tier: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    tier = open_tier(8)
    for n in range(5):
        tier.write(key(n), page(n))
    bad, real = tier._path(2), getattr(module, where)

    def failing(path: Path, *rest: object) -> object:
        if path == bad:
            raise OSError(5, "Input/output error")
        return real(path, *rest)

    monkeypatch.setattr(module, where, failing)
    if where == "read_head":
        tier.close()
        tier = open_tier(8)
    assert [n for n in range(5) if read(tier, n)] == [0, 1, 3, 4]
    assert not tier.trouble and bad.exists()
    assert not tier.contains(key(2))
    for n in range(10, 13):
        assert tier.write(key(n), page(n))
    assert bad.exists(), "there are other slots"
    monkeypatch.undo()
    clock.now += 10
    if where == "read_head":
        tier.close()
        tier = open_tier(8)
    assert [n for n in range(5) if read(tier, n)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_errors_that_pass_remove_nothing(
    open_tier: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    tier = open_tier(8)
    for n in range(6):
        tier.write(key(n), page(n))

    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "open", failing)
    assert not any(read(tier, n) for n in range(6))
    assert not tier.write(key(9), page(9))
    assert os.strerror(code) in tier.trouble
    monkeypatch.undo()
    assert not tier.contains(key(5)), "not before the pause is over"
    clock.now += 10
    assert all(read(tier, n) for n in range(6))
    assert tier.write(key(9), page(9))
    assert tier.trouble == ""


def test_a_start_passes_over_files_that_do_not_answer(open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(8)
    for n in range(6):
        tier.write(key(n), page(n))
    bad, real, gate = {tier._path(1), tier._path(4)}, module.read_head, threading.Event()
    tier.close()

    def hangs(path: Path, *rest: object) -> object:
        if path in bad:
            gate.wait(60)
        return real(path, *rest)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(module, "read_head", hangs)
    monkeypatch.setattr(module, "STALL_SECONDS", 0.05)
    again = open_tier(8)
    assert [n for n in range(6) if again.contains(key(n))] == [0, 2, 3, 5]
    gate.set()
    assert all(path.exists() for path in bad)


def test_a_folder_that_does_not_answer_is_given_up(open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(module, "OPEN_SECONDS", 0.05)
    monkeypatch.setattr(module, "take_lane", lambda *_: gate.wait(60))
    tier = open_tier()
    assert "no answer" in tier.trouble and not tier.write(key(1), page(1))
    gate.set()


def test_a_write_that_ends_after_a_reset_leaves_nothing(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    real = module.write_page

    def slow(*rest: object) -> None:
        tier.reset()
        real(*rest)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(module, "write_page", slow)
    assert not tier.write(key(1), page(1))
    assert (on_disk(tmp_path), tier.used) == (0, 0)
    tier.check_integrity()
