"""`rayk simulate`: its flags, and the rows it prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from rayk.errors import ConfigError

SIMULATE_EPILOG = (
    "Example: rayk simulate --workload chat --requests 12000 --replicas 1,8 --capacity 0.9M --policy lru "
    "--router cost,round-robin,least-loaded,prefix"
)

DEFAULT_REQUESTS = 10_000
RATES = {"chat": 3.4, "documents": 3.0, "random": 3.0}
SESSIONS = 32  # coding agents at work at a time

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_WORK, _CASES, _TIME, _OUTPUT = "Workload", "Cases", "Time", "Output"


def simulate(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Mooncake jsonl, Claude Code sessions or Azure csv; plain, .gz or .zst.", rich_help_panel=_WORK
        ),
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="Or a generator: chat, agent, documents or random.", rich_help_panel=_WORK)
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="How many requests: all of a trace, 10000.", rich_help_panel=_WORK)
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor on all lengths of a generator: 1.", rich_help_panel=_WORK)
    ] = None,
    arrival_rate: Annotated[
        float | None,
        typer.Option(help="Requests a second of a generator: 3.4 for chat, 3 otherwise.", rich_help_panel=_WORK),
    ] = None,
    replicas: Annotated[str, typer.Option(help="Replica counts.", rich_help_panel=_CASES)] = "8",
    capacity: Annotated[
        str, typer.Option(help="Tokens that a replica's cache holds: 0.9M, 900k, 900000.", rich_help_panel=_CASES)
    ] = "0.9M",
    policy: Annotated[str, typer.Option(help="What caches evict: lru, belady.", rich_help_panel=_CASES)] = "lru",
    router: Annotated[
        str,
        typer.Option(help="cost, round-robin, least-loaded, prefix, session, module:Class.", rich_help_panel=_CASES),
    ] = "cost,round-robin,least-loaded,prefix",
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", rich_help_panel=_CASES)] = 512,
    utilization: Annotated[
        float | None,
        typer.Option(help="Prefill at the rate at which round robin is busy that part: 0.8.", rich_help_panel=_TIME),
    ] = None,
    prefill_rate: Annotated[
        float | None, typer.Option(help="Or the tokens a second that a replica prefills.", rich_help_panel=_TIME)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generator and jitter.", rich_help_panel=_TIME)] = 0,
    form: Annotated[
        str, typer.Option("--format", help="table, or json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = "table",
) -> int:
    """The same workload against policies, capacities, replica counts and routers, without Ray or tensors."""
    if form not in ("table", "json"):
        raise ConfigError(f"--format {form!r} is not one of table, json")
    if page_size < 1:
        raise ConfigError(f"--page-size is {page_size}, at least 1 is needed")
    if requests is not None and requests < 1:
        raise ConfigError(f"--requests is {requests}, at least 1 is needed")
    if seed < 0:
        raise ConfigError(f"--seed is {seed}, at least 0 is needed")
    _check_time(utilization, prefill_rate)
    from rayk.scheduler.router.policies import check_router
    from rayk.simulate.model import POLICIES, Case, Simulator

    cases = [
        Case(replicas=n, capacity=tokens, policy=kind, router=name)
        for n, tokens, kind, name in product(
            [parse_count(text) for text in parse_list("--replicas", replicas)],
            [parse_tokens(text) for text in parse_list("--capacity", capacity)],
            _names("--policy", policy, POLICIES),
            parse_list("--router", router),
        )
    ]
    for case in cases:
        check_router(case.router, "--")
    work = read_work(trace, workload, requests, scale, arrival_rate, seed)
    simulator = Simulator(work, page_size, seed)
    rows = []
    for case in cases:
        rate = prefill_rate if prefill_rate is not None else simulator.rate(case, utilization or 0.8)
        rows.append(simulator.run(case, rate))
    if form == "json":
        import msgspec

        print(msgspec.json.encode({"rows": rows}).decode())
    else:
        _print(rows, f"{work.source}: {len(work.requests)} requests, pages of {page_size} tokens")
    sys.stdout.flush()
    return 0


def parse_tokens(text: str) -> int:
    """Tokens of `text`: 900000, 900k, 0.9M, 1.5G (powers of ten). ConfigError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kKmMgG]?)", text.strip())
    tokens = float(match[1]) * _UNITS[match[2].lower()] if match else 0
    if tokens < 1:
        raise ConfigError(f"--capacity {text!r} is not a number of tokens; write 900000, 900k or 0.9M")
    return round(tokens)


def parse_list(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{flag} {text!r} has an empty entry; write it like 1,4,8")
    return list(dict.fromkeys(parts))


def _names(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    names = parse_list(flag, text)
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{flag} {name!r} is not one of {', '.join(allowed)}")
    return names


def parse_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise ConfigError(f"--replicas {text!r} is not a number of replicas")
    return int(text)


def _check_time(utilization: float | None, prefill_rate: float | None) -> None:
    if utilization is not None and prefill_rate is not None:
        raise ConfigError("--utilization and --prefill-rate exclude each other")
    if utilization is not None and not 0 < utilization < float("inf"):
        raise ConfigError(f"--utilization is {utilization}, more than 0 is needed")
    if prefill_rate is not None and not 0 < prefill_rate < float("inf"):
        raise ConfigError(f"--prefill-rate is {prefill_rate}, more than 0 tokens a second is needed")


def read_work(
    trace: Path | None, name: str | None, requests: int | None, scale: float | None, rate: float | None, seed: int
) -> Any:
    from rayk.bench.traces import read_trace
    from rayk.bench.workloads import GENERATORS

    if trace is not None and name is not None:
        raise ConfigError("--trace and --workload exclude each other")
    if trace is not None:
        if scale is not None or rate is not None:
            raise ConfigError("--scale and --arrival-rate are for --workload; a trace is taken as it is")
        return read_trace(trace, requests)
    if name is None:
        raise ConfigError("give a --trace FILE or a --workload")
    if name not in GENERATORS:
        raise ConfigError(f"--workload {name!r} is not one of {', '.join(GENERATORS)}")
    if scale is not None and not 0 < scale <= 100:
        raise ConfigError(f"--scale is {scale}, more than 0 and at most 100 is needed")
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"--arrival-rate is {rate}, more than 0 requests a second is needed")
    shape: dict[str, Any] = {"seed": seed, "scale": scale or 1.0}
    if name == "agent":
        shape["sessions"] = SESSIONS
    if rate is not None or name in RATES:
        shape["rate"] = rate or RATES[name]
    return GENERATORS[name](requests or DEFAULT_REQUESTS, **shape)


def _print(rows: Sequence[Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from rayk.quantity import show_seconds

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("replicas", "capacity", "policy", "router", "hit rate", "pooled", "infinite", "imbalance", "busy"):
        table.add_column(name, justify="left" if name in ("policy", "router") else "right", no_wrap=True)
    for name in ("ttft mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        first = (show_seconds(s) for s in (row.ttft.mean, row.ttft.p50, row.ttft.p90, row.ttft.p99))
        rates = (f"{rate:.3f}" for rate in (row.hit_rate, row.pooled, row.infinite))
        table.add_row(
            str(row.replicas),
            f"{row.capacity:,}",
            row.policy,
            row.router,
            *rates,
            f"{row.imbalance:.3f}",
            f"{row.utilization:.3f}",
            *first,
        )
    Console(width=max(Console().width, 130)).print(table)  # narrower, the columns could not be told apart
