"""Readings of one engine."""

from __future__ import annotations

from collections.abc import Iterator

from rayk.engine.settings import EngineStats
from rayk.kvcache.readings import read_pages
from rayk.kvcache.request import Usage
from rayk.metrics.reading import Labels, Reading, reading


def read_engine(stats: EngineStats, page_bytes: int, labels: Labels) -> Iterator[Reading]:
    """Of an engine with those counters."""
    usage, idle = Usage(stats.pages, stats.free_pages, stats.cached_pages), stats.cached_pages
    yield from read_pages(usage, idle, stats.cache, stats.prompt_tokens, stats.reused, stats.tiers, page_bytes, labels)
    for phase, requests in (("waiting", stats.waiting), ("running", stats.running)):
        yield reading("rayk_requests", requests, labels, phase=phase)
    tokens = {
        "prompt": stats.prompt_tokens,
        "generated": stats.generated_tokens,
        "recomputed": stats.recomputed_tokens,
    }
    for kind, count in tokens.items():
        yield reading("rayk_tokens_total", count, labels, kind=kind)
    yield reading("rayk_engine_steps_total", stats.steps, labels)
    for outcome, requests in (("finished", stats.finished), ("failed", stats.failed)):
        yield reading("rayk_requests_ended_total", requests, labels, outcome=outcome)
    yield reading("rayk_preemptions_total", stats.preemptions, labels)
    for name, times in stats.times._asdict().items():
        yield reading(f"rayk_{name}_seconds", times, labels)
