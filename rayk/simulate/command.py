"""`rayk simulate`: its cases, and the rows that it prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from rayk.cli.flags import Format
from rayk.cli.table import make_table
from rayk.errors import ConfigError
from rayk.quantity import show_seconds
from rayk.scheduler.router.policies import check_router
from rayk.simulate.flags import SimulateFlags
from rayk.simulate.model import POLICIES, Case, Row, Simulator
from rayk.workloads.generators import GENERATORS
from rayk.workloads.request import Workload
from rayk.workloads.traces import read_trace

DEFAULT_REQUESTS = 10_000
RATES = {"chat": 3.4, "documents": 3.0, "random": 3.0}
SESSIONS = 32  # coding agents at work at a time

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def simulate(flags: SimulateFlags) -> int:
    """Simulate each case, and print its row."""
    _check(flags)
    picked = [
        Case(replicas=n, capacity=tokens, policy=kind, router=name)
        for n, tokens, kind, name in product(
            [parse_count(text) for text in parse_list("--replicas", flags.replicas)],
            [parse_tokens(text) for text in parse_list("--capacity", flags.capacity)],
            _names("--policy", flags.policy, POLICIES),
            parse_list("--router", flags.router),
        )
    ]
    for case in picked:
        check_router(case.router, "--")
    work = read_work(flags.trace, flags.workload, flags.requests, flags.scale, flags.arrival_rate, flags.seed)
    simulator = Simulator(work, flags.page_size, flags.seed)
    rows = [
        simulator.run(case, flags.prefill_rate or simulator.rate(case, flags.utilization or 0.8)) for case in picked
    ]
    if flags.form is Format.json:
        print(msgspec.json.encode({"rows": rows}).decode(), flush=True)
    else:
        _print(rows, f"{work.source}: {len(work.requests)} requests, pages of {flags.page_size} tokens")
    return 0


def _check(flags: SimulateFlags) -> None:
    counts = {"page-size": (flags.page_size, 1), "requests": (flags.requests, 1), "seed": (flags.seed, 0)}
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}, at least {least} is needed")
    if flags.utilization is not None and flags.prefill_rate is not None:
        raise ConfigError("--utilization and --prefill-rate exclude each other")
    if flags.utilization is not None and not 0 < flags.utilization < float("inf"):
        raise ConfigError(f"--utilization is {flags.utilization}, more than 0 is needed")
    if flags.prefill_rate is not None and not 0 < flags.prefill_rate < float("inf"):
        raise ConfigError(f"--prefill-rate is {flags.prefill_rate}, more than 0 tokens a second is needed")


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


def read_work(
    trace: Path | None, name: str | None, requests: int | None, scale: float | None, rate: float | None, seed: int
) -> Workload:
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


def _print(rows: Sequence[Row], title: str) -> None:
    columns = ["replicas", "capacity", "policy", "router", "hit rate", "pooled", "infinite", "imbalance", "busy"]
    cells = [
        (
            *(str(row.replicas), f"{row.capacity:,}", row.policy, row.router),
            *(f"{rate:.3f}" for rate in (row.hit_rate, row.pooled, row.infinite, row.imbalance, row.utilization)),
            *(show_seconds(s) for s in (row.ttft.mean, row.ttft.p50, row.ttft.p90, row.ttft.p99)),
        )
        for row in rows
    ]
    columns += ["ttft mean", "p50", "p90", "p99"]
    table = make_table(title, columns, cells, left=("policy", "router"), box=None, pad_edge=False)
    Console(width=max(Console().width, 130)).print(table)  # narrower, the columns could not be told apart
