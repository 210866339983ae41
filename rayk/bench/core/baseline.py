"""Figures of earlier commits, in a file of the repository, so that a regression shows; and what a result was measured
on: the commit and the processor.

Times are kept as they come to on the reference machine (clock.py), instructions as they are. Newer entries come last.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from rayk.bench.core.case import CoreResult
from rayk.errors import ConfigError

OTHER_PYTHON = 0.25  # how much may differ from an entry of another minor version of Python


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one commit, at_reference by key, and what they were measured with."""

    commit: str
    date: str
    python: str
    cpu: str
    unit_us: float
    figures: dict[str, float]


class Change(NamedTuple):
    """A figure that differs from the baseline's by the factor `after / before`."""

    key: str
    before: float
    after: float


class Comparison(NamedTuple):
    """What differs from `entry` by more than `tolerance` (.1 is 10 %)."""

    entry: Entry
    tolerance: float
    worse: list[Change]
    better: list[Change]


def minor(python: str) -> str:
    """The minor version of a full one: 3.11."""
    return ".".join(python.split(".")[:2])


def read_baseline(path: Path) -> list[Entry]:
    """The entries of a file, oldest first. ConfigError says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Entry])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); write it with --save {path}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a baseline of rayk bench core: {error}") from None


def save_baseline(path: Path, result: CoreResult, today: date | None = None) -> Entry:
    """Add the result to a file, in place of what the same commit had there for the same Python and processor."""
    entry = Entry(
        commit=result.commit or "unknown",
        date=(today or datetime.now(UTC).date()).isoformat(),
        python=result.environment["python"],
        cpu=result.environment["cpu"],
        unit_us=round(result.unit_us, 3),
        figures={figure.key: float(f"{figure.at_reference:.5g}") for figure in result.figures},
    )
    before = read_baseline(path) if path.exists() else []
    made = (entry.commit, minor(entry.python), entry.cpu)
    same = [other for other in before if (other.commit, minor(other.python), other.cpu) == made]
    figures = {key: value for other in same for key, value in other.figures.items()}
    entry = msgspec.structs.replace(entry, figures=figures | entry.figures)
    entries = [*(other for other in before if other not in same), entry]
    path.write_bytes(msgspec.json.format(msgspec.json.encode(entries), indent=1) + b"\n")
    return entry


def pick(entries: list[Entry], result: CoreResult) -> Entry:
    """The newest entry with any of the result's figures; of its Python and processor, or else of its Python, if any."""
    keys = {figure.key for figure in result.figures}
    usable = [entry for entry in entries if keys & entry.figures.keys()]
    if not usable:
        raise ConfigError(f"the baseline has none of {', '.join(sorted(keys))}; write one with --save")
    python, cpu = minor(result.environment["python"]), result.environment["cpu"]
    return max(reversed(usable), key=lambda entry: (minor(entry.python) == python, entry.cpu == cpu))


def compare(entries: list[Entry], result: CoreResult, tolerance: float) -> Comparison:
    """The result against the entry that suits it best; with OTHER_PYTHON where that is of another Python."""
    entry = pick(entries, result)
    if minor(entry.python) != minor(result.environment["python"]):
        tolerance = max(tolerance, OTHER_PYTHON)
    known = [
        Change(figure.key, entry.figures[figure.key], figure.at_reference)
        for figure in result.figures
        if figure.key in entry.figures
    ]
    return Comparison(
        entry,
        tolerance,
        worse=[change for change in known if change.after > change.before * (1 + tolerance)],
        better=[change for change in known if change.after < change.before / (1 + tolerance)],
    )


def running_commit() -> str | None:
    """The commit of the checkout that this package lies in, "+changes" if it differs from it; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit, tracked = git("rev-parse", "HEAD"), git("ls-files", Path(__file__).name)
    if not commit or not tracked:  # installed into some other checkout's environment
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def cpu_model() -> str:
    """The processor's name, as Linux has it; the architecture where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
