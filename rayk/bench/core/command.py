"""`rayk bench core`: its flags, and what it prints. What is measured is in run.py."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayk.errors import ConfigError

if TYPE_CHECKING:
    from rayk.bench.core.baseline import Comparison
    from rayk.bench.core.result import CoreResult

CORE_EPILOG = "Example: rayk bench core --only w1,w3 --repeat 5"
REPEAT = 5
_WHAT, _JUDGE, _OUTPUT = "What to measure", "Judgement", "Output"

log = logging.getLogger("rayk.bench")


class CoreFormat(StrEnum):
    """How the result is printed."""

    table = "table"
    json = "json"


def core(
    only: Annotated[
        str | None,
        typer.Option(
            help="Groups, as in w1,w3: w1 cold prompts, w2 shared prefix, hash both with hashed pages, w3 decode, w4 a "
            "trace, w5 the prefix index, tiers, start, memory, engine; these if not given. And ray, which starts a "
            "cluster, and instructions, which needs valgrind.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="The trace of w4; generated chats otherwise.", rich_help_panel=_WHAT),
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(help=f"Measured runs of each workload: {REPEAT}.", rich_help_panel=_WHAT)
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A tenth of the work, once: does it run?", rich_help_panel=_WHAT)
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with 1 when a limit is exceeded, or a figure is worse than the baseline's.",
            rich_help_panel=_JUDGE,
        ),
    ] = False,
    baseline: Annotated[
        Path | None, typer.Option(help="Compare with the figures saved in this file.", rich_help_panel=_JUDGE)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How much worse than the baseline is a regression: 0.1.", rich_help_panel=_JUDGE)
    ] = 0.1,
    save: Annotated[
        Path | None,
        typer.Option(help="Add the figures to this file, under the commit that runs.", rich_help_panel=_JUDGE),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for core.json.", rich_help_panel=_OUTPUT)] = None,
    form: Annotated[
        CoreFormat, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = CoreFormat.table,
) -> int:
    """Measure the control plane: CPU time of each workload beside its limit and the best peer's."""
    if smoke and (check or save):
        raise ConfigError("--smoke is too short to judge by; leave out --smoke, or --check and --save")
    if not 0 < tolerance < 10:
        raise ConfigError(f"--tolerance is {tolerance}, a share such as 0.1 is needed")
    if repeat is not None and repeat < 1:
        raise ConfigError(f"--repeat is {repeat}, at least 1 is needed")
    from rayk.bench.core.baseline import compare, read_baseline, save_baseline

    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be made ({error.strerror}); name another folder") from None
    groups = _groups(only)
    entries = None if baseline is None else read_baseline(baseline)  # before minutes of work
    result = _measure(groups, trace, repeat or (1 if smoke else REPEAT), smoke)
    comparison = None if entries is None else compare(entries, result, tolerance)
    if out is not None:
        (out / "core.json").write_bytes(result.to_json() + b"\n")
    if save is not None:
        save_baseline(save, result, datetime.now(UTC).date())
    _print(result, comparison, form is CoreFormat.json)
    if not check:
        return 0
    for figure in result.exceeded:
        log.error("%s is %.4g %s, its limit here is %.4g", figure.key, figure.value, figure.unit, figure.limit_here)
    worse = [] if comparison is None else comparison.worse
    for change in worse:
        log.error("%s was %.4g and is %.4g", *change)
    return int(bool(result.exceeded or worse))


def _groups(only: str | None) -> list[str]:
    from rayk.bench.core.run import EXTRA_GROUPS, GROUPS

    wanted = [name.strip() for name in only.split(",")] if only is not None else list(GROUPS)
    for name in wanted:
        if name not in GROUPS + EXTRA_GROUPS:
            raise ConfigError(f"--only {name!r} is not one of {', '.join(GROUPS + EXTRA_GROUPS)}")
    return wanted


def _measure(groups: list[str], trace: Path | None, repeat: int, smoke: bool) -> CoreResult:
    import torch
    from rich.console import Console

    import rayk
    from rayk.bench.core.clock import Unit
    from rayk.bench.core.one_off import (
        engine_figures,
        instruction_figures,
        memory_figures,
        ray_figures,
        start_figures,
    )
    from rayk.bench.core.provenance import cpu_model, running_commit
    from rayk.bench.core.result import CoreResult
    from rayk.bench.core.run import make_cases, run_cases
    from rayk.bench.result import environment

    torch.set_num_threads(1)
    unit = Unit()
    with Console(stderr=True).status("preparing") as status:
        figures = run_cases(make_cases(groups, trace, smoke), unit, repeat, status.update)
        if "start" in groups:
            figures += start_figures(unit, 1 if smoke else 3, status.update)
        if "memory" in groups:
            unit.sample()
            figures += memory_figures(status.update)
        if "engine" in groups:
            figures += engine_figures(unit, status.update)
        if "ray" in groups:
            with redirect_stdout(sys.stderr):  # Ray prints what its processes log
                figures += ray_figures(unit, status.update)
        if "instructions" in groups:
            unit.sample()
            figures += instruction_figures(status.update)
    return CoreResult(
        command="bench core",
        version=rayk.__version__,
        commit=running_commit(),
        environment=environment() | {"cpu": cpu_model()},
        unit_us=unit.us,
        figures=figures,
        smoke=smoke,
    )


def _print(result: CoreResult, comparison: Comparison | None, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(result.to_json().decode() + "\n")
    else:
        from rich.console import Console

        from rayk.bench.core.table import comparison_lines, notes, result_table

        console = Console()
        if not console.is_terminal:
            console = Console(width=130)  # a log has no width: one line a figure
        console.print(result_table(result))
        for line in (*notes(result), *(comparison_lines(comparison) if comparison else ())):
            console.print(line, soft_wrap=True, highlight=False)
    sys.stdout.flush()
