"""Running the cases: interleaved, each prepared anew, the unit sampled between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rayk.bench.core.cache import POOL
from rayk.bench.core.case import Case, Progress
from rayk.bench.core.clock import Unit, lap_ns, quiet
from rayk.bench.core.decode import BATCHES, STEPS, Decode
from rayk.bench.core.limits import BOUNDS, TIER_COPIES, Bound
from rayk.bench.core.lookups import ALL, ENTRIES, FEW, FLEETS, Indexed, Lookups
from rayk.bench.core.prompts import FULL_REQUESTS, REQUESTS, SMALL_POOL, Prompts, SharedPrefix, filling
from rayk.bench.core.result import Figure, make_figure
from rayk.bench.core.tiers import Copies, Miss, Offloading
from rayk.bench.core.trace_case import REQUESTS as TRACE_REQUESTS
from rayk.bench.core.trace_case import Served

GROUPS = ("w1", "w2", "hash", "w3", "w4", "w5", "tiers", "start", "memory", "engine")
"""What is measured when nothing is picked, in the order of the table."""

EXTRA_GROUPS = ("ray", "instructions")
"""What `--only` takes as well: they start a cluster, or need valgrind."""

HASHES = {"xxh3": "xxh3_128", "sha256": "sha256"}


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
    cases += [
        Case(
            "tier-miss", "tiers", "what a miss in host and disk tier adds to a cold alloc", "us", Miss(12 // part + 1)
        ),
        Case(
            "tier-decode", "tiers", "decode while pages go to host and disk, over without", "x", Offloading(128 // part)
        ),
    ]
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
        found, bound = samples[case.key], BOUNDS[case.key]
        if isinstance(case.workload, Served) and case.workload.workload.kind != "mooncake":
            bound = Bound()  # the limit and the peers are those of that trace
        value = median(found)
        figures.append(make_figure(case.key, case.title, case.unit, found, value, unit.speed, bound, details[case.key]))
        if isinstance(case.workload, Served):
            report("simulating an LRU of the same size")
            figures.append(_misses(case.workload, details[case.key]["hit_rate"]))
    return figures


def _misses(served: Served, hit_rate: float) -> Figure:
    """How much more a run misses than an LRU of as many pages, which it must not."""
    lru = served.lru_hit_rate()
    value = (1 - hit_rate) / (1 - lru)
    title = "tokens missed, over those that an LRU misses"
    details = {"hit_rate": hit_rate, "lru_hit_rate": lru}
    return make_figure("w4-misses", title, "x", [value], value, 1.0, BOUNDS["w4-misses"], details)
