"""The result of `rayk bench core` for people."""

from __future__ import annotations

from rich.table import Table

from rayk.bench.core.baseline import Comparison
from rayk.bench.core.result import CoreResult, Figure
from rayk.bench.table import make_table

COLUMNS = ("", "workload", "here", "limit here", " ", "on the reference", "best peer there", "times")


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
