"""How many pages, and how long a request, a number of bytes gives, by the rules of MAX 26.5.

`available_cache_memory` is in bytes over all devices and replicas; pages and lengths (in tokens) are per replica.
Numbers that do not fit at all are a MemoryPlanError; those that fit but will hurt are warnings of the logger
`rayk.planning`. Lengths and batches that fit are searched for on what fits, and tried again before they are said.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from rayk.params import KVCacheParams, require, require_at_least
from rayk.planning.errors import MemoryPlanError
from rayk.quantity import show_bytes

GIB = 1 << 30

# What one device reserves for collectives. NCCL's default buffers of one connection are 4 MiB (Simple), 512 KiB (LL:
# 8 lines x 512 threads x 8 steps x 16 bytes) and 4,915,200 bytes (LL128: 120 elements x 640 threads x 8 steps x 8
# bytes); a ring of at most 32 channels has 32 of them. The reference reserves 294,387,728 bytes.
SIGNAL_BUFFER_BYTES = 32 * ((4 << 20) + (512 << 10) + 120 * 640 * 8 * 8)

log = logging.getLogger("rayk.planning")


def spec_decode_cache_slack(params: KVCacheParams) -> int:
    """Tokens beyond its maximal length that a request may hold while drafts are verified; 0 without speculation."""
    drafts = params.num_draft_tokens
    return 3 * drafts + params.block_draft_slots + 1 if drafts else 0


def pages_for_length(params: KVCacheParams, length: int) -> int:
    """Pages of one request that grows to `length` tokens."""
    return math.ceil((length + spec_decode_cache_slack(params)) / params.page_size)


def pages_in(params: KVCacheParams, available_cache_memory: int) -> int:
    """Whole pages per replica in these bytes; may be below 1."""
    require(params.bytes_per_page > 0, f"a page has {params.bytes_per_page} bytes: the parameters describe no cache")
    return available_cache_memory // params.data_parallel_degree // params.bytes_per_page


def compute_num_device_blocks(
    params: KVCacheParams,
    available_cache_memory: int,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    require_max_seq_len_fits: bool = False,
) -> int:
    """Pages per replica: what fits, but no more than `max_batch_size` requests of `max_seq_len` tokens can use.

    MemoryPlanError when not one page fits or, if `require_max_seq_len_fits`, not one request of `max_seq_len`.
    """
    _check(max_batch_size, max_seq_len)
    fits = pages_in(params, available_cache_memory)
    page = params.bytes_per_page
    there = show_bytes(max(0, available_cache_memory // params.data_parallel_degree))
    if fits < 1:
        raise MemoryPlanError(
            f"Not even one page fits: it takes {show_bytes(page)}, {there} are left for the cache of a replica. "
            "Use smaller pages, more devices or a smaller model.",
            page,
            available_cache_memory // params.data_parallel_degree,
            [],
        )
    if max_batch_size is not None and max_batch_size > fits:
        log.warning(
            "A batch of %d requests needs a page (%s) for each, %d pages fit into %s: at most %d requests run at once",
            max_batch_size,
            show_bytes(page),
            fits,
            there,
            fits,
        )
    if max_seq_len is None:
        return fits
    one = pages_for_length(params, max_seq_len)
    if one > fits:
        text = (
            f"One request of {max_seq_len} tokens needs {one} pages ({show_bytes(one * page)}), {fits} fit into {there}"
        )
        if require_max_seq_len_fits:
            raise MemoryPlanError(f"{text}.", one * page, fits * page, _longest(params, fits))
        log.warning("%s: no request can grow that long", text)
    return fits if max_batch_size is None else min(fits, max_batch_size * one)


def _check(max_batch_size: int | None, max_seq_len: int | None) -> None:
    given = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
    require_at_least(1, **{name: value for name, value in given.items() if value is not None})


def _longest(params: KVCacheParams, pages: int) -> list[dict[str, int]]:
    """The longest request in `pages`, as a suggestion that was tried; empty if the slack alone is longer."""
    length = pages * params.page_size - spec_decode_cache_slack(params)
    return [{"max_length": length}] if length >= 1 and pages_for_length(params, length) <= pages else []


def cache_bytes(params: KVCacheParams, available_cache_memory: int, max_batch_size: int, max_seq_len: int) -> int:
    """estimated_memory_size() without its warnings, 0 when not one page fits; what searches call."""
    used = min(pages_in(params, available_cache_memory), max_batch_size * pages_for_length(params, max_seq_len))
    return max(0, used) * params.bytes_per_page * params.data_parallel_degree


def estimated_memory_size(
    params: KVCacheParams, available_cache_memory: int, max_batch_size: int, max_seq_len: int
) -> int:
    """Bytes that the caches of all replicas take, at most `available_cache_memory`."""
    pages = compute_num_device_blocks(params, available_cache_memory, max_batch_size, max_seq_len)
    return pages * params.bytes_per_page * params.data_parallel_degree


def compute_max_seq_len_fitting_in_cache(params: KVCacheParams, available_cache_memory: int) -> int:
    """Tokens of the longest request that one replica's cache can hold, at least 1. MemoryPlanError without a page."""
    pages = compute_num_device_blocks(params, available_cache_memory, max_batch_size=1)
    return max(1, pages * params.page_size - spec_decode_cache_slack(params))


