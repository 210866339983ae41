"""A model as the planner sees it: what a token takes in the cache, what the weights take, how long it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayk.errors import ConfigError
from rayk.memory.weights import WeightBits, Weights
from rayk.params import DTYPE_BYTES, KVCacheParams, MHAKVCacheParams, MLAKVCacheParams, dtype_name


@dataclass(frozen=True)
class Window:
    """`layers` of a model attend to the last `tokens` tokens only. The cache keeps all tokens of all layers anyway."""

    tokens: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model. `head_dim` is in elements; with `latent` attention (MLA) a slot is one vector of that many.

    `weight_bytes` are those of the checkpoint; None: unknown, only `weights_dtype` gives them, from `weights`.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int | None = None
    latent: bool = False
    max_length: int | None = None
    weights: Weights | None = None
    weight_bytes: int | None = None
    dtype: str = "bfloat16"
    window: Window | None = None
    notes: tuple[str, ...] = ()

    def kv_params(self, *, tp: int, page_size: int, kv_dtype: str, dp: int = 1, device: str = "cuda") -> KVCacheParams:
        """Cache parameters of `dp` replicas of `tp` shards. ConfigError, with what divides, when heads do not split."""
        self.check_tp(tp)
        shared: dict[str, Any] = {
            "dtype": dtype_name(kv_dtype),
            "head_dim": self.head_dim,
            "num_layers": self.layers,
            "page_size": page_size,
            "devices": [device] * (tp * dp),
            "data_parallel_degree": dp,
            "enable_prefix_caching": True,
        }
        if self.latent:
            return MLAKVCacheParams(num_q_heads=self.query_heads or tp, **shared)
        return MHAKVCacheParams(n_kv_heads=self.kv_heads, **shared)

    def splits_over(self, tp: int) -> bool:
        """Whether query heads and KV heads can be split over `tp` shards; a latent is copied to each."""
        return (self.query_heads is None or self.query_heads % tp == 0) and (self.latent or self.kv_heads % tp == 0)

    def check_tp(self, tp: int) -> None:
        """ConfigError unless `tp` splits the heads."""
        if not self.splits_over(tp):
            most = self.query_heads if self.latent and self.query_heads else self.kv_heads
            possible = [str(n) for n in range(1, most + 1) if self.splits_over(n)]
            heads = f"{self.query_heads} query heads and " if self.query_heads else ""
            raise ConfigError(
                f"{self.name}: {heads}{self.kv_heads} KV heads do not split over tp={tp}; use tp {', '.join(possible)}"
            )

    def token_bytes(self, kv_dtype: str = "bfloat16") -> int:
        """Bytes of one token in the cache of one unsharded replica."""
        return (
            (1 if self.latent else 2 * self.kv_heads) * self.layers * self.head_dim * DTYPE_BYTES[dtype_name(kv_dtype)]
        )

    def loaded_bytes(self, weights_dtype: str | None) -> int:
        """Bytes of the weights: the checkpoint's, or those of its parameters in `weights_dtype`."""
        if weights_dtype is None:
            if self.weight_bytes is None:
                raise ConfigError(f"{self.name}: the size of the weights is unknown; name a --weights-dtype")
            return self.weight_bytes
        bits = WeightBits.of(weights_dtype, self.dtype)
        if self.weights is None:
            raise ConfigError(f"{self.name}: give the number of parameters (parameters=8.03B) to plan another dtype")
        return self.weights.num_bytes(bits)
