"""The proofs of the tiers on a small trace: what they print is counted, and what is wrong ends them."""

import json
import random
from pathlib import Path

import pytest

from rayk.tiers import files

from ..measure.tier_soak import Budget, damage, main  # noqa: TID252  # tests/ is no package with an absolute name


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations of a few turns that share their beginnings, as Mooncake writes them."""
    lines = []
    for at in range(60):
        chat, turn = at % 12, at // 12
        ids = [0, *range(100 * chat + 1, 100 * chat + 2 + turn)]
        lines.append({"timestamp": at, "input_length": 512 * len(ids), "output_length": 2, "hash_ids": ids})
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_what_was_cached_is_served_after_a_restart_and_bad_files_are_not(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["restart", "--trace", str(trace), "--dir", str(tmp_path / "soak"), "--requests", "60", "--pages", "200"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:4]] == ["cold", "warm", "restarted", "another model"]
    assert said[4].startswith("over ") and " 0 files rejected" not in said[4] and said[4].endswith(" 0 mismatches")
    assert said[5].startswith("disk peak ")


def test_a_budget_sees_what_is_written_meanwhile(tmp_path: Path) -> None:
    budget = Budget(tmp_path, 100)
    shelf = tmp_path / "lane" / "0000"
    shelf.mkdir(parents=True)
    (shelf / "00000000.kv").write_bytes(bytes(60))
    (shelf / "00000001.tmp").write_bytes(bytes(50))
    (tmp_path / "lane" / "lock").write_bytes(bytes(9))
    budget.look()
    (shelf / "00000001.tmp").unlink()
    budget.look()
    assert (budget.peak, budget.samples) == (110, 2)
    with budget.watched():
        pass
    assert budget.samples >= 3 and "peak 110 of 100" in str(budget)


def test_a_wrong_byte_ends_the_proof(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were files not checked when they are read, this is what it would say."""
    monkeypatch.setattr(files, "_checksum", lambda header, page: 0)
    with pytest.raises(AssertionError):
        main(["restart", "--trace", str(trace), "--dir", str(tmp_path / "soak"), "--requests", "60", "--pages", "200"])


def test_every_kind_of_damage_is_done(tmp_path: Path) -> None:
    shelf = tmp_path / "kv" / "lane" / "0000"
    shelf.mkdir(parents=True)
    for n in range(9):
        (shelf / f"{n}.kv").write_bytes(bytes(64))
    foreign = tmp_path / "foreign.kv"
    foreign.write_bytes(b"x" * 32)
    assert damage(tmp_path / "kv", [foreign], random.Random(1)) == 9
    found = sorted((path.read_bytes() for path in shelf.iterdir()), key=len)
    assert sum(b == b"x" * 32 for b in found) == 3
    assert sum(len(b) == 64 and any(b) for b in found) == 3 and sum(len(b) < 64 and b != b"x" * 32 for b in found) == 3