def compute_num_host_blocks(params: KVCacheParams) -> int:
    """Pages of the host tier, one pool for all replicas; 0 without a host tier. MemoryPlanError when not one fits.

    The host holds a replicated (MLA) page once, however many TP shards hold a copy.
    """
    if params.kv_connector == "null":
        return 0
    gigabytes = params.host_kvcache_swap_space_gb or 0.0
    require(
        math.isfinite(gigabytes) and gigabytes >= 0, f"host_kvcache_swap_space_gb must be at least 0, got {gigabytes!r}"
    )
    there = int(gigabytes * GIB)
    page = host_page_bytes(params)
    if there < page:
        raise MemoryPlanError(
            f"Not even one page fits on the host: it takes {show_bytes(page)}, host_kvcache_swap_space_gb="
            f"{gigabytes:g} is {show_bytes(there)}. Give the host tier more, or turn it off.",
            page,
            there,
            [],
        )
    return there // page


def host_page_bytes(params: KVCacheParams) -> int:
    """Bytes of one page on the host."""
    replicated = next(iter(params.leaves.values())).replicates_kv_across_tp
    return params.bytes_per_page // params.tensor_parallel_degree if replicated else params.bytes_per_page


def last_that_fits(fits: Callable[[int], bool], upper: int) -> int | None:
    """The largest n in 1..upper with fits(n), where fits is true up to some n and false beyond; None if never."""
    if upper < 1 or not fits(1):
        return None
    low, high = 1, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Room:
    """What a KV cache may take, in bytes over all replicas: the `budget` of the utilization, and what is `left`.

    `left` is free memory less everything else. A budget beyond it (a utilization above 1) is what makes settings fail.
    """

    params: KVCacheParams
    budget: int
    left: int

    def fits(self, batch: int, length: int) -> bool:
        """Whether the cache of `batch` requests of `length` tokens per replica is within the memory that is there."""
        return pages_in(self.params, self.budget) >= 1 and self.size(batch, length) <= self.left

    def size(self, batch: int, length: int) -> int:
        """Bytes that the cache would take."""
        return cache_bytes(self.params, self.budget, batch, length)

    def longest(self, batch: int, upper: int) -> int | None:
        """The largest maximal length up to `upper` that fits with that batch."""
        return last_that_fits(lambda length: self.fits(batch, length), upper)

    def largest_batch(self, length: int, upper: int) -> int | None:
        """The largest batch up to `upper` that fits with that length."""
        return last_that_fits(lambda batch: self.fits(batch, length), upper)

    def suggestions(self, batch: int, length: int, length_is_set: bool) -> list[dict[str, int]]:
        """Settings below `batch` and `length` that fit; a default length is lowered unasked, so not suggested."""
        found = []
        shorter = self.longest(batch, length) if length_is_set else None
        if shorter is not None:
            found.append({"max_length": shorter})
        fewer = self.largest_batch(length, batch)
        if fewer is not None:
            found.append({"max_batch_size": fewer})
        if not found:
            fewer = self.largest_batch(1, batch)
            shorter = None if fewer is None else self.longest(fewer, length)
            if fewer is not None and shorter is not None:
                found.append({"max_length": shorter, "max_batch_size": fewer})
        return [s for s in found if self.fits(s.get("max_batch_size", batch), s.get("max_length", length))]
