"""Readings of one replica's pages, prefixes and tiers."""

from __future__ import annotations

from collections.abc import Iterator

from rayk.kvcache.connector import TierCount
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.request import Reused, Usage
from rayk.metrics.reading import Labels, Reading, reading


def read_pages(
    usage: Usage,
    idle: int,
    counted: KVCacheMetrics,
    queried: int,
    reused: Reused,
    tiers: TierCount,
    page_bytes: int,
    labels: Labels,
) -> Iterator[Reading]:
    """Of a replica with those pages and counters; `idle` pages are cached without a holder, prompt tokens were
    `queried`, and those of them `reused`."""
    states = {"used": usage.used, "cached": idle, "free": usage.free - idle}
    for state, pages in states.items():
        yield reading("rayk_pages", pages, labels, state=state)
    yield reading("rayk_prefix_tokens_queried_total", queried, labels)
    for tier, tokens in zip(("device", "peer", "host", "disk"), reused, strict=True):
        yield reading("rayk_prefix_tokens_hit_total", tokens, labels, tier=tier)
    yield reading("rayk_evictions_total", counted.evicted_blocks, labels)
    yield reading("rayk_copied_pages_total", counted.cross_replica_blocks_copied, labels)
    if not tiers.host_total:
        return
    moved = {
        ("host", "out"): counted.d2h_blocks_copied,
        ("host", "in"): counted.h2d_blocks_copied,
        ("disk", "out"): counted.disk_blocks_written,
        ("disk", "in"): counted.disk_blocks_read,
    }
    for (tier, direction), pages in moved.items():
        yield reading("rayk_tier_bytes_total", pages * page_bytes, labels, tier=tier, direction=direction)
    held = {"host": (tiers.host_used, tiers.host_total), "disk": (tiers.disk_used, tiers.disk_total)}
    for tier, (used, total) in held.items():
        yield reading("rayk_tier_pages", used, labels, tier=tier, state="used")
        yield reading("rayk_tier_pages", total - used, labels, tier=tier, state="free")
    yield reading("rayk_tier_loads_failed_total", counted.failed_loads, labels)
    yield reading("rayk_tier_files_rejected_total", counted.rejected_files, labels)


def read_core(core: ReplicaCore, labels: Labels) -> Iterator[Reading]:
    """Of a replica whose requests drivers hold. Nobody may use the core meanwhile."""
    counted, size, loads = core.counters(), core.page_size, core.loads
    found = loads.found_pages if loads is not None else 0
    on_disk = min(found, loads.found_on_disk if loads is not None else 0)
    reused = Reused(core.device_hits * size, core.peer_hits * size, (found - on_disk) * size, on_disk * size)
    tiers = core.connector.count() if core.connector is not None else TierCount()
    page_bytes = core.params.bytes_per_page
    usage = core.usage
    yield from read_pages(
        usage, usage.free - core.pool.empty, counted, counted.prompt_tokens, reused, tiers, page_bytes, labels
    )
    yield reading("rayk_requests", len(core.requests), labels, phase="claimed")
