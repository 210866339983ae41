"""Shared memory that outlives any of its users."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rayk.errors import ConfigError, PlanError
from rayk.tiers import segment as module
from rayk.tiers.segment import Segment, SegmentBusyError, sweep

ATTACH = """
from rayk.tiers.segment import Segment
s = Segment.attach(Path({!r}), 64, 1, lambda s: None)
"""


def attach(path: Path | None, size: int = 64, key: int = 1) -> Segment:
    return Segment.attach(path, size, key, lambda s: s.body.fill(7))


def test_the_first_one_fills_it_and_all_see_the_same_bytes(shm: Path) -> None:
    one, two = attach(shm), attach(shm)
    assert (one.fresh, two.fresh) == (True, False)
    assert one.seat != two.seat
    one.body[3] = 9
    assert two.body[:4].tolist() == [7, 7, 7, 9]
    assert not one.close()
    assert two.close()  # the last one removes it
    assert not shm.exists()


def test_a_private_one_has_no_name() -> None:
    one, two = attach(None), attach(None)
    one.body[0] = 1
    assert two.body[0] == 7
    one.close(), two.close()


def test_nobody_else_may_open_it(shm: Path, tmp_path: Path) -> None:
    """Whatever the umask is; a file that others could have made, or a link, is not used."""
    before = os.umask(0)
    try:
        segment = attach(shm)
    finally:
        os.umask(before)
    assert stat.S_IMODE(shm.stat().st_mode) == 0o600
    segment.close()
    private = attach(None)
    assert stat.S_IMODE(os.fstat(private._fd).st_mode) == 0o600
    private.close()
    shm.write_bytes(bytes(8192))
    shm.chmod(0o666)
    with pytest.raises(OSError, match="others may open it"):
        attach(shm)
    shm.unlink()
    shm.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        attach(shm)
    assert not (tmp_path / "elsewhere").exists()


def test_other_settings_are_refused_while_it_is_used_and_replaced_afterwards(shm: Path) -> None:
    one = attach(shm)
    with pytest.raises(ConfigError, match="other settings"):
        attach(shm, key=2)
    with pytest.raises(ConfigError, match="other settings"):
        attach(shm, size=65)
    one.close()
    two = attach(shm, size=65, key=2)
    assert two.fresh
    two.close()


def test_what_does_not_fit_is_refused_and_leaves_nothing(shm: Path) -> None:
    with pytest.raises(PlanError, match="no room"):
        attach(shm, size=1 << 50)
    one = attach(shm)
    one.close()


def test_a_user_that_was_killed_counts_as_dead_and_its_file_is_swept(shm: Path, killed: Callable[[str], None]) -> None:
    code = ATTACH.format(str(shm)) + "die()"
    killed(code)
    one = attach(shm)
    assert not one.fresh  # it stays for whoever comes next
    # The newcomer took the dead one's seat; a second death leaves a seat behind.
    killed(code)
    with one:
        assert one.dead_seats() == [1]
    assert sweep(shm.parent, shm.name) == 0
    assert one.close()  # the dead do not keep it

    killed(code)
    assert shm.exists()
    assert sweep(shm.parent, shm.name) == 1
    assert not shm.exists()


def test_who_dies_with_the_lock_leaves_it_to_be_repaired(shm: Path, killed: Callable[[str], None]) -> None:
    one = attach(shm)
    repaired = []
    one.repair = lambda: repaired.append(True)
    with one:
        pass
    assert not repaired
    killed(ATTACH.format(str(shm)) + "s.__enter__(); die()")
    with one:
        assert repaired == [True]
    with one:
        assert repaired == [True]
    one.close()


def test_a_stopped_holder_costs_one_wait(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.01)
    one, two = attach(shm), attach(shm)
    for lock in (one._mutex, two._mutex):
        lock._seconds = lock._patience = 0.01
    with one:
        with pytest.raises(SegmentBusyError):
            two.__enter__()
        assert two._mutex._patience == 0
        with pytest.raises(SegmentBusyError):
            two.__enter__()
    with two:
        assert two._mutex._patience == 0.01
    one.close(), two.close()
