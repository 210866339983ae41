"""Fitting the weights of the cost policy: the same scenarios under each set of weights, and which does best.

    python -m rayk.simulate.fit --azure ../shared/traces/azure2023_conv.csv.gz

Scenarios are the generated workloads on several replica counts and loads, with their own arrivals and, where files are
given, with those of recorded Azure requests, which come in bursts. The loss of a set in a scenario is

    sqrt(mean * p90 time to first token) / (hit rate / pooled hit rate)

over the smallest of all sets; printed is the geometric mean over the scenarios, and the worst of them. Losses are
flat where hit rates are not, so the best set is the one of least loss among those that reach `--hits` of the pooled
hit rate in every scenario.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import product

import msgspec
import numpy as np

from rayk.simulate.model import Case, Simulator
from rayk.workloads.generators import agent, chat, documents
from rayk.workloads.request import BenchRequest, Workload
from rayk.workloads.traces import read_trace

REPLICAS = (2, 8, 32)
LOADS = (0.6, 0.8)
CAPACITY = 900_000


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """A set of weights and its losses, 1 being the best of all sets; `hit_rate` is the lowest part of pooled."""

    duplication: float
    queueing: float
    eviction: float
    loss: float
    worst: float
    hit_rate: float


def generated(requests: int, seed: int) -> list[Workload]:
    """The workloads, in full length; the last one has so few documents that a replica cannot serve all who ask for
    one."""
    return [
        chat(requests, seed=seed, scale=1.0, rate=3.4),
        agent(requests, seed=seed, scale=1.0, sessions=48),
        documents(requests, seed=seed, scale=1.0, rate=3.0),
        documents(requests, seed=seed, scale=1.0, rate=3.0, documents=3),
    ]


def retimed(workload: Workload, times: Sequence[float]) -> Workload:
    """The workload's requests, arriving at `times` for as long as these last; turns do not wait for each other."""
    requests = [
        BenchRequest(
            r.index, r.request_id, t, r.session_id, r.prompt_length, r.output_length, r.runs, r.output_first, None
        )
        for r, t in zip(workload.requests, times, strict=False)
    ]
    return Workload(f"{workload.source}, retimed", workload.kind, requests, workload.parameters)


def fit(
    workloads: Sequence[Workload],
    duplications: Sequence[float],
    queueings: Sequence[float],
    evictions: Sequence[float],
    page_size: int = 512,
) -> list[Fitted]:
    """All sets, the best first."""
    from rayk.scheduler.router.cost import DEFAULT_WEIGHTS

    sets = [
        DEFAULT_WEIGHTS._replace(duplication=k, queueing=c, eviction=u)
        for k, c, u in product(duplications, queueings, evictions)
    ]
    losses: list[list[float]] = []
    hit_rates: list[list[float]] = []
    for workload in workloads:
        simulator = Simulator(workload, page_size)
        for replicas, load in product(REPLICAS, LOADS):
            case = Case(replicas=replicas, capacity=CAPACITY, policy="lru", router="cost")
            rate = simulator.rate(case, load)
            rows = [simulator.run(case, rate, weights) for weights in sets]
            hits = [row.hit_rate / row.pooled if row.pooled else 1.0 for row in rows]
            raw = [math.sqrt(r.ttft.mean * r.ttft.p90) / max(h, 1e-9) for r, h in zip(rows, hits, strict=True)]
            losses.append([loss / min(raw) for loss in raw])
            hit_rates.append(hits)
    table = np.array(losses)
    means, worst, lowest = np.exp(np.log(table).mean(0)), table.max(0), np.array(hit_rates).min(0)
    found = [
        Fitted(
            duplication=weights.duplication,
            queueing=weights.queueing,
            eviction=weights.eviction,
            loss=float(means[i]),
            worst=float(worst[i]),
            hit_rate=float(lowest[i]),
        )
        for i, weights in enumerate(sets)
    ]
    return sorted(found, key=lambda each: each.loss)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m rayk.simulate.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--duplication", type=float, nargs="+", default=[0, 1, 2, 2.5, 3, 4])
    parser.add_argument("--queueing", type=float, nargs="+", default=[0, 0.25, 0.5, 1])
    parser.add_argument("--eviction", type=float, nargs="+", default=[0, 0.3, 0.6])
    parser.add_argument("--hits", type=float, default=0.93, help="part of the pooled hit rate to be reached everywhere")
    parser.add_argument("--azure", nargs="*", default=[], help="recorded requests whose arrivals are used, too")
    asked = parser.parse_args(argv)
    workloads = generated(asked.requests, asked.seed)
    for path in asked.azure:
        times = [request.arrival_s for request in read_trace(path).requests]
        workloads += [retimed(workload, times) for workload in generated(asked.requests, asked.seed + 1)]
    found = fit(workloads, asked.duplication, asked.queueing, asked.eviction)
    best = next((each for each in found if each.hit_rate >= asked.hits), None)
    print(f"{'duplication':>11} {'queueing':>8} {'eviction':>8} {'loss':>7} {'worst':>7} {'hits/pooled, lowest':>20}")
    for each in found:
        sets = f"{each.duplication:11g} {each.queueing:8g} {each.eviction:8g}"
        figures = f"{each.loss:7.3f} {each.worst:7.3f} {each.hit_rate:20.3f}"
        print(f"{sets} {figures}" + ("  <- best" if each is best else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
