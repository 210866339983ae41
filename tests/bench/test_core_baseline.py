"""Figures kept per commit: a regression shows, and an entry is only held against what it can be compared with."""

from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rayk.bench.core import command
from rayk.bench.core.baseline import OTHER_PYTHON, compare, read_baseline, save_baseline
from rayk.bench.core.case import CoreResult, make_figure
from rayk.bench.core.command import comparison_lines
from rayk.bench.core.limits import Bound
from rayk.cli import main as cli
from rayk.errors import ConfigError

TODAY = date(2026, 1, 2)


def result(
    w1: float = 10.0, speed: float = 1.0, commit: str = "aaa", python: str = "3.11.7", cpu: str = "x"
) -> CoreResult:
    return CoreResult(
        command="bench core",
        version="0",
        commit=commit,
        environment={"python": python, "cpu": cpu},
        unit_us=27.6 * speed,
        figures=[
            make_figure("w1", "t", "us", [w1], speed, bound=Bound()),
            make_figure("w2", "t", "us", [20.0], bound=Bound()),
        ],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "baseline.json"


def test_times_are_kept_as_on_the_reference(path: Path) -> None:
    entry = save_baseline(path, result(w1=5.0, speed=0.5), TODAY)
    assert entry.figures == {"w1": 10.0, "w2": 20.0} and (entry.commit, entry.date) == ("aaa", "2026-01-02")
    assert read_baseline(path) == [entry]


def test_a_commit_has_one_entry_that_grows(path: Path) -> None:
    save_baseline(path, result(w1=10.0), TODAY)
    save_baseline(path, result(w1=99.0, commit="bbb"), TODAY)
    again = msgspec.structs.replace(result(w1=11.0), figures=result(w1=11.0).figures[:1])
    save_baseline(path, again, TODAY)
    assert [(e.commit, e.figures) for e in read_baseline(path)] == [
        ("bbb", {"w1": 99.0, "w2": 20.0}),
        ("aaa", {"w1": 11.0, "w2": 20.0}),
    ]


def test_what_is_worse_and_what_is_better(path: Path) -> None:
    save_baseline(path, result(w1=10.0), TODAY)
    entries = read_baseline(path)
    assert [c.key for c in compare(entries, result(w1=11.1), 0.1).worse] == ["w1"]
    assert not compare(entries, result(w1=10.9), 0.1).worse
    assert [c.key for c in compare(entries, result(w1=8.0), 0.1).better] == ["w1"]
    assert compare(entries, result(w1=5.5, speed=0.5), 0.09).worse  # half the time on a machine twice as fast
    assert "w1: 10.0 -> 11.1, worse than aaa" in comparison_lines(compare(entries, result(w1=11.1), 0.1))[0]
    assert comparison_lines(compare(entries, result(), 0.1))[0].startswith("Nothing differs by more than 10%")


def test_the_newest_entry_of_the_same_python_and_processor_is_picked(path: Path) -> None:
    for commit, python, cpu in [("a", "3.11.7", "x"), ("b", "3.11.9", "x"), ("c", "3.11.7", "y"), ("d", "3.12.1", "x")]:
        save_baseline(path, result(commit=commit, python=python, cpu=cpu), TODAY)

    def picked(**environment: Any) -> str:
        return compare(read_baseline(path), result(**environment), 0.1).entry.commit

    assert picked(python="3.11.2", cpu="x") == "b"
    assert picked(python="3.11.2", cpu="y") == picked(python="3.11.2", cpu="z") == "c"
    assert picked(python="3.13.0", cpu="y") == "c" and picked(python="3.12.0", cpu="y") == "d"


def test_another_python_is_held_to_less(path: Path) -> None:
    save_baseline(path, result(w1=10.0), TODAY)
    entries = read_baseline(path)
    assert compare(entries, result(w1=12.0, python="3.12.0"), 0.03).tolerance == OTHER_PYTHON
    assert compare(entries, result(w1=13.0, python="3.12.0"), 0.03).worse
    assert compare(entries, result(w1=12.0), 0.03).worse


def test_files_that_are_no_baseline(path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_baseline(path)
    path.write_text('{"command": "bench"}')
    with pytest.raises(ConfigError, match="is not a baseline"):
        read_baseline(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="none of w1, w2"):
        compare(read_baseline(path), result(), 0.1)


def test_a_regression_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: result(w1=10.0))
    assert cli.main(["bench", "core", "--save", str(path)]) == 0
    monkeypatch.setattr(command, "_measure", lambda *_: result(w1=11.5))
    assert cli.main(["bench", "core", "--baseline", str(path)]) == 0
    assert cli.main(["bench", "core", "--baseline", str(path), "--check"]) == 1
    assert "w1 was 10 and is 11.5" in capsys.readouterr().err
    assert cli.main(["bench", "core", "--baseline", str(path), "--check", "--tolerance", "0.2"]) == 0
    assert cli.main(["bench", "core", "--baseline", str(path), "--tolerance", "0"]) == 2
    assert cli.main(["bench", "core", "--smoke", "--save", str(path)]) == 2
