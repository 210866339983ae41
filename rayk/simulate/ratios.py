"""How the cost router does against the others: medians over jitter seeds, as ratios.

    python -m rayk.simulate.ratios --workload agent --replicas 1,2,4,8,16,64 --seeds 3

    python -m rayk.simulate.ratios --workload documents --arrivals azure2023_code.csv.gz

Below 1 the cost router is faster than the one named; `better` is the better of least-loaded and prefix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from rayk.errors import RaykError
from rayk.simulate.command import parse_count, parse_list, parse_tokens, read_work
from rayk.simulate.fit import retimed
from rayk.simulate.model import Case, Row, Simulator
from rayk.workloads.request import Workload
from rayk.workloads.traces import read_trace


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """The cost router's figures over another's: hit rate over pooled, mean and p90 time to first token over others'."""

    replicas: int
    hits: float
    imbalance: float
    mean_least_loaded: float
    p90_least_loaded: float
    mean_round_robin: float
    p90_round_robin: float
    mean_better: float
    p90_better: float


def ratios(workload: Workload, replicas: int, capacity: int, load: float, page_size: int, seeds: int) -> Ratios:
    """Medians over `seeds` jitters of the workload's arrivals."""
    found = [_of_seed(Simulator(workload, page_size, seed), replicas, capacity, load) for seed in range(seeds)]
    medians = np.median([msgspec.structs.astuple(each) for each in found], axis=0).tolist()
    return Ratios(**{**dict(zip(Ratios.__struct_fields__, medians, strict=True)), "replicas": replicas})


def _of_seed(simulator: Simulator, replicas: int, capacity: int, load: float) -> Ratios:
    rows: dict[str, Row] = {}
    for router in ("cost", "least-loaded", "round-robin", "prefix"):
        case = Case(replicas=replicas, capacity=capacity, policy="lru", router=router)
        rows[router] = simulator.run(case, simulator.rate(case, load))
    cost, least, robin, prefix = rows.values()
    return Ratios(
        replicas=replicas,
        hits=cost.hit_rate / cost.pooled if cost.pooled else 1.0,
        imbalance=cost.imbalance,
        mean_least_loaded=cost.ttft.mean / least.ttft.mean,
        p90_least_loaded=cost.ttft.p90 / least.ttft.p90,
        mean_round_robin=cost.ttft.mean / robin.ttft.mean,
        p90_round_robin=cost.ttft.p90 / robin.ttft.p90,
        mean_better=cost.ttft.mean / min(least.ttft.mean, prefix.ttft.mean),
        p90_better=cost.ttft.p90 / min(least.ttft.p90, prefix.ttft.p90),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m rayk.simulate.ratios", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--workload")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--arrivals", type=Path, help="a trace whose requests say when these arrive")
    parser.add_argument("--replicas", default="8")
    parser.add_argument("--capacity", default="0.9M")
    parser.add_argument("--utilization", type=float, default=0.8)
    parser.add_argument("--page-size", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    asked = parser.parse_args(argv)
    try:
        capacity = parse_tokens(asked.capacity)
        counts = [parse_count(text) for text in parse_list("--replicas", asked.replicas)]
        work = read_work(asked.trace, asked.workload, asked.requests, None, None, seed=0)
        if asked.arrivals is not None:
            work = retimed(work, [request.arrival_s for request in read_trace(asked.arrivals).requests])
        shape = (capacity, asked.utilization, asked.page_size, asked.seeds)
        found = [ratios(work, count, *shape) for count in counts]
    except RaykError as error:
        print(f"ratios: {error}", file=sys.stderr)
        return 2
    if asked.format == "json":
        print(json.dumps(msgspec.to_builtins(found)))
        return 0
    print(f"{'':>8} {'hits/':>7} {'':>9} | {'least-loaded':>15} | {'round-robin':>15} | {'better':>15}")
    print(f"{'replicas':>8} {'pooled':>7} {'imbalance':>9}" + f" | {'mean':>7} {'p90':>7}" * 3)
    for each in found:
        pairs = msgspec.structs.astuple(each)[3:]
        cells = [f" | {pairs[i]:7.3f} {pairs[i + 1]:7.3f}" for i in (0, 2, 4)]
        print(f"{each.replicas:8d} {each.hits:7.3f} {each.imbalance:9.3f}" + "".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
