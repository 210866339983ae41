"""Running the cases: interleaved, each prepared anew, the unit sampled between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rayk.bench.core.cache import POOL
from rayk.bench.core.case import Case, Figure, Progress, make_figure
from rayk.bench.core.clock import Unit, lap_ns, quiet
from rayk.bench.core.decode import BATCHES, STEPS, Decode
from rayk.bench.core.limits import BOUNDS, TIER_COPIES, Bound
from rayk.bench.core.lookups import ALL, ENTRIES, FEW, FLEETS, Indexed, Lookups
from rayk.bench.core.prompts import FULL_REQUESTS, REQUESTS, SMALL_POOL, Prompts, SharedPrefix, filling
from rayk.bench.core.tiers import Copies, Miss, Offloading
from rayk.bench.core.trace_case import REQUESTS as TRACE_REQUESTS
from rayk.bench.core.trace_case import Served
from rayk.errors import ConfigError

GROUPS = ("w1", "w2", "hash", "w3", "w4", "w5", "tiers", "start", "memory", "engine")
"""What is measured when nothing is picked, in the order of the table."""

EXTRA_GROUPS = ("ray", "instructions")
"""What `--only` takes as well: they start a cluster, or need valgrind."""

HASHES = {"xxh3": "xxh3_128", "sha256": "sha256"}


def picked_groups(only: str | None) -> list[str]:
    """The groups that `--only` names; ConfigError for one that there is not."""
    wanted = [name.strip() for name in only.split(",")] if only is not None else list(GROUPS)
    for name in wanted:
        if name not in GROUPS + EXTRA_GROUPS:
            raise ConfigError(f"--only {name!r} is not one of {', '.join(GROUPS + EXTRA_GROUPS)}")
    return wanted


def make_cases(groups: Iterable[str], trace: Path | None, smoke: bool) -> list[Case]:
    """The cases of `groups`; with `smoke` a tenth of the work."""
    part = 10 if smoke else 1
    few, steps = REQUESTS // part, STEPS // part
    small = Prompts(few, SMALL_POOL, 2 * filling(SMALL_POOL))
    full = Prompts(FULL_REQUESTS // part, POOL, filling(POOL))
    served = Served(trace, TRACE_REQUESTS // part)
    cases = [
        Case("w1", "w1", "cold request, pool of 100,000 pages", "us", Prompts(few)),
        Case("w1-8k", "w1", "cold request, evicting, 8,000 pages", "us", small),
        Case("w1e", "w1", "cold request, evicting, 100,000 pages", "us", full),
        Case("w2", "w2", "request that shares 4,096 of 4,224 tokens", "us", SharedPrefix(few)),
    ]
    for name, algorithm in HASHES.items():
        hashed = f"pages hashed by {algorithm}"
        small_hashed = Prompts(few, SMALL_POOL, 2 * filling(SMALL_POOL), algorithm)
        cases += [
            Case(f"w1-{name}", "hash", f"cold request, {hashed}", "us", Prompts(few, hashing=algorithm)),
            Case(f"w1-8k-{name}", "hash", f"the same, evicting, {hashed}", "us", small_hashed),
            Case(f"w2-{name}", "hash", f"shared prefix, {hashed}", "us", SharedPrefix(few, algorithm)),
        ]
    for batch in BATCHES:
        decode = f"request and step, batch {batch}"
        cases.append(Case(f"w3-{batch}", "w3", decode, "us", Decode(batch, steps, many=False)))
        batched = Decode(batch, steps, many=True)
        cases.append(Case(f"w3-{batch}-batch", "w3", f"{decode}, batch API", "us", batched))
    cases.append(Case("w4", "w4", f"{TRACE_REQUESTS // part:,} requests of {served.name}", "ms", served))
    for replicas in FLEETS:
        indexed, loads = Indexed(replicas, ENTRIES // part), f"{replicas} replicas"
        cases += [
            Case(f"w5-{replicas}", "w5", f"best of {loads}", "us", Lookups(indexed, False, FEW)),
            Case(f"w5-{replicas}-cold", "w5", f"best of {loads}, seldom asked", "us", Lookups(indexed, False, ALL)),
            Case(f"w5-{replicas}-all", "w5", f"pages of each of {loads}", "us", Lookups(indexed, True, FEW)),
        ]
    miss, decode = "what a miss in host and disk tier adds to a cold alloc", "decode while pages go to host and disk"
    cases.append(Case("tier-miss", "tiers", miss, "us", Miss(12 // part + 1)))
    cases.append(Case("tier-decode", "tiers", f"{decode}, over without", "x", Offloading(128 // part)))
    for kib, at_once in TIER_COPIES:
        shape = f"{kib} KiB pages by {at_once}"
        out, back = Copies(kib, at_once, out=True), Copies(kib, at_once, out=False)
        cases += [
            Case(f"tier-out-{kib}-{at_once}", "tiers", f"{shape} copied out, over a memcpy", "x", out),
            Case(f"tier-in-{kib}-{at_once}", "tiers", f"{shape} copied in, over a memcpy", "x", back),
        ]
    wanted = set(groups)
    return [case for case in cases if case.group in wanted]


def run_cases(cases: Sequence[Case], unit: Unit, repeat: int, report: Progress) -> list[Figure]:
    """Each case once to warm up and then `repeat` times, in turns: figures are medians."""
    samples: dict[str, list[float]] = {case.key: [] for case in cases}
    details: dict[str, dict[str, Any]] = {case.key: {} for case in cases}
    lap = lap_ns()
    for turn in range(repeat + 1):
        report(f"run {turn} of {repeat}" if turn else "warming up")
        for case in cases:
            prepared = case.workload.run(lap)
            unit.sample()
            with quiet():
                figure = prepared.work()
            unit.sample()
            if turn:
                samples[case.key].append(figure)
            if prepared.manager is not None:
                details[case.key] = {"hit_rate": prepared.manager.get_metrics_aggregated().cache_hit_rate}
            del prepared
    figures = []
    for case in cases:
        found, bound, served = details[case.key], BOUNDS[case.key], case.workload
        if isinstance(served, Served) and served.workload.kind != "mooncake":
            bound = Bound()  # the limit and the peers are those of that trace
        figures.append(make_figure(case.key, case.title, case.unit, samples[case.key], unit.speed, found, bound))
        if isinstance(served, Served):
            report("simulating an LRU of the same size")
            lru, hit_rate = served.lru_hit_rate(), found["hit_rate"]
            rates, title = {"hit_rate": hit_rate, "lru_hit_rate": lru}, "tokens missed, over those that an LRU misses"
            figures.append(make_figure("w4-misses", title, "x", [(1 - hit_rate) / (1 - lru)], details=rates))
    return figures
