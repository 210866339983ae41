"""One budget for all that is in a tier's folder, whoever uses it, and what becomes of what nobody uses."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rayk.kvcache.connector import TierCounters
from rayk.tiers import folder as module
from rayk.tiers.disk import DiskTier
from rayk.tiers.files import HEADER_BYTES
from rayk.tiers.identity import keep_seed, read_seed, take_seed

BYTES = 500
FILE = BYTES + HEADER_BYTES
Open = Callable[..., DiskTier]


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def fill(tier: DiskTier, pages: int) -> int:
    """Write so many pages; how many are there then."""
    for n in range(pages):
        tier.write(key(n), np.full(BYTES, n, np.uint8))
    return sum(tier.contains(key(n)) for n in range(pages))


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.kv"))


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[Open]:
    tiers: list[DiskTier] = []

    def make(model: int, pages: int = 6) -> DiskTier:
        tiers.append(DiskTier(tmp_path, model, BYTES, pages * FILE, pages * FILE // BYTES, 32, TierCounters()))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


def test_models_that_nobody_uses_any_more_make_room(open_tier: Open, tmp_path: Path) -> None:
    for model in range(5):
        tier = open_tier(model)
        assert fill(tier, 9) == 6
        tier.close()
        assert on_disk(tmp_path) == 6 * FILE
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [tier.folder.name]


def test_the_same_model_finds_its_pages_again_whatever_its_budget(open_tier: Open) -> None:
    first = open_tier(1)
    fill(first, 6)
    first.close()
    again = open_tier(1, pages=9)
    assert sum(again.contains(key(n)) for n in range(6)) == 6


def test_running_clusters_stay_within_the_budget_together(open_tier: Open, tmp_path: Path) -> None:
    one, two, three = open_tier(1), open_tier(2, pages=10), open_tier(3, pages=10)
    assert [fill(tier, 20) for tier in (one, two)] == [6, 4]
    assert three.off and "taken by what else is in it" in three.off and fill(three, 3) == 0
    assert on_disk(tmp_path) == 10 * FILE
    assert fill(one, 6) == 6, "nobody's pages were removed for another"
    two.close()
    assert fill(open_tier(4, pages=9), 9) == 3
    assert on_disk(tmp_path) == 9 * FILE


def test_who_was_killed_holds_nothing(open_tier: Open, tmp_path: Path, killed: Callable[[str], None]) -> None:
    killed(
        "import numpy as np\nfrom rayk.kvcache.connector import TierCounters\nfrom rayk.tiers.disk import DiskTier\n"
        f"tier = DiskTier(Path({str(tmp_path)!r}), 7, {BYTES}, {6 * FILE}, 6, 32, TierCounters())\n"
        f"[tier.write(key(n), np.full({BYTES}, n, np.uint8)) for n in range(6)]\ndie()"
    )
    assert on_disk(tmp_path) == 6 * FILE
    assert fill(open_tier(1), 6) == 6
    assert on_disk(tmp_path) == 6 * FILE


def test_what_is_not_ours_stays(open_tier: Open, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.kv").write_text("somebody's")
    (tmp_path / "0123456789abcdef-12").mkdir()
    open_tier(1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir())[1:] == ["0123456789abcdef-12", "notes"]
    assert (tmp_path / "notes" / "a.kv").exists()


def test_what_cannot_be_removed_counts(open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_tier(1)
    fill(old, 4)
    old.close()
    monkeypatch.setattr(module, "REMOVE_SECONDS", -1.0)
    assert fill(open_tier(2), 9) == 2
    assert on_disk(tmp_path) <= 6 * FILE


def test_a_budget_beyond_the_disk_is_cut_with_a_warning(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = module.shutil.disk_usage("/")._replace(free=3 * FILE + 5)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: full)
    with caplog.at_level(logging.WARNING, "rayk"):
        tier = open_tier(1)
    assert (tier.slots, len(caplog.records)) == (3, 1)
    assert "Lower the budget" in caplog.text


def test_a_lane_of_those_who_came_first_is_joined_with_their_pages(open_tier: Open) -> None:
    open_tier(1, pages=2)
    first, second = open_tier(2), open_tier(2)
    assert (first.slots, second.slots) == (4, 4)
    assert fill(first, 4) == 4 and second.contains(key(3))


def test_all_who_start_together_get_one_seed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        seeds = set(threads.map(lambda _: take_seed(tmp_path / "new"), range(32)))
    assert seeds == {read_seed(tmp_path / "new")}


def test_a_seed_file_that_is_none_is_replaced_once(tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(b"short")
    with ThreadPoolExecutor(8) as threads:
        seeds = set(threads.map(lambda n: keep_seed(tmp_path, bytes([n]) * 32), range(16)))
    assert len(seeds) == 1 and seeds == {read_seed(tmp_path)}
    os.unlink(tmp_path / "seed")
    os.mkfifo(tmp_path / "seed")
    assert len(keep_seed(tmp_path, b"f" * 32)) == 32, "a pipe is not waited for"
