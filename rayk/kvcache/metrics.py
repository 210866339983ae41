"""What the cache counts. Counters add up over replicas; rates are derived."""

from __future__ import annotations

import msgspec


class KVCacheMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the last reset. Tokens, pages ("blocks") and bytes; `+` and `-` go field by field."""

    input_tokens: int = 0  # tokens that alloc() left to compute; every decode alloc counts 1
    cache_tokens: int = 0  # tokens that alloc() found cached, from any source
    device_blocks_served: int = 0  # cached pages reused on their own replica
    h2d_blocks_copied: int = 0
    d2h_blocks_copied: int = 0
    cross_replica_blocks_copied: int = 0  # pages copied in from another replica
    cross_replica_bytes_copied: int = 0  # the same in bytes, all shards and leaves
    disk_blocks_written: int = 0
    disk_blocks_read: int = 0
    failed_loads: int = 0  # pages that a tier had, but that did not arrive: they were computed
    rejected_files: int = 0  # page files that were damaged, foreign or of another version
    evicted_blocks: int = 0  # cached pages given up for new content

    @property
    def prompt_tokens(self) -> int:
        """input_tokens + cache_tokens."""
        return self.input_tokens + self.cache_tokens

    @property
    def cache_hit_rate(self) -> float:
        """cache_tokens / prompt_tokens, 0.0 when nothing was allocated. Decode steps lower it; see the reference."""
        return self.cache_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def __add__(self, other: KVCacheMetrics) -> KVCacheMetrics:
        return KVCacheMetrics(**{n: getattr(self, n) + getattr(other, n) for n in self.__struct_fields__})

    def __sub__(self, other: KVCacheMetrics) -> KVCacheMetrics:
        return KVCacheMetrics(**{n: getattr(self, n) - getattr(other, n) for n in self.__struct_fields__})
