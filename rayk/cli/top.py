"""`rayk top`: what runs under a name, live on a terminal; elsewhere a log line for each look."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayk.cli.cluster_view import TIERS, ClusterView
from rayk.cli.flags import SECRET_TEXT, secret_of
from rayk.errors import RaykError
from rayk.quantity import parse_duration

if TYPE_CHECKING:
    from rich.console import RenderableType

TOP_EPILOG = "Example: rayk top --name prod. Keys: s sorts by the next column, r turns the order round, q ends it."
TENANTS, EVENTS = 12, 6  # shown


def top(
    name: Annotated[str, typer.Option(help="The name of the session: InferenceSession(runtime='ray', name=..).")],
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster; the one that runs here or that RAY_ADDRESS names otherwise.")
    ] = None,
    secret_file: Annotated[Path | None, typer.Option(help=SECRET_TEXT)] = None,
    every: Annotated[str, typer.Option(help="Time between two looks.")] = "2s",
    looks: Annotated[int | None, typer.Option(help="End after so many looks.", min=1)] = None,
) -> int:
    """Watch a running cluster: replicas, pages by state, hit rates by tier, the queue by tenant, recoveries."""
    from rich.console import Console

    from rayk.cli.describe import taken
    from rayk.session import InferenceSession

    seconds, console, view = parse_duration(every), Console(), ClusterView()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "secret": secret_of(secret_file)}
    with InferenceSession("ray", address or "auto", name, **options) as session:

        def look() -> list[str]:
            try:
                return view.take(time.time(), *taken(session.ray, name))
            except RaykError as error:  # it may begin anew
                if not view.rows:
                    raise
                return view.note(time.time(), str(error))

        if console.is_terminal:
            _live(console, name, view, look, seconds, looks)
        else:
            _logged(view, look, seconds, looks)
    return 0


def _logged(view: ClusterView, look: Callable[[], list[str]], seconds: float, looks: int | None) -> None:
    left = looks
    while True:
        happened, now = look(), time.strftime("%H:%M:%S")
        for text in [*happened, view.line]:
            print(f"{now}  {text}", flush=True)
        if left is not None and (left := left - 1) <= 0:
            return
        time.sleep(seconds)


def _live(
    console: Any, name: str, view: ClusterView, look: Callable[[], list[str]], seconds: float, looks: int | None
) -> None:
    from rich.live import Live

    left = looks
    with _keys() as pressed, Live(console=console, screen=looks is None, auto_refresh=False) as live:
        while True:
            look()
            until = time.monotonic() + seconds
            live.update(render(view, name), refresh=True)
            if left is not None and (left := left - 1) <= 0:
                return
            while (wait := until - time.monotonic()) > 0:
                key = pressed(wait)
                if key and not view.press(key):
                    return
                if key:
                    live.update(render(view, name), refresh=True)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, '' for none."""
    if not sys.stdin.isatty():
        yield lambda seconds: str(time.sleep(seconds) or "")  # type: ignore[func-returns-value]  # there is no key
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        fd = sys.stdin.fileno()  # not by sys.stdin, which would read further keys ahead
        keys = select.poll()  # not select(), which knows the first 1,024 descriptors of a process only
        keys.register(fd, select.POLLIN)
        yield lambda seconds: os.read(fd, 1).decode("latin-1") if keys.poll(seconds * 1e3) else ""
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def render(view: ClusterView, name: str) -> RenderableType:
    """The whole screen."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def number(value: float | None, form: str = ",.0f") -> str:
        return "" if value is None else format(value, form)

    order = f"by {view.sort}{', turned round' if view.reverse else ''}"
    head = Text(f"{name}  {time.strftime('%H:%M:%S')}  {view.line}", style="bold")
    table = Table(title=f"replicas, {order}", title_justify="left", pad_edge=False, box=box.SIMPLE)
    tiers = [tier for tier in TIERS if any((row.hits or {}).get(tier) for row in view.rows)]
    several = len({row.of for row in view.rows}) > 1
    columns = [*(("of",) if several else ()), "#", "state", "node", "requests", "used", "cached", "free"]
    columns += ["tokens/s", "hits"]
    for column in [*columns, *tiers]:
        table.add_column(column, justify="left" if column in ("of", "state", "node") else "right", no_wrap=True)
    for row in view.sorted:
        style = "" if row.state == "ready" else "yellow" if row.state in ("draining", "starting", "planned") else "red"
        cells = [*((row.of,) if several else ()), str(row.replica), row.state, row.node]
        cells += [number(value) for value in (row.requests, row.used, row.cached, row.free, row.generated)]
        cells += [number(row.hit_rate, ".1%"), *(number((row.hits or {}).get(tier), ".1%") for tier in tiers)]
        table.add_row(*map(Text, cells), style=style)
    parts: list[RenderableType] = [head, table]
    for of, admission in view.admissions.items():
        queue = Table(title=f"{of}: queue", title_justify="left", pad_edge=False, box=box.SIMPLE)
        for column in ("tenant", "waiting", "pages", "let in", "turned away", "longest wait"):
            queue.add_column(column, justify="left" if column == "tenant" else "right")
        most = sorted(admission.tenants.items(), key=lambda each: (-each[1].waiting, -each[1].held_pages))
        for tenant, each in most[:TENANTS]:
            counts = map(number, (each.waiting, each.held_pages, each.admitted, each.refused))
            queue.add_row(Text(tenant or "(none)"), *counts, f"{each.longest_wait:.2f} s")
        parts.append(queue)
    for at, text in list(view.events)[-EVENTS:]:
        parts.append(Text(f"{time.strftime('%H:%M:%S', time.localtime(at))}  {text}"))
    return Group(*parts, Text("s sort  r turn round  q end", style="dim"))
