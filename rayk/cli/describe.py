"""`rayk describe`: one snapshot of a running, named cluster, for people or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.markup import escape

from rayk.cli.flags import SECRET_TEXT, Format, secret_of
from rayk.errors import ConfigError

if TYPE_CHECKING:
    from rayk.actors.describe import Decision, ManagerState, ReplicaState, TierState
    from rayk.actors.describe_cluster import ClusterState
    from rayk.actors.interface import Runtime
    from rayk.protocol.admission import AdmissionState
    from rayk.protocol.from_replica import LineState

FAR = 10_000  # columns: more than any table has
DESCRIBE_EPILOG = "Example: rayk describe --name prod --format json"


def describe(
    name: Annotated[str, typer.Option(help="The name of the session: InferenceSession(runtime='ray', name=..).")],
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster; the one that runs here or that RAY_ADDRESS names otherwise.")
    ] = None,
    secret_file: Annotated[Path | None, typer.Option(help=SECRET_TEXT)] = None,
    why: Annotated[
        str | None, typer.Option(help="Only this: why the request of that id went where it went.", metavar="ID")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="json: one object on stdout.")] = Format.table,
) -> int:
    """One snapshot of a running cluster: plan, replicas, pages, claims."""
    from rich.console import Console

    from rayk.session import InferenceSession

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "secret": secret_of(secret_file)}
    with InferenceSession("ray", address or "auto", name, **quiet) as session:
        if why is not None:
            decision = _explained(session.ray, name, why)
            if form is Format.json:
                typer.echo(msgspec.json.encode({"command": "describe", "decision": decision}).decode())
            else:
                _show_decision(decision, Console())
            return 0
        states, cluster = taken(session.ray, name)
    if form is Format.json:
        found: dict[str, Any] = {"command": "describe", "managers": states}
        typer.echo(msgspec.json.encode(found | ({"cluster": cluster} if cluster is not None else {})).decode())
    else:
        for state in states:
            _show(state, Console())
        if cluster is not None:
            _show_cluster(cluster, Console())
    how = [each.state for state in states for each in state.replicas]
    how += [each.state for each in cluster.replicas] if cluster is not None else []
    return 0 if not {"lost", "silent"}.intersection(how) else 1


def taken(ray: Runtime, name: str) -> tuple[list[ManagerState], ClusterState | None]:
    """The managers and the Cluster of that name; ConfigError when there is none of either."""
    from rayk.actors.describe import describe
    from rayk.actors.describe_cluster import describe_cluster

    cluster = describe_cluster(ray, name)
    try:
        return describe(ray, name), cluster
    except ConfigError:
        if cluster is None:
            raise
        return [], cluster


def _explained(ray: Runtime, name: str, request_id: str) -> Decision:
    from rayk.actors.describe import Decision, explain
    from rayk.actors.describe_cluster import explain_in_cluster

    try:
        return explain(ray, name, request_id)
    except ConfigError:
        why = explain_in_cluster(ray, name, request_id)
        if why is None:
            raise
        return Decision.of(why, request_id)


def _show_cluster(state: ClusterState, console: Any) -> None:
    title = f"{state.name}: {state.model}, router {state.router}, pages of {state.page_size} tokens"
    headings = ("#", "node", "state", "requests", "running", "used / pages", "cached", "reused", "generated", "path")
    rows = [
        [
            str(each.index),
            each.node[:12],
            each.state,
            "" if each.requests is None else f"{each.requests:,}",
            "" if each.running is None else f"{each.running:,}",
            "" if each.free_pages is None else f"{(each.pages or 0) - each.free_pages:,} / {each.pages:,}",
            "" if each.cached_pages is None else f"{each.cached_pages:,}",
            f"{sum(each.reused_tokens.values()) / each.prompt_tokens:.1%}" if each.prompt_tokens else "",
            "" if each.generated_tokens is None else f"{each.generated_tokens:,}",
            each.path.kind if each.path is not None else "",
        ]
        for each in state.replicas
    ]
    _print_table(console, title, headings, rows, ("node", "state", "path"))
    for each in state.replicas:
        if each.path is not None and each.path.kind == "calls":
            console.print(f"replica {each.index} is reached by calls: {each.path.reason}", markup=False)
        if each.reason is not None:
            console.print(f"replica {each.index} is {each.state}: {each.reason}", markup=False)
        if each.tiers is not None:
            console.print(_tier_line(each.index, each.tiers), markup=False)
    for index, reason in state.failures.items():
        console.print(f"replica {index} is to be replaced: {reason}", markup=False)
    for driver in state.drivers:
        owner = ", which owns it" if driver.owner else ""
        console.print(f"{driver.name}{owner}: {driver.waiting:,} wait, {driver.placed:,} are placed", markup=False)
    for line in state.lines:
        console.print(_line(line), markup=False)
    if state.admission is not None:
        _show_admission(state.admission, console)


def _show(state: ManagerState, console: Any) -> None:
    title = f"{state.name}: router {state.router}, pages of {state.page_size} tokens"
    headings = ("#", "node", "state", "claims", "used / pages", "cached", "planned", "taken", "free")
    _print_table(console, title, headings, [_cells(replica) for replica in state.replicas], ("node", "state"))
    for replica in state.replicas:
        if replica.reason is not None:
            console.print(f"replica {replica.index} is {replica.state}: {replica.reason}", markup=False)
        if replica.tiers is not None:
            console.print(_tier_line(replica.index, replica.tiers), markup=False)
    for each in state.replacements:
        failed = f" after {each.failures} failure(s) in a row" if each.failures else ""
        then = f"given up{failed}; rayk's add_replicas() begins anew" if each.given_up else f"replaced{failed}"
        console.print(f"replica {each.replica} was lost and is {then}: {each.reason}", markup=False)
    for index, how in state.coming.items():
        console.print(f"replica {index} is {how}", markup=False)
    for line in state.lines:
        console.print(_line(line), markup=False)
    for reason in state.refused.values():
        console.print(f"left out: {reason}", markup=False)
    if state.metrics is not None:
        tokens = f"{state.metrics.input_tokens:,} tokens computed, {state.metrics.cache_tokens:,} reused"
        console.print(f"{tokens}; {state.drivers} driver(s) attached", markup=False)
    if state.admission is not None:
        _show_admission(state.admission, console)


def _line(line: LineState) -> str:
    text = f"copies from replica {line.source} to {line.target} by {line.kind}: {line.copies:,}"
    text += f", {line.bandwidth / 1e9:.2f} GB/s after {line.latency * 1e3:.2f} ms"
    return text + (f"; {line.failures} failed, the last: {line.trouble}" if line.failures else "")


def _show_admission(state: AdmissionState, console: Any) -> None:
    head = f"{state.waiting:,} request(s) wait for {state.waiting_pages:,} pages; {state.admitted:,} were let in"
    console.print(f"{head}, {state.refused:,} turned away; try again in {state.retry_after:.2f} s", markup=False)
    rows = [
        [
            name or "(none)",
            f"{tenant.waiting:,}",
            f"{tenant.held_pages:,}",
            f"{tenant.admitted:,}",
            f"{tenant.refused:,}",
            f"{tenant.longest_wait:.2f} s",
        ]
        for name, tenant in sorted(state.tenants.items(), key=lambda each: -each[1].held_pages)
    ]
    headings = ("tenant", "waiting", "held pages", "let in", "turned away", "longest wait")
    if rows:
        _print_table(console, "tenants", headings, rows, ("tenant",))


def _tier_line(index: int, tiers: TierState) -> str:
    text = f"replica {index}'s node: {tiers.host_used:,} of {tiers.host_pages:,} host pages used"
    if tiers.disk_pages:
        text += f", {tiers.disk_used:,} of {tiers.disk_pages:,} disk pages"
    return f"{text}; {tiers.trouble}" if tiers.trouble else text


def _show_decision(decision: Decision, console: Any) -> None:
    head = f"request {decision.request_id!r}: {decision.tokens:,} tokens to replica {decision.replica}"
    console.print(f"{head}, by router {decision.router}, {decision.seconds_ago:.1f} s ago", markup=False)
    if not decision.candidates:
        console.print("this router does not reckon in costs: there is nothing more to say", markup=False)
        return
    rows = []
    for candidate in decision.candidates:
        chosen = "*" if candidate["replica"] == decision.replica else " "
        values = [f"{value:,.0f}" for value in candidate.values()]
        rows.append([chosen + values[0], *values[1:]])
    title = "candidates, in tokens of prefill; cost is the sum from prefill on"
    _print_table(console, title, list(decision.candidates[0]), rows)


def _print_table(
    console: Any, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> None:
    """All columns, in as many tables below each other as the width asks for; each begins with the first column."""
    from rich import box
    from rich.table import Table

    def table(columns: Sequence[int]) -> Table:
        made = Table(box=box.HEAVY_HEAD if len(columns) == len(headings) else box.SIMPLE)
        for column in columns:
            justify: Any = "left" if headings[column] in left else "right"
            made.add_column(headings[column], justify=justify, overflow="fold")
        for row in rows:
            made.add_row(*(escape(row[column]) for column in columns))
        return made

    def fits(columns: Sequence[int]) -> bool:
        wide = console.options.update(max_width=FAR)
        return bool(console.measure(table(columns), options=wide).maximum <= console.width)

    every = list(range(len(headings)))
    groups = [every] if fits(every) else [[0]]
    for column in every[1:] if len(groups[0]) == 1 else ():
        if len(groups[-1]) > 1 and not fits([*groups[-1], column]):
            groups.append([0])
        groups[-1].append(column)
    console.print(title, markup=False, style="italic")
    for columns in groups:
        console.print(table(columns))


def _cells(replica: ReplicaState) -> list[str]:
    from rayk.quantity import show_bytes

    def shown(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    used = "-" if replica.used_pages is None else f"{replica.used_pages:,} / {replica.pages:,}"
    return [
        str(replica.index),
        replica.node,
        replica.state,
        shown(replica.requests),
        used,
        shown(replica.cached_pages),
        show_bytes(replica.plan.bytes),
        show_bytes(replica.allocated_bytes),
        "-" if replica.free_bytes is None else show_bytes(replica.free_bytes),
    ]
