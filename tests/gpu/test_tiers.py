"""Host and disk tiers below pages on a GPU: copies on streams of their own, right whatever overtakes what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayk import InferenceSession, KVConnectorConfig, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk.tiers.copies import CudaCopier, register
from rayk.tiers.pool import HostPool

PAGE = 128


def params(**changes: Any) -> MHAKVCacheParams:
    return MHAKVCacheParams(
        dtype="bfloat16",
        n_kv_heads=2,
        head_dim=64,
        num_layers=4,
        page_size=PAGE,
        devices=["cuda:0"],
        enable_prefix_caching=True,
        **changes,
    )


def fill(inputs: Any, batch: Any) -> None:
    """Every slot of the active window holds its request's number plus its position, mod 199."""
    [shard] = inputs.shards
    for row, ctx in enumerate(batch):
        window = ctx.tokens
        at = torch.arange(window.processed_length, window.processed_length + window.active_length, device="cuda")
        pages = shard.lookup_table[row].to("cuda").long()[at // PAGE]
        values = ((int(window.all[0]) + at) % 199).to(shard.kv_blocks.dtype)
        shard.kv_blocks[pages, :, :, at % PAGE] = values[:, None, None, None, None]


@pytest.mark.parametrize("connector", ["local", "tiered"])
def test_pages_come_back_right_while_others_are_written(connector: str, tmp_path: Path) -> None:
    config = KVConnectorConfig(disk_offload_dir=tmp_path, disk_offload_max_bytes=256 << 20)
    tiered = params(kv_connector=connector, kv_connector_config=config)
    with (
        InferenceSession("inline") as session,
        PagedKVCacheManager(tiered, session, 24, 40 if connector == "local" else 8, True, max_batch_size=4) as manager,
    ):
        hits = 0
        for turn in range(60):
            n = turn % 6
            ctx = TextContext(f"r{turn}", [n, *range(5 * PAGE)], 10_000)
            manager.claim(ctx.request_id, 0)
            manager.alloc(ctx, 0)
            manager.execute([[ctx]], fill)
            hits += ctx.cached_prefix_length or 0
            ctx.update(1)
            manager.step([[ctx]])
            [read] = manager.read_pages(manager.get_req_blocks(ctx.request_id, 0)[:5], 0)
            want = ((n + torch.arange(5 * PAGE)) % 199).to(torch.bfloat16).reshape(5, 1, 1, PAGE, 1, 1)
            assert (read == want).all(), f"turn {turn}"
            manager.release(ctx.request_id, 0)
        manager.drain()
        manager.check_integrity()
        assert hits >= 40 * 5 * PAGE
        assert manager.get_metrics_aggregated().h2d_blocks_copied > 0


@pytest.mark.parametrize("page_mib", [1, 16])
def test_copies_against_a_plain_pinned_copy(page_mib: int) -> None:
    """Printed, not judged: what a transfer reaches of a plain pinned cudaMemcpy of the same bytes."""
    count, size = 1024 // page_mib, page_mib << 20
    device = torch.zeros((count, size), dtype=torch.uint8, device="cuda")
    pinned = torch.zeros((count, size), dtype=torch.uint8, pin_memory=True)
    pool = HostPool(None, count, size)
    assert register(pool.rows) == ""
    copier = CudaCopier([[device]])
    order = np.random.default_rng(0).permutation(count).astype(np.int32)

    def rate(copy: Any) -> float:
        best = 0.0
        for _ in range(4):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            ticket = copy()
            if ticket is not None:
                for event in ticket.events:
                    torch.cuda.current_stream().wait_event(event)
            end.record()
            torch.cuda.synchronize()
            best = max(best, count * size / begin.elapsed_time(end) / 1e6)
        return best

    rows = list(range(count))
    plain: dict[str, float] = {}
    plain["d2h"] = rate(lambda: (pinned.copy_(device, non_blocking=True), None)[1])
    plain["h2d"] = rate(lambda: (device.copy_(pinned, non_blocking=True), None)[1])
    ours = {"d2h": rate(lambda: copier.store(order, pool.rows, rows))}
    ours["h2d"] = rate(lambda: copier.load(pool.rows, rows, order))
    for way in ("d2h", "h2d"):
        print(f"{page_mib} MiB pages, {way}: {ours[way]:.1f} GB/s of {plain[way]:.1f} plain")
    pool.close()
