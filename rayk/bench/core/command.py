"""`rayk bench core`: measures, prints and judges. What is measured is in run.py and one_off.py."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from rich.console import Console

import rayk
from rayk.bench.command import make_folder
from rayk.bench.core.baseline import Comparison, compare, read_baseline, save_baseline
from rayk.bench.core.clock import Unit
from rayk.bench.core.one_off import ONE_OFF
from rayk.bench.core.provenance import cpu_model, running_commit
from rayk.bench.core.result import CoreResult
from rayk.bench.core.run import make_cases, picked_groups, run_cases
from rayk.bench.core.table import comparison_lines, notes, result_table
from rayk.bench.flags import REPEAT, CoreFlags
from rayk.bench.result import environment
from rayk.cli.flags import Format
from rayk.errors import ConfigError

log = logging.getLogger("rayk.bench")


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
