"""Opening a replica's connector from its parameters."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rayk.errors import ConfigError
from rayk.kvcache.connector import Connector, NullConnector, TierCounters
from rayk.kvcache.page_copies import PageCopier, make_copier
from rayk.kvcache.page_hash import WIDTHS
from rayk.params import KVCacheParams
from rayk.planning.node_plan import measure_node
from rayk.tiers.disk import DiskTier, within
from rayk.tiers.identity import fingerprint, keep_seed
from rayk.tiers.pool import HostPool
from rayk.tiers.tiered import TieredConnector
from rayk.tiers.workers import Workers

log = logging.getLogger("rayk.tiers")

SEED_SECONDS = 30.0
Factory = Callable[[KVCacheParams, Sequence[torch.Tensor], int, str | None], Connector]


def open_connector(
    params: KVCacheParams,
    buffers: Sequence[torch.Tensor],
    host_pages: int,
    pool: str | None,
    copier: PageCopier | None = None,
) -> Connector:
    """The connector that `params.kv_connector` names, for one replica.

    `buffers` are its device pages as uint8 `[pages, bytes per page]`; `host_pages` is the node's; `pool` names the
    cluster, so that its replicas on a node share one pool (None: they are alone); `copier` copies pages of which this
    process has a part. PlanError when there is no room.
    A name like "package.module:factory" is a third party's: factory(params, buffers, host_pages, pool) makes its
    connector; ConfigError when it cannot be imported.
    """
    if ":" in params.kv_connector:
        return _imported(params.kv_connector)(params, buffers, host_pages, pool)
    if params.kv_connector == "null" or not host_pages:
        return NullConnector()
    copier, counters = copier or make_copier(buffers, equal_buffers(params)), TierCounters()
    host = HostPool(pool, host_pages, copier.page_bytes, measure_node().host_free)
    if trouble := copier.attach(host.rows):
        log.warning("the host tier could not be page-locked (%s): copies will be slower", trouble)
    disk, workers, config = None, None, params.kv_connector_config
    if params.kv_connector == "tiered" and config is not None and config.disk_offload_dir is not None:
        folder = Path(config.disk_offload_dir)
        disk = DiskTier(
            folder,
            fingerprint(params),
            copier.page_bytes,
            config.disk_offload_max_bytes,
            config.disk_offload_max_bytes // copier.page_bytes,
            WIDTHS[params.page_hash_algo],
            counters,
        )
        workers = Workers(config.num_disk_workers)
        seed = params.kv_hash_seed
        if not disk.off and seed is not None:
            try:
                within(SEED_SECONDS, lambda: keep_seed(folder, seed))
            except OSError as error:
                log.warning("the seed cannot be kept at %s, the next start will not reuse its pages: %s", folder, error)
    return TieredConnector(copier, host, disk, workers, counters)


def equal_buffers(params: KVCacheParams) -> list[int]:
    """Lengths of the runs of device buffers that hold the same bytes: a replicated (MLA) cache's TP shards."""
    counts: list[int] = []
    for leaf in params.leaves.values():
        tp, kinds = leaf.tensor_parallel_degree, 1 if leaf.layout.scale_shape is None else 2  # values, then scales
        counts += [tp] * kinds if leaf.replicates_kv_across_tp else [1] * (tp * kinds)
    return counts


def _imported(name: str) -> Factory:
    module, function = name.split(":")
    try:
        factory: Factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"kv_connector {name!r} cannot be imported where the replica runs: {error}") from error
    return factory
