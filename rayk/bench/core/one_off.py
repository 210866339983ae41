"""Figures that are measured once and in their own way: start, memory, engine, the way through Ray, instructions."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from rayk.bench.core.case import Figure, Progress, make_figure
from rayk.bench.core.clock import Unit
from rayk.bench.core.instructions import DECODE_BATCH, SIZES, count_instructions
from rayk.bench.core.memory import PAGES, measure_memory, measure_start
from rayk.bench.core.ray_path import BATCH, REPLICAS, measure_ray_path

INSTRUCTION_TITLES = {
    "w1": "instructions of a cold request",
    "w2": "instructions of one that shares a prefix",
    "w3": f"instructions of a step, batch {DECODE_BATCH}",
    "w3-batch": f"instructions of a step, batch {DECODE_BATCH}, batch API",
}


def start_figures(unit: Unit, turns: int, report: Progress) -> list[Figure]:
    """The start of a replica core of a million pages."""
    report(f"starting a core of {PAGES:,} pages")
    starts = [measure_start(PAGES) for _ in range(turns)]
    unit.sample()
    cpu, beyond = [start.cpu_s for start in starts], [start.beyond_bytes / 1e6 for start in starts]
    wall = {"wall_s": median(start.wall_s for start in starts)}
    return [
        make_figure("start-time", f"core of {PAGES:,} pages ready", "s", cpu, unit.speed, wall),
        make_figure("start-memory", "its memory beyond the pages", "MB", beyond),
    ]


def memory_figures(unit: Unit, turns: int, report: Progress) -> list[Figure]:
    """What is kept beside the pages, and how the time of an operation grows with all that there is."""
    report("filling a core of a million pages")
    found = measure_memory()
    size = f"{found.tokens / 1e6:.0f}M tokens, {found.running:,} running"
    figures = [
        ("page-bytes", "memory of a cached page, 64 B of it its tokens", "B", found.cached_page),
        ("lone-page-bytes", "the same, of a prompt of one page", "B", found.page_alone),
        ("entry-bytes", "memory of an entry of the index, 64 replicas", "B", found.index_entry),
        ("request-bytes", "memory of a running request of 1,024 tokens", "B", found.running_request),
        ("full-memory", f"core of {size}: beyond the pages", "MB", found.beyond_bytes / 1e6),
        ("slower-w1", "its cold request, over that of 1 % of the size", "x", found.request_slowdown),
        ("slower-w3", "its decode step, over that of 1 % of the size", "x", found.step_slowdown),
    ]
    return [make_figure(key, title, name, [value]) for key, title, name, value in figures]


def engine_figures(unit: Unit, turns: int, report: Progress) -> list[Figure]:
    """The engine's loop around a model that does nothing, and attention over pages beside attention without them."""
    from rayk.attention.measure import paged_decode_cost
    from rayk.engine.measure import loop_cost

    report("running the engine's loop")
    loop_cost()  # warms up
    loops = []
    for _ in range(turns):
        loops.append(loop_cost().seconds * 1e3)
        unit.sample()
    report("attending over pages")
    costs = [paged_decode_cost().ratio for _ in range(turns)]
    loop = "engine's decode step, batch 256, nothing but its loop"
    return [
        make_figure("engine-loop", loop, "ms", loops, unit.speed),
        make_figure("attention", "paged decode attention over dense SDPA, batch 32", "x", costs),
    ]


def ray_figures(unit: Unit, turns: int, report: Progress) -> list[Figure]:
    """A decode iteration on Ray."""
    report(f"decoding on an embedded Ray, {REPLICAS} replicas")
    cost = measure_ray_path()
    unit.sample()
    each = f"request and step, {REPLICAS} replicas of {BATCH}"
    took, calls = {"iteration_ms": cost.iteration_ms}, "messages to a replica in a decode iteration"
    return [
        make_figure("ray-calls", calls, "", [cost.calls], details=took),
        make_figure("ray-sent", f"{each}: bytes sent", "B", [cost.sent]),
        make_figure("ray-received", f"{each}: bytes received", "B", [cost.received]),
        make_figure("ray-driver", f"{each}: CPU of the driver's thread", "us", [cost.driver_us], unit.speed),
        make_figure("ray-replica", f"{each}: CPU of a replica's process", "us", [cost.replica_us], unit.speed),
    ]


def instruction_figures(unit: Unit, turns: int, report: Progress) -> list[Figure]:
    """Instructions of the small cases, and how they grow from 10,000 to 1,000,000 pages."""
    report("counting instructions under valgrind")
    counted = count_instructions()
    figures = [
        make_figure(f"i-{key}", title, "", [counted[key].instructions], details={**counted[key].shares})
        for key, title in INSTRUCTION_TITLES.items()
        if key in counted
    ]
    small, large = SIZES
    for key in ("w1", "w3", "w3-batch"):
        growth = counted[f"{key}-{large}"].instructions / counted[f"{key}-{small}"].instructions
        title = f"{INSTRUCTION_TITLES[key]}: 1,000,000 pages over 10,000"
        figures.append(make_figure(f"flat-{key}", title, "x", [growth]))
    return figures


ONE_OFF: dict[str, Callable[[Unit, int, Progress], list[Figure]]] = {
    "start": start_figures,
    "memory": memory_figures,
    "engine": engine_figures,
    "ray": ray_figures,
    "instructions": instruction_figures,
}
"""By group, in the order of the table: what measures it, so many turns where it takes turns."""
