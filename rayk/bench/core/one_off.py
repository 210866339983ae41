"""Figures that are measured once and in their own way: start, memory, engine, the way through Ray, instructions."""

from __future__ import annotations

from statistics import median

from rayk.bench.core.case import Progress
from rayk.bench.core.clock import Unit
from rayk.bench.core.instructions import DECODE_BATCH, SIZES, count_instructions
from rayk.bench.core.limits import BOUNDS
from rayk.bench.core.memory import measure_memory
from rayk.bench.core.ray_path import BATCH, REPLICAS, measure_ray_path
from rayk.bench.core.result import Figure, make_figure
from rayk.bench.core.start import PAGES, measure_start

ENGINE_TURNS = 3
INSTRUCTION_TITLES = {
    "w1": "instructions of a cold request",
    "w2": "instructions of one that shares a prefix",
    "w3": f"instructions of a step, batch {DECODE_BATCH}",
    "w3-batch": f"instructions of a step, batch {DECODE_BATCH}, batch API",
}


def start_figures(unit: Unit, repeat: int, report: Progress) -> list[Figure]:
    """The start of a replica core of a million pages."""
    report(f"starting a core of {PAGES:,} pages")
    starts = [measure_start(PAGES) for _ in range(repeat)]
    unit.sample()
    cpu = [start.cpu_s for start in starts]
    beyond = [start.beyond_bytes / 1e6 for start in starts]
    wall = median(start.wall_s for start in starts)
    return [
        make_figure(
            "start-time",
            f"core of {PAGES:,} pages ready",
            "s",
            cpu,
            median(cpu),
            unit.speed,
            BOUNDS["start-time"],
            {"wall_s": wall},
        ),
        make_figure(
            "start-memory", "its memory beyond the pages", "MB", beyond, median(beyond), 1.0, BOUNDS["start-memory"]
        ),
    ]


def memory_figures(report: Progress) -> list[Figure]:
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
    return [make_figure(key, title, unit, [value], value, 1.0, BOUNDS[key]) for key, title, unit, value in figures]


def engine_figures(unit: Unit, report: Progress) -> list[Figure]:
    """The engine's loop around a model that does nothing, and attention over pages beside attention without them."""
    from rayk.attention.measure import paged_decode_cost
    from rayk.engine.measure import loop_cost

    report("running the engine's loop")
    loop_cost()  # warms up
    loops = []
    for _ in range(ENGINE_TURNS):
        loops.append(loop_cost().seconds * 1e3)
        unit.sample()
    report("attending over pages")
    costs = [paged_decode_cost().ratio for _ in range(ENGINE_TURNS)]
    loop, ratio = (
        "engine's decode step, batch 256, nothing but its loop",
        "paged decode attention over dense SDPA, batch 32",
    )
    return [
        make_figure("engine-loop", loop, "ms", loops, median(loops), unit.speed, BOUNDS["engine-loop"]),
        make_figure("attention", ratio, "x", costs, median(costs), 1.0, BOUNDS["attention"]),
    ]


def ray_figures(unit: Unit, report: Progress) -> list[Figure]:
    """A decode iteration on Ray."""
    report(f"decoding on an embedded Ray, {REPLICAS} replicas")
    unit.sample()
    cost = measure_ray_path()
    unit.sample()
    each = f"request and step, {REPLICAS} replicas of {BATCH}"
    figures = [
        ("ray-calls", "messages to a replica in a decode iteration", "", cost.calls),
        ("ray-sent", f"{each}: bytes sent", "B", cost.sent),
        ("ray-received", f"{each}: bytes received", "B", cost.received),
        ("ray-driver", f"{each}: CPU of the driver's thread", "us", cost.driver_us),
        ("ray-replica", f"{each}: CPU of a replica's process", "us", cost.replica_us),
    ]
    details = {"ray-calls": {"iteration_ms": cost.iteration_ms}}
    return [
        make_figure(key, title, name, [value], value, unit.speed, BOUNDS[key], details.get(key))
        for key, title, name, value in figures
    ]


def instruction_figures(report: Progress) -> list[Figure]:
    """Instructions of the small cases, and how they grow from 10,000 to 1,000,000 pages."""
    report("counting instructions under valgrind")
    counted = count_instructions()
    figures = []
    for key, title in INSTRUCTION_TITLES.items():
        if key in counted:
            value, shares = counted[key]
            figures.append(make_figure(f"i-{key}", title, "", [value], value, 1.0, BOUNDS[f"i-{key}"], {**shares}))
    small, large = SIZES
    for key in ("w1", "w3", "w3-batch"):
        value = counted[f"{key}-{large}"].instructions / counted[f"{key}-{small}"].instructions
        title = f"{INSTRUCTION_TITLES[key]}: 1,000,000 pages over 10,000"
        figures.append(make_figure(f"flat-{key}", title, "x", [value], value, 1.0, BOUNDS[f"flat-{key}"]))
    return figures
