"""KV cache parameters: the shape of a page, how it is split over devices, and what sharing is allowed.

All classes are frozen and validated when made; derived values are properties. Dtypes are strings with
torch's names. One *leaf* is one cache (one buffer per TP shard); MultiKVCacheParams has several leaves
behind one block table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from rayk.errors import ConfigError

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int8": 1,
}
QUANTIZED_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "int8")
SCALE_DTYPES = ("float32", "float16", "float8_e8m0fnu")
HASH_ALGORITHMS = ("sha256", "xxh3_128")
CONNECTORS = ("null", "local", "tiered")
CUSTOM_CONNECTOR = re.compile(r"[\w.]+:\w+")  # a module and a function of it, see rayk.tiers.opening
CUDA_IPC, SHARED_MEMORY, GROUP, OBJECT_STORE = "cuda-ipc", "shared-memory", "group", "object-store"
AUTO = "auto"
LINES = (CUDA_IPC, SHARED_MEMORY, GROUP, OBJECT_STORE)  # what carries pages between replicas, best first
LOCAL_LINES = (CUDA_IPC, SHARED_MEMORY)
PAGE_TRANSPORTS = (AUTO, *LINES)
SPECULATIVE_METHODS = (None, "eagle", "mtp", "dflash")


def dtype_name(dtype: Any) -> str:
    """`"float32"` for "float32" and torch.float32; ConfigError for what a cache cannot hold."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPE_BYTES)}")
    return name


def require(condition: bool, message: str) -> None:
    """ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)


def require_at_least(minimum: int, **values: Any) -> None:
    """ConfigError unless each value is an int (bools are not) of at least `minimum`."""
    for name, value in values.items():
        is_int = isinstance(value, int) and not isinstance(value, bool)
        require(is_int and value >= minimum, f"{name} must be an integer of at least {minimum}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class KVCacheQuantizationConfig:
    """Scales beside quantised values: one of `scale_dtype` per `quantization_granularity` elements of a head."""

    scale_dtype: str = "float32"
    quantization_granularity: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_dtype", dtype_name(self.scale_dtype))
        require_at_least(1, quantization_granularity=self.quantization_granularity)


@dataclass(frozen=True, kw_only=True)
class KVConnectorConfig:
    """Where a host or disk tier keeps its pages. Sizes in bytes, per node.

    `model_id` tells models of one shape apart that share a directory; use the checkpoint's name and revision.
    """

    disk_offload_dir: str | Path | None = None
    disk_offload_max_bytes: int = 0
    num_disk_workers: int = 4
    model_id: str = ""

    def __post_init__(self) -> None:
        require_at_least(0, disk_offload_max_bytes=self.disk_offload_max_bytes)
        require_at_least(1, num_disk_workers=self.num_disk_workers)


@dataclass(frozen=True)
class PageLayout:
    """One leaf's page on one TP shard: `[kv_dim, layers, page_size, heads, head_dim]` of `dtype`."""

    kv_dim: int
    num_layers: int
    page_size: int
    heads: int
    head_dim: int
    dtype: str
    scale_dim: int = 0  # scales per head and slot; 0 without scales
    scale_dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.kv_dim, self.num_layers, self.page_size, self.heads, self.head_dim)

    @property
    def scale_shape(self) -> tuple[int, int, int, int, int] | None:
        return (*self.shape[:4], self.scale_dim) if self.scale_dim else None

    @property
    def num_bytes(self) -> int:
        """Values and scales of one page on one shard."""
        slots = self.kv_dim * self.num_layers * self.page_size * self.heads
        return slots * (self.head_dim * DTYPE_BYTES[self.dtype] + self.scale_dim * DTYPE_BYTES[self.scale_dtype])


