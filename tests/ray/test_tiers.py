"""Tiers below replicas in processes of their own: shared, kept over a restart, and left clean by the dead."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rayk import InferenceSession, KVConnectorConfig, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk import protocol as m
from rayk.errors import ReplicaLostError
from rayk.kvcache.connector import TierCounters
from rayk.tiers.disk import DiskTier
from rayk.tiers.files import HEADER_BYTES
from rayk.tiers.identity import fingerprint

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import PAGE, chain, contents, params, stamp

HOST, DISK = 16, 64  # pages
SEED = bytes(range(32))


@pytest.fixture
def tiered(tmp_path: Path) -> MHAKVCacheParams:
    size = params(1).bytes_per_page + HEADER_BYTES
    config = KVConnectorConfig(
        disk_offload_dir=tmp_path, disk_offload_max_bytes=DISK * size, num_disk_workers=1, model_id="m"
    )
    return params(
        kv_connector="tiered",
        kv_connector_config=config,
        kv_hash_seed=SEED,
        enable_dp_cross_replica_prefix_copy=False,
    )


def start(session: InferenceSession, tiered: MHAKVCacheParams) -> PagedKVCacheManager:
    return PagedKVCacheManager(tiered, session, 24, HOST, True, max_batch_size=8, replace=False)


def serve(manager: PagedKVCacheManager, n: int, replica: int) -> int:
    """Prompt n of six pages, from start to end and checked; tokens reused."""
    ctx = TextContext("r", range(1000 * n, 1000 * n + 6 * PAGE + 1), 1000)
    batches: list[list[TextContext]] = [[], []]
    batches[replica].append(ctx)
    [admission] = manager.try_admit([ctx], [replica])
    if admission.error is not None:
        raise admission.error
    manager.execute(batches, stamp)
    cached = ctx.cached_prefix_length
    ctx.update(7)
    manager.step(batches)
    count = ctx.tokens.processed_length
    assert contents(manager, "r", replica, count) == chain(ctx.tokens.all.tolist())[:count]
    manager.release("r", replica)
    assert cached is not None
    return cached


def test_replicas_share_host_and_disk_and_a_restart_finds_the_pages(
    session: InferenceSession, tiered: MHAKVCacheParams
) -> None:
    with start(session, tiered) as manager:
        assert [serve(manager, n, n % 2) for n in range(5)] == [0] * 5
        manager.drain()
        assert [serve(manager, n, (n + 1) % 2) for n in range(5)] == [6 * PAGE] * 5
        manager.drain()
        manager.check_integrity()
        metrics = manager.get_metrics_aggregated()
        assert (metrics.disk_blocks_written, metrics.failed_loads) == (30, 0)
        assert [manager.get_num_used_disk_pages(r) for r in (0, 1)] == [30, 30]
    with start(session, tiered) as manager:
        assert [serve(manager, n, n % 2) for n in range(5)] == [6 * PAGE] * 5
        assert manager.get_metrics_aggregated().disk_blocks_read == 30


def test_a_replica_that_is_killed_leaves_its_tiers_sound(
    session: InferenceSession, tiered: MHAKVCacheParams, tmp_path: Path
) -> None:
    with start(session, tiered) as manager:
        for n in range(3):
            serve(manager, n, 0)
        pid = manager._calls.replica_pids()[0]  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ReplicaLostError):
            serve(manager, 9, 0)
        survivor = manager._calls._links[1]  # type: ignore[attr-defined]
        survivor.ask(m.Drain())
        survivor.ask(m.CheckIntegrity())
        counters = TierCounters()
        page_bytes = tiered.bytes_per_page
        budget = DISK * (page_bytes + HEADER_BYTES)
        onlooker = DiskTier(tmp_path, fingerprint(tiered), page_bytes, budget, budget // page_bytes, 32, counters)
        onlooker.reap()
        directory = onlooker._directory
        assert directory is not None
        until(lambda: directory.held_by_any() == 0)
        assert onlooker.used == len(list(tmp_path.rglob("*.kv")))
        onlooker.close()
    with start(session, tiered) as manager:
        assert serve(manager, 0, 1) in (0, 6 * PAGE)
        manager.drain()
        manager.check_integrity()
