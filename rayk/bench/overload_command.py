"""`rayk bench overload`: its flags, and what it prints. What is measured is in overload.py."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rayk.bench.overload import OverloadResult

OVERLOAD_EPILOG = "Example: rayk bench overload --duration 60s --factor 5"
_WORK, _OUTPUT = "What to measure", "Output"


class OverloadFormat(StrEnum):
    """How the result is printed."""

    table = "table"
    json = "json"


def overload(
    duration: Annotated[str, typer.Option(help="How long the overload lasts.", rich_help_panel=_WORK)] = "60s",
    factor: Annotated[
        float, typer.Option(min=1.0, help="Arrivals over what the cluster can do.", rich_help_panel=_WORK)
    ] = 5.0,
    deadline: Annotated[
        float, typer.Option(min=1.0, help="Deadline over the unloaded median.", rich_help_panel=_WORK)
    ] = 5.0,
    replicas: Annotated[int, typer.Option(min=1, help="Data-parallel replicas.", rich_help_panel=_WORK)] = 2,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait.", rich_help_panel=_WORK)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.", rich_help_panel=_WORK)] = 0,
    address: Annotated[
        str, typer.Option(help="Ray cluster to join; an embedded one otherwise.", rich_help_panel=_WORK)
    ] = "local",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A run of some 15 seconds, for tests.", rich_help_panel=_WORK)
    ] = False,
    form: Annotated[
        OverloadFormat, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = OverloadFormat.table,
) -> int:
    """Ask a cluster of real replicas for several times what it can do, from two drivers; 1 when it takes that badly.

    Measures the unloaded latency and the capacity first. Forwards take their time on the replicas, as on a GPU.
    """
    import msgspec

    from rayk.bench.overload import Overload, OverloadSettings
    from rayk.quantity import parse_duration

    settings = OverloadSettings(
        replicas=replicas,
        seconds=parse_duration(duration),
        factor=factor,
        patience=deadline,
        max_waiting=max_waiting,
        address=address,
        seed=seed,
    )
    if smoke:
        settings = msgspec.structs.replace(settings, seconds=6.0, alone=3.0, capacity=4.0, once=4.0)
    overload = Overload(settings)
    try:
        result = overload.measure()
    finally:
        overload.close()
    if form is OverloadFormat.json:
        typer.echo(msgspec.json.encode({"command": "bench overload", **msgspec.structs.asdict(result)}).decode())
    else:
        _show(result)
    return 0 if result.ok else 1


def _show(result: OverloadResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    head = f"unloaded {result.unloaded_p50:.3f} s (median), deadline {result.deadline:.2f} s"
    console.print(f"{head}, capacity {result.capacity:.1f} requests/s", highlight=False)
    table = Table(title="arrivals", title_justify="left")
    for heading in ("", "tenant", "offered", "let in", "in time", "refused", "goodput", "p50", "waited"):
        table.add_column(heading, justify="left" if heading in ("", "tenant") else "right", no_wrap=True)
    for phase, tenants in result.phases.items():
        for tenant, rates in tenants.items():
            table.add_row(
                phase,
                tenant,
                f"{rates.offered:,}",
                f"{rates.done:,}",
                f"{100 * rates.share:.2f} %",
                f"{rates.refused:,}",
                f"{rates.goodput:.1f}",
                f"{rates.p50:.2f} s",
                f"{rates.longest_wait:.2f} s",
            )
    console.print(table)
    memory = Table(title="resident memory in the overload, MiB", title_justify="left")
    for heading in ("process", "start", "most", "middle third", "last third"):
        memory.add_column(heading, justify="left" if heading == "process" else "right")
    for name, growth in result.memory.items():
        sizes = (growth.start, growth.most, growth.middle, growth.last)
        memory.add_row(name, *(f"{size / (1 << 20):.1f}" for size in sizes))
    console.print(memory)
    lines = Table(title="verdicts", title_justify="left")
    for heading in ("", "found", "wanted", ""):
        lines.add_column(heading, justify="right" if heading == "found" else "left", no_wrap=True)
    for line in result.verdicts:
        lines.add_row(line.what, line.found, line.wanted, "ok" if line.ok else "NO")
    console.print(lines)