@dataclass(frozen=True, kw_only=True)
class KVCacheParams:
    """What all caches have in common. `devices` holds data_parallel_degree groups of TP shards, group by group."""

    dtype: str
    head_dim: int
    num_layers: int
    devices: Sequence[str]
    page_size: int = 128
    data_parallel_degree: int = 1
    enable_prefix_caching: bool = False
    enable_dp_cross_replica_prefix_copy: bool = True
    page_transport: str = AUTO  # how these copies travel between processes: a kind of rayk.transport.choice
    kv_hash_algo: str = "sha256"
    kv_hash_seed: bytes | None = field(default=None, repr=False)
    kvcache_quant_config: KVCacheQuantizationConfig | None = None
    speculative_method: str | None = None
    num_draft_tokens: int = 0
    kv_connector: str = "null"
    kv_connector_config: KVConnectorConfig | None = None
    host_kvcache_swap_space_gb: float | None = None

    kv_dim: ClassVar[int] = 2
    replicates_kv_across_tp: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        require(not isinstance(self.devices, str), f"devices must be a list such as ['{self.devices}']")
        object.__setattr__(self, "devices", tuple(str(d) for d in self.devices))
        require_at_least(1, head_dim=self.head_dim, num_layers=self.num_layers, page_size=self.page_size)
        require_at_least(1, data_parallel_degree=self.data_parallel_degree)
        require_at_least(0, num_draft_tokens=self.num_draft_tokens)
        n, dp = len(self.devices), self.data_parallel_degree
        require(n > 0, "devices must name at least one device, such as ['cpu'] or ['cuda:0']")
        require(n % dp == 0, f"data_parallel_degree {dp} does not divide the {n} device(s)")
        require(self.kv_hash_algo in HASH_ALGORITHMS, f"kv_hash_algo {self.kv_hash_algo!r}: use {HASH_ALGORITHMS}")
        require(
            self.page_transport in PAGE_TRANSPORTS, f"page_transport {self.page_transport!r}: use {PAGE_TRANSPORTS}"
        )
        seed = self.kv_hash_seed
        require(seed is None or (isinstance(seed, bytes) and len(seed) == 32), "kv_hash_seed must be 32 bytes or None")
        require(
            self.speculative_method in SPECULATIVE_METHODS,
            f"speculative_method {self.speculative_method!r}: use one of {SPECULATIVE_METHODS}",
        )
        require(
            self.kv_connector in CONNECTORS or CUSTOM_CONNECTOR.fullmatch(self.kv_connector) is not None,
            f"kv_connector {self.kv_connector!r}: use one of {CONNECTORS}, or 'package.module:factory' of your own",
        )
        if self.kv_connector != "null":
            require(self.enable_prefix_caching, f"kv_connector {self.kv_connector!r} needs enable_prefix_caching=True")
        if self.quantized:
            assert self.kvcache_quant_config is not None
            g = self.kvcache_quant_config.quantization_granularity
            require(self.head_dim % g == 0, f"quantization_granularity {g} does not divide head_dim {self.head_dim}")

    @property
    def page_hash_algo(self) -> str:
        """What names cached pages: kv_hash_algo where a name only hints where to look; sha256, for which nobody finds
        two pages of one name, where a tier hands out bytes by the name alone. Copies always go by sha256."""
        return self.kv_hash_algo if self.kv_connector == "null" else "sha256"

    @property
    def copies_prefixes(self) -> bool:
        """Whether replicas copy prefixes from each other."""
        return self.enable_prefix_caching and self.enable_dp_cross_replica_prefix_copy

    @property
    def offers_pages(self) -> bool:
        """Whether a replica that goes offers others what it has cached; where there is a tier, that has it."""
        return self.copies_prefixes and self.kv_connector == "null"

    @property
    def shares_memory(self) -> bool:
        """Whether replicas' pages in host memory should be where other processes of their machine can read them."""
        return self.copies_prefixes and self.page_transport in (AUTO, SHARED_MEMORY)

    @property
    def tensor_parallel_degree(self) -> int:
        """TP shards of one replica."""
        return len(self.devices) // self.data_parallel_degree

    @property
    def heads_per_device(self) -> int:
        """KV heads on one TP shard."""
        return 1

    @property
    def quantized(self) -> bool:
        """Whether scales are kept: quantised values and a scale dtype made for them."""
        config = self.kvcache_quant_config
        return config is not None and self.dtype in QUANTIZED_DTYPES and config.scale_dtype in SCALE_DTYPES

    @property
    def layout(self) -> PageLayout:
        """The page of this leaf on one TP shard."""
        config = self.kvcache_quant_config if self.quantized else None
        return PageLayout(
            kv_dim=self.kv_dim,
            num_layers=self.num_layers,
            page_size=self.page_size,
            heads=self.heads_per_device,
            head_dim=self.head_dim,
            dtype=self.dtype,
            scale_dim=self.head_dim // config.quantization_granularity if config else 0,
            scale_dtype=config.scale_dtype if config else "float32",
        )

    @property
    def leaves(self) -> dict[str, KVCacheParams]:
        """Leaf name -> parameters; the only leaf of a single cache is called ''."""
        return {"": self}

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page of one replica: all TP shards, leaves and scales."""
        return self.layout.num_bytes * self.tensor_parallel_degree

    @property
    def draft_tokens_per_step(self) -> int:
        """Draft tokens made by one pass of the draft model."""
        return self.num_draft_tokens if self.speculative_method == "dflash" else 1

    @property
    def block_draft_slots(self) -> int:
        """1 when one draft pass makes all draft tokens (it needs a slot of its own), else 0 (as in MAX 26.5)."""
        drafts = self.num_draft_tokens
        return int(drafts > 0 and self.draft_tokens_per_step == drafts)

    def replica_devices(self, replica: int) -> tuple[str, ...]:
        """The devices of one replica, one per TP shard. Replicas that are added later go round the same ones."""
        tp, at = self.tensor_parallel_degree, replica % self.data_parallel_degree
        return tuple(self.devices[at * tp : (at + 1) * tp])


@dataclass(frozen=True, kw_only=True)
class MHAKVCacheParams(KVCacheParams):
    """Multi-head or grouped-query attention: keys and values, heads split over the TP shards."""

    n_kv_heads: int
    allow_kv_head_replication: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, n_kv_heads=self.n_kv_heads)
        heads, tp = self.n_kv_heads, self.tensor_parallel_degree
        replicated = self.allow_kv_head_replication and tp % heads == 0
        require(
            heads % tp == 0 or replicated,
            f"{heads} KV heads cannot be split over {tp} TP shards"
            + (
                ""
                if self.allow_kv_head_replication
                else "; allow_kv_head_replication=True copies heads when TP > heads"
            ),
        )

    @property
    def heads_per_device(self) -> int:
        return max(1, self.n_kv_heads // self.tensor_parallel_degree)


@dataclass(frozen=True, kw_only=True)
class MLAKVCacheParams(KVCacheParams):
    """Multi-head latent attention: one latent vector per slot, copied to every TP shard."""

    num_q_heads: int
    kv_dim: ClassVar[int] = 1
    replicates_kv_across_tp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, num_q_heads=self.num_q_heads)
        tp = self.tensor_parallel_degree
        require(self.num_q_heads % tp == 0, f"{self.num_q_heads} query heads cannot be split over {tp} TP shards")


_SHARED = tuple(
    f.name for f in fields(KVCacheParams) if f.name not in ("dtype", "head_dim", "num_layers", "kvcache_quant_config")
)


@dataclass(frozen=True, kw_only=True)
class MultiKVCacheParams(KVCacheParams):
    """Several caches behind one block table, such as a target and a draft model. Made by from_params()."""

    children: Mapping[str, KVCacheParams] = field(default_factory=dict)

    @classmethod
    def from_params(cls, children: Mapping[str, KVCacheParams]) -> MultiKVCacheParams:
        """One cache per name; ConfigError unless they agree on everything but dtype, layers, heads and head_dim."""
        require(bool(children), "MultiKVCacheParams needs at least one cache")
        first_name, first = next(iter(children.items()))
        for name, child in children.items():
            for shared in _SHARED:
                mine, theirs = getattr(first, shared), getattr(child, shared)
                require(mine == theirs, f"caches {first_name!r} and {name!r} differ in {shared}: {mine!r}, {theirs!r}")
        common = {shared: getattr(first, shared) for shared in _SHARED}
        return cls(
            dtype=first.dtype,
            head_dim=first.head_dim,
            num_layers=sum(c.num_layers for c in children.values()),
            children=dict(children),
            **common,
        )

    @property
    def leaves(self) -> dict[str, KVCacheParams]:
        found: dict[str, KVCacheParams] = {}
        for name, child in self.children.items():
            for sub, leaf in child.leaves.items():
                found[f"{name}.{sub}" if sub else name] = leaf
        return found

    @property
    def bytes_per_page(self) -> int:
        return sum(leaf.bytes_per_page for leaf in self.leaves.values())
