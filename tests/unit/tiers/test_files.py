"""Page files: whatever happened to them, a page is never taken for what it is not."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from rayk.tiers.files import HEADER_BYTES, VERSION, Verdict, read_head, read_page, write_page

PAGE = np.arange(200, dtype=np.uint8)
MINE, THEIRS = 0x1234, 0x1235


def key(n: int) -> bytes:
    """The hash of page n."""
    return hashlib.sha256(b"%d" % n).digest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "page.kv"
    write_page(path, MINE, key(1), PAGE)
    return path


def read(path: Path, fingerprint: int = MINE, n: int = 1) -> Verdict:
    into = np.zeros(200, np.uint8)
    verdict = read_page(path, fingerprint, key(n), into)
    assert (verdict is Verdict.GOOD) == np.array_equal(into, PAGE) or verdict is Verdict.DAMAGED
    return verdict


def test_round_trip(path: Path) -> None:
    assert read(path) is Verdict.GOOD
    assert path.stat().st_size == HEADER_BYTES + 200
    head = read_head(path, MINE, 200, 32)
    assert (head.verdict, head.key) == (Verdict.GOOD, key(1))
    assert list(path.parent.iterdir()) == [path]


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in (1, 128):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            assert read(path) is not Verdict.GOOD, f"byte {at}"


@pytest.mark.parametrize("length", [0, 3, 7, 63, 64, 263, 265])
def test_another_length_is_noticed(path: Path, length: int) -> None:
    good = path.read_bytes()
    path.write_bytes((good + b"x")[:length])
    assert read(path) is Verdict.DAMAGED
    assert read_head(path, MINE, 200, 32).verdict is Verdict.DAMAGED


def test_pages_of_others_are_foreign(path: Path, tmp_path: Path) -> None:
    assert read(path, THEIRS) is Verdict.FOREIGN
    assert read(path, n=2) is Verdict.FOREIGN
    assert read_head(path, THEIRS, 200, 32).verdict is Verdict.FOREIGN
    path.write_bytes(b"\x80\x04cos\nsystem\n" + bytes(300))
    assert read(path) is Verdict.FOREIGN
    assert read(tmp_path / "none.kv") is Verdict.MISSING


def test_another_version_is_outdated(path: Path) -> None:
    good = path.read_bytes()
    path.write_bytes(good[:4] + (VERSION + 1).to_bytes(2, "little") + good[6:])
    assert read(path) is Verdict.OUTDATED


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.kv").mkdir()  # a rename onto it fails
    with pytest.raises(OSError, match="directory"):
        write_page(tmp_path / "page.kv", MINE, key(1), PAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["page.kv"]
