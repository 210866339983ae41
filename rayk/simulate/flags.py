"""The flags of `rayk simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rayk.cli.flags import FORMAT, Format, group

SIMULATE_EPILOG = (
    "Example: rayk simulate --workload chat --requests 12000 --replicas 1,8 --capacity 0.9M --policy lru "
    "--router cost,round-robin,least-loaded,prefix"
)

work, cases, times = group("Workload"), group("Cases"), group("Time")


@dataclass(frozen=True, kw_only=True)
class SimulateFlags:
    """The same workload against policies, capacities, replica counts and routers, without Ray or tensors."""

    trace: Annotated[Path | None, work("Mooncake jsonl, Claude Code sessions or Azure csv; plain, .gz or .zst.")] = None
    workload: Annotated[str | None, work("Or a generator: chat, agent, documents or random.")] = None
    requests: Annotated[int | None, work("How many requests: all of a trace, 10000.")] = None
    scale: Annotated[float | None, work("Factor on all lengths of a generator: 1.")] = None
    arrival_rate: Annotated[float | None, work("Requests a second of a generator: 3.4 for chat, 3 otherwise.")] = None
    replicas: Annotated[str, cases("Replica counts.")] = "8"
    capacity: Annotated[str, cases("Tokens that a replica's cache holds: 0.9M, 900k, 900000.")] = "0.9M"
    policy: Annotated[str, cases("What caches evict: lru, belady.")] = "lru"
    router: Annotated[str, cases("cost, round-robin, least-loaded, prefix, session, module:Class.")] = (
        "cost,round-robin,least-loaded,prefix"
    )
    page_size: Annotated[int, cases("Tokens of a page.")] = 512
    utilization: Annotated[float | None, times("Prefill at the rate at which round robin is busy that part: 0.8.")] = (
        None
    )
    prefill_rate: Annotated[float | None, times("Or the tokens a second that a replica prefills.")] = None
    seed: Annotated[int, times("Seed of generator and jitter.")] = 0
    form: Annotated[Format, FORMAT] = Format.table
