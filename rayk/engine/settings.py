"""How an engine batches, and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rayk.kvcache.connector import TierCount
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.request import Reused
from rayk.metrics.histogram import Histogram
from rayk.metrics.table import SECONDS
from rayk.params import require, require_at_least


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """chunk_size: tokens of one forward, decoding rows counted (each of them always gets its token).

    max_queue: requests that wait or run; more are refused. watermark: share of the pages that admissions leave free.
    report_pages: whether its events report what is cached and dropped.
    """

    chunk_size: int = 512
    max_queue: int = 4096
    watermark: float = 0.01
    report_pages: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, chunk_size=self.chunk_size, max_queue=self.max_queue)
        require(0 <= self.watermark < 1, f"watermark is {self.watermark}, it must be at least 0 and below 1")


class Times(NamedTuple):
    """How long requests took at an engine, as the metrics rayk_queue_seconds, .. have it."""

    queue: Histogram
    ttft: Histogram
    itl: Histogram
    e2e: Histogram

    @classmethod
    def none(cls) -> Times:
        """Nothing so far."""
        return cls(*(Histogram(SECONDS) for _ in cls._fields))


class EngineStats(NamedTuple):
    """Counters since the start, and what there is now. Tokens of prompts count at first admissions.

    `cached_tokens` are those of `reused` together. `loading` of the running requests wait for a tier. `cache` has the
    counters of pages, `tiers` what this node's tiers hold; `cached_pages` of the free ones are cached.
    """

    steps: int
    waiting: int
    running: int
    finished: int
    failed: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    recomputed_tokens: int  # left to compute when preempted requests were admitted again
    free_pages: int
    peak_used_pages: int
    pages: int
    loading: int
    reused: Reused
    cache: KVCacheMetrics
    tiers: TierCount
    cached_pages: int
    times: Times
