"""`rayk bench scheduler`: its flags, and what it prints. What is measured is in hot_path.py."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rayk.bench.scheduler_cost import HotPathResult

SCHEDULER_EPILOG = "Example: rayk bench scheduler --rounds 5 --check"
LEAST_SPEEDUP, LEAST_OF_BARE = 25.0, 0.6
_WORK, _JUDGE, _OUTPUT = "What to measure", "Judgement", "Output"


class SchedulerFormat(StrEnum):
    """How the result is printed."""

    table = "table"
    json = "json"


def scheduler(
    batch: Annotated[int, typer.Option(min=1, help="Requests of a batch.", rich_help_panel=_WORK)] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.", rich_help_panel=_WORK)] = 256,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.", rich_help_panel=_WORK)] = 128,
    in_flight: Annotated[int, typer.Option(min=1, help="Batches at once.", rich_help_panel=_WORK)] = 4,
    batches: Annotated[int, typer.Option(min=1, help="Batches of one measurement.", rich_help_panel=_WORK)] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements, the first left out.", rich_help_panel=_WORK)] = 5,
    router: Annotated[
        str | None,
        typer.Option(help="Who places the batches; the driver if not given, as one by one.", rich_help_panel=_WORK),
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster to join; an embedded one otherwise.", rich_help_panel=_WORK)
    ] = "local",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help=f"Exit with 1 below {LEAST_SPEEDUP:.0f} x one by one or {LEAST_OF_BARE} x bare Ray.",
            rich_help_panel=_JUDGE,
        ),
    ] = False,
    form: Annotated[
        SchedulerFormat, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = SchedulerFormat.table,
) -> int:
    """Measure batches of claims and allocs through one scheduler actor on 4 replicas.

    Beside them, in turns: the same requests one by one, and the same bytes through an actor that only forwards them to
    4 actors that only echo them.
    """
    import msgspec

    from rayk.bench.scheduler_cost import HotPath, HotPathSettings

    path = HotPath(HotPathSettings(batch, prompt, page_size, in_flight, batches, rounds, router, address))
    try:
        result = asyncio.run(path.measure())
    finally:
        path.close()
    if form is SchedulerFormat.json:
        typer.echo(msgspec.json.encode({"command": "bench scheduler", **msgspec.structs.asdict(result)}).decode())
    else:
        _show(result, in_flight)
    return 1 if check and (result.speedup < LEAST_SPEEDUP or result.of_bare < LEAST_OF_BARE) else 0


def _show(result: HotPathResult, in_flight: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="claims + allocs through one scheduler actor, medians", title_justify="left")
    for heading in ("", "requests/s", "ratio", "wanted"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(f"batches, {in_flight} in flight", f"{result.batched:,.0f}", "", "")
    table.add_row("one by one", f"{result.one_by_one:,.0f}", f"{result.speedup:.1f} x", f">= {LEAST_SPEEDUP:.0f} x")
    table.add_row("bare Ray", f"{result.bare:,.0f}", f"{result.of_bare:.2f}", f">= {LEAST_OF_BARE}")
    Console().print(table)
