"""Host and disk tiers below pages on a GPU: copies on streams of their own, right whatever overtakes what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayk import InferenceSession, KVConnectorConfig, MHAKVCacheParams, PagedKVCacheManager, TextContext

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
    config = KVConnectorConfig(disk_offload_dir=tmp_path, disk_offload_max_bytes=256 << 20, model_id="m")
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


def test_a_request_of_a_loading_prefix_goes_on_without_the_copy() -> None:
    """Loads are not waited for by those that do not need them, and whoever gives up leaves pages that can be used."""
    with (
        InferenceSession("inline") as session,
        PagedKVCacheManager(params(kv_connector="local"), session, 48, 100, True, max_batch_size=4) as manager,
    ):
        busy = torch.randn(8192, 8192, device="cuda")
        for turn in range(40):
            n = turn % 8
            ctx = TextContext(f"r{turn}", [n, *range(10 * PAGE)], 10_000)
            manager.claim(ctx.request_id, 0)
            busy = (busy @ busy).clamp(-1, 1)
            manager.alloc(ctx, 0)
            if turn % 3 == 2:  # given up while its pages are on their way, or just after
                manager.release(ctx.request_id, 0)
                continue
            manager.execute([[ctx]], fill)
            ctx.update(1)
            manager.step([[ctx]])
            [read] = manager.read_pages(manager.get_req_blocks(ctx.request_id, 0)[:10], 0)
            want = ((n + torch.arange(10 * PAGE)) % 199).to(torch.bfloat16).reshape(10, 1, 1, PAGE, 1, 1)
            assert (read == want).all(), f"turn {turn}"
            manager.release(ctx.request_id, 0)
        manager.drain()
        manager.check_integrity()
        assert manager.get_metrics_aggregated().h2d_blocks_copied > 0
