"""Host and disk tiers below engines: what was asked for, and what of it the replicas of one node share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rayk.errors import ConfigError
from rayk.params import KVConnectorConfig, require
from rayk.planning.node_plan import NodeMemory
from rayk.quantity import parse_size, show_bytes

LEAST_HOST_PAGES = 64  # of a disk tier for which no host memory was asked: pages pass through it

Size = str | int | float
"""As on the command line: "16GiB", bytes, or 0.9 for that share of what is free."""


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """What each node's replicas may take together. A disk tier has a folder and a size; without a host size its host
    tier gets an eighth of that."""

    host_memory: Size | None = None
    disk_dir: Path | None = None
    disk_memory: Size | None = None

    def __post_init__(self) -> None:
        require(
            (self.disk_dir is None) == (self.disk_memory is None),
            "disk_dir and disk_memory go together: a folder, and how much it may hold",
        )
        for size in (self.host_memory, self.disk_memory):
            if size is not None:
                parse_size(str(size), 1)

    @property
    def wanted(self) -> bool:
        """Whether there are to be tiers at all."""
        return self.host_memory is not None or self.disk_dir is not None

    def reserve(self, node: NodeMemory, pool: str) -> tuple[NodeTiers, NodeMemory]:
        """What the tiers take on a node, and what is left there. `pool` names the host pool that replicas share."""
        host = parse_size(str(self.host_memory), node.host_free) if self.host_memory is not None else 0
        disk = parse_size(str(self.disk_memory), node.disk_free or 0) if self.disk_memory is not None else 0
        tiers = NodeTiers(host, str(self.disk_dir) if self.disk_dir is not None else None, disk, pool)
        return tiers, msgspec.structs.replace(node, host_free=max(0, node.host_free - host))


@dataclass(frozen=True)
class NodeTiers:
    """Bytes of one node's tiers; host_bytes 0: what the disk tier needs."""

    host_bytes: int = 0
    disk_dir: str | None = None
    disk_bytes: int = 0
    pool: str | None = None

    def host_pages(self, page_bytes: int) -> int:
        """Pages of the host tier. ConfigError when one does not fit, in host memory or on disk."""
        if self.disk_dir is not None and self.disk_bytes <= page_bytes:
            raise ConfigError(_too_small("disk_memory", self.disk_bytes, page_bytes))
        if not self.host_bytes and self.disk_dir is not None:
            return max(LEAST_HOST_PAGES, self.disk_bytes // 8 // page_bytes)
        if self.host_bytes < page_bytes:
            raise ConfigError(_too_small("host_memory", self.host_bytes, page_bytes))
        return self.host_bytes // page_bytes

    def params(self, model_id: str) -> dict[str, Any]:
        """The fields of KVCacheParams that make such tiers, for pages of the model of that name."""
        return {
            "kv_connector": "local" if self.disk_dir is None else "tiered",
            "kv_connector_config": KVConnectorConfig(
                disk_offload_dir=self.disk_dir, disk_offload_max_bytes=self.disk_bytes, model_id=model_id
            ),
        }


def _too_small(what: str, size: int, page_bytes: int) -> str:
    return f"{what} is {show_bytes(size)}, one page takes {show_bytes(page_bytes)}; give more"
