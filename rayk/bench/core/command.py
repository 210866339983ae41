"""`rayk bench core`: measures, prints and judges. What is measured is in run.py and one_off.py."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import rayk
from rayk.bench.command import make_folder
from rayk.bench.core.baseline import Comparison, compare, cpu_model, read_baseline, running_commit, save_baseline
from rayk.bench.core.case import CoreResult, Figure
from rayk.bench.core.clock import Unit
from rayk.bench.core.one_off import ONE_OFF
from rayk.bench.core.run import make_cases, picked_groups, run_cases
from rayk.bench.flags import REPEAT, CoreFlags
from rayk.bench.result import environment
from rayk.cli.flags import Format
from rayk.cli.table import make_table
from rayk.errors import ConfigError

log = logging.getLogger("rayk.bench")
COLUMNS = ("", "workload", "here", "limit here", " ", "on the reference", "best peer there", "times")


def core(flags: CoreFlags) -> int:
    """Measure, print and judge."""
    if flags.smoke and (flags.check or flags.save):
        raise ConfigError("--smoke is too short to judge by; leave out --smoke, or --check and --save")
    if not 0 < flags.tolerance < 10:
        raise ConfigError(f"--tolerance is {flags.tolerance}, a share such as 0.1 is needed")
    if flags.repeat is not None and flags.repeat < 1:
        raise ConfigError(f"--repeat is {flags.repeat}, at least 1 is needed")

    if flags.out is not None:
        make_folder(flags.out)
    groups = picked_groups(flags.only)
    entries = None if flags.baseline is None else read_baseline(flags.baseline)  # before minutes of work
    result = _measure(groups, flags.trace, flags.repeat or (1 if flags.smoke else REPEAT), flags.smoke)
    comparison = None if entries is None else compare(entries, result, flags.tolerance)
    if flags.out is not None:
        (flags.out / "core.json").write_bytes(result.to_json() + b"\n")
    if flags.save is not None:
        save_baseline(flags.save, result)
    _print(flags, result, comparison)
    if not flags.check:
        return 0
    for figure in result.exceeded:
        log.error("%s is %.4g %s, its limit here is %.4g", figure.key, figure.value, figure.unit, figure.limit_here)
    worse = [] if comparison is None else comparison.worse
    for change in worse:
        log.error("%s was %.4g and is %.4g", *change)
    return int(bool(result.exceeded or worse))


def _print(flags: CoreFlags, result: CoreResult, comparison: Comparison | None) -> None:

    if flags.form is Format.json:
        sys.stdout.write(result.to_json().decode() + "\n")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a log has no width: one line a figure
    console.print(result_table(result))
    for line in (*notes(result), *(comparison_lines(comparison) if comparison else ())):
        console.print(line, soft_wrap=True, highlight=False)


def _measure(groups: list[str], trace: Path | None, repeat: int, smoke: bool) -> CoreResult:
    torch.set_num_threads(1)
    unit = Unit()
    with Console(stderr=True).status("preparing") as status, redirect_stdout(sys.stderr):  # Ray prints its logs
        figures = run_cases(make_cases(groups, trace, smoke), unit, repeat, status.update)
        for name, measure in ONE_OFF.items():
            if name in groups:
                unit.sample()
                figures += measure(unit, 1 if smoke else 3, status.update)
    return CoreResult(
        command="bench core",
        version=rayk.__version__,
        commit=running_commit(),
        environment=environment() | {"cpu": cpu_model()},
        unit_us=unit.us,
        figures=figures,
        smoke=smoke,
    )


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def result_table(result: CoreResult) -> Table:
    """One row a figure; `times` is the best peer's figure over ours, both on the reference machine."""
    speed = f"{result.unit_us:.2f} us, {result.unit_us / result.reference_us:.2f} of the reference machine's"
    title = f"rayk bench core: unit {speed} {result.reference_us} us"
    table = make_table(title, COLUMNS, map(_row, result.figures), left=("", "workload", " ", "best peer there"))
    for column in table.columns:
        column.no_wrap = column.header in ("", "here", " ")
    return table


def notes(result: CoreResult) -> list[str]:
    """What the table has no column for, a line each."""
    out = []
    for figure in result.figures:
        if figure.details:
            details = (f"{name.replace('_', ' ')} {number(value)}" for name, value in figure.details.items())
            out.append(f"{figure.key}: {', '.join(details)}")
    if result.smoke:
        out.append("A smoke run is too short to judge by.")
    return out


def comparison_lines(comparison: Comparison) -> list[str]:
    """How a result differs from its baseline."""
    entry = comparison.entry
    than = f"{entry.commit[:10]} ({entry.date}, Python {entry.python}, {entry.cpu})"
    out = [
        f"{change.key}: {number(change.before)} -> {number(change.after)}, {word} than {than}"
        for word, changes in (("worse", comparison.worse), ("better", comparison.better))
        for change in changes
    ]
    return out or [f"Nothing differs by more than {comparison.tolerance:.0%} from {than}."]


def _row(figure: Figure) -> tuple[str, ...]:
    verdict = {None: "", True: "[green]ok[/]", False: "[red]over[/]"}[figure.ok]
    faster = figure.times_faster
    return (
        figure.key,
        figure.title,
        f"{number(figure.value)} {figure.unit}".rstrip(),
        "" if figure.limit_here is None else number(figure.limit_here),
        verdict,
        number(figure.at_reference),
        "" if figure.best is None else f"{number(figure.best)} {figure.peer}",
        "" if faster is None else f"{faster:.1f}",
    )
