"""A model as the planner sees it: what a token takes in the cache, what the weights take, how long it can be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rayk.errors import ConfigError
from rayk.params import DTYPE_BYTES, KVCacheParams, MHAKVCacheParams, MLAKVCacheParams, dtype_name
from rayk.planning.quantization import Storage
from rayk.planning.weights import WEIGHT_BITS, Kind, Module, Weights, layer_of, plain_bits


class CachedLayers(NamedTuple):
    """Layers that keep the same of a token: `heads` x (`key_dim` + `value_dim`) elements, and `extra_bytes` in a dtype
    of their own (an indexer's keys).

    `latent`: one vector for all heads (MLA), of which every TP shard has a copy; `expanded` are heads and elements if
    it is expanded to keys and values. `window`: tokens that the layers attend to; the cache keeps all anyway.
    """

    layers: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    window: int | None = None
    extra_bytes: int = 0
    expanded: tuple[int, int] | None = None

    def shard_bytes(self, tp: int, element: int) -> int:
        """Bytes of a token in one of these layers on one of `tp` shards; heads are copied where there are too few."""
        heads = 1 if self.latent else -(-self.heads // tp)
        return heads * (self.key_dim + self.value_dim) * element + self.extra_bytes

    def splits_over(self, tp: int) -> bool:
        return self.latent or self.heads % tp == 0 or tp % self.heads == 0


class Split(NamedTuple):
    """What transformers' tensor parallel plan divides: modules by name, with `*` for numbers, and whether KV heads."""

    modules: frozenset[str]
    heads: bool

    def divides(self, module: Module) -> bool:
        """Whether each rank has a part of it; of a bias, as of its matrix."""
        name = re.sub(r"\.\d+(?=\.|$)", ".*", module.name)
        return name in self.modules or name.rpartition(".")[0] in self.modules


class State(NamedTuple):
    """What recurrent layers keep of a sequence: `values` in the model's dtype and `floats` in float32."""

    values: int = 0
    floats: int = 0

    def plus(self, other: State) -> State:
        return State(self.values + other.values, self.floats + other.floats)

    def num_bytes(self, dtype: str) -> int:
        return self.values * DTYPE_BYTES[dtype] + self.floats * 4


class Window(NamedTuple):
    """`layers` of a model attend to the last `tokens` tokens only. The cache keeps all tokens of all layers anyway."""

    tokens: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model.

    `stored_bytes` are those of its checkpoint's tensors where files say so; else `storage` and `weights` give them.
    Both None: unknown, only `weights_dtype` gives a size. `unknown` says why. `refused`: why rayk's own model runner
    does not take it, `split` how that one divides it over ranks; None where it does not, or that is unknown. `draft` is
    a model that runs beside it and drafts tokens, its cache in the same pages.
    """

    name: str
    cached: tuple[CachedLayers, ...]
    num_layers: int
    query_heads: int | None = None
    max_length: int | None = None
    weights: Weights | None = None
    storage: Storage | None = None
    stored_bytes: int | None = None
    unknown: str | None = None
    dtype: str = "bfloat16"
    state: State = field(default_factory=State)
    experts_per_token: int = 0
    refused: str | None = None
    split: Split | None = None
    draft: Model | None = None
    notes: tuple[str, ...] = ()

    @property
    def all_cached(self) -> tuple[CachedLayers, ...]:
        """The draft's layers count as if they came after the model's."""
        if self.draft is None:
            return self.cached
        moved = (c._replace(layers=tuple(n + self.num_layers for n in c.layers)) for c in self.draft.all_cached)
        return (*self.cached, *moved)

    @property
    def latent(self) -> bool:
        return any(c.latent and c.key_dim for c in self.cached)

    @property
    def kv_heads(self) -> int:
        """Of the layers that have most."""
        return max((c.heads for c in self.cached), default=0)

    @property
    def head_dim(self) -> int:
        return max((c.key_dim for c in self.cached), default=0)

    @property
    def window(self) -> Window | None:
        """The window that most layers have."""
        sizes: dict[int, int] = {}
        for c in self.cached:
            if c.window is not None:
                sizes[c.window] = sizes.get(c.window, 0) + len(c.layers)
        most = max(sizes, key=lambda size: sizes[size], default=None)
        return None if most is None else Window(most, sum(sizes.values()))

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values of tokens."""
        return len({n for c in self.cached for n in c.layers if c.key_dim})

    def served(self) -> Model:
        """The model as rayk's own runner has it: a latent as it is; of others, all layers, keys and values as wide as
        the widest, since pages have one shape, and heads as often as a token goes to them (JetMoe)."""
        if all(c.latent for c in self.cached):
            return self
        return self.expanded()

    def expanded(self) -> Model:
        """As served() has it, and a latent expanded to keys and values for every head: what rayk's runner does where
        the expansion is quantised."""
        layers = [
            CachedLayers(c.layers, c.expanded[0], c.expanded[1], c.expanded[1], window=c.window) if c.expanded else c
            for c in self.cached
            if not c.extra_bytes
        ]
        heads, dim = max(c.heads for c in layers), max(max(c.key_dim, c.value_dim) for c in layers)
        return replace(self, cached=tuple(c._replace(heads=heads, key_dim=dim, value_dim=dim) for c in layers))

    def kv_params(self, *, tp: int, page_size: int, kv_dtype: str, dp: int = 1, device: str = "cuda") -> KVCacheParams:
        """Cache parameters of `dp` replicas of `tp` shards. ConfigError, with what divides, when heads do not split,
        and for layers that differ: pages have one shape."""
        self.check_tp(tp)
        if len(self.cached) != 1 and len({c._replace(layers=(), window=None) for c in self.all_cached}) != 1:
            raise ConfigError(f"{self.name}: its layers keep different shapes of a token; KVCacheParams describe one")
        one = self.cached[0]
        shared: dict[str, Any] = {
            "dtype": dtype_name(kv_dtype),
            "head_dim": one.key_dim,
            "num_layers": self.cached_layers,
            "page_size": page_size,
            "devices": [device] * (tp * dp),
            "data_parallel_degree": dp,
            "enable_prefix_caching": True,
        }
        if one.latent:
            return MLAKVCacheParams(num_q_heads=self.query_heads or tp, **shared)
        return MHAKVCacheParams(n_kv_heads=one.heads, **shared)

    def splits_over(self, tp: int) -> bool:
        """Whether heads can be split over `tp` shards, KV heads copied where there are fewer; a latent always is."""
        own = (self.query_heads is None or self.query_heads % tp == 0) and all(c.splits_over(tp) for c in self.cached)
        return own and (self.draft is None or self.draft.splits_over(tp))

    def check_tp(self, tp: int) -> None:
        """ConfigError unless `tp` splits the heads."""
        if not self.splits_over(tp):
            most = self.query_heads or self.kv_heads
            possible = [str(n) for n in range(1, most + 1) if self.splits_over(n)]
            heads = f"{self.query_heads} query heads and " if self.query_heads else ""
            beside = f" (and the draft's {self.draft.kv_heads})" if self.draft is not None else ""
            raise ConfigError(
                f"{self.name}: {heads}{self.kv_heads} KV heads{beside} do not split over tp={tp}; "
                f"use tp {', '.join(possible)}"
            )

    def cache_dtype(self, kv_dtype: str | None, weights_dtype: str | None = None) -> str:
        """The dtype of pages: as asked for, else what the checkpoint asks for, else that of the arithmetic."""
        if kv_dtype is not None:
            return dtype_name(kv_dtype)
        if self.storage is not None and self.storage.cache_dtype is not None:
            return self.storage.cache_dtype
        return weights_dtype if weights_dtype in ("float32", "float16", "bfloat16") else self.dtype

    def token_bytes(self, kv_dtype: str | None = None, tp: int = 1, layers: range | None = None) -> int:
        """Bytes of one token on one of `tp` shards, in all layers or in some."""
        element = DTYPE_BYTES[self.cache_dtype(kv_dtype)]
        return sum(
            c.shard_bytes(tp, element) * (len(c.layers) if layers is None else sum(n in layers for n in c.layers))
            for c in self.all_cached
        )

    def loaded_bytes(self, weights_dtype: str | None = None) -> int:
        """Bytes of the weights, the draft's included: the checkpoint's, or those of its parameters in that dtype."""
        beside = self.draft.loaded_bytes(weights_dtype) if self.draft is not None else 0
        if weights_dtype is None and self.stored_bytes is not None:
            return self.stored_bytes + beside
        bits = self.module_bits(weights_dtype)
        if self.weights is None:
            raise ConfigError(f"{self.name}: give the number of parameters (parameters=8.03B) to plan another dtype")
        return self.weights.num_bytes(bits) + beside

    def rank_bytes(self, weights_dtype: str | None, tp: int) -> int:
        """Those that one of `tp` ranks of rayk's own runner has."""
        total = self.loaded_bytes(weights_dtype)
        if tp == 1 or self.split is None or self.weights is None:
            return -(-total // tp)
        divided = self.shares(weights_dtype, {"divided": self.split.divides})["divided"]
        return math.ceil(total * (1 - divided + divided / tp))

    def module_bits(self, weights_dtype: str | None) -> Callable[[Module], float]:
        """Bits of a parameter of each module, as stored or in another dtype."""
        if weights_dtype is not None:
            return plain_bits(weights_dtype)
        if self.storage is not None:
            return self.storage.bits
        if self.stored_bytes is not None:
            return plain_bits(self.dtype)
        raise ConfigError(
            f"{self.name}: {self.unknown or 'the size of the weights'} is unknown; name a --weights-dtype"
        )

    def shares(self, weights_dtype: str | None, wanted: Mapping[str, Callable[[Module], bool]]) -> dict[str, float]:
        """The parts of the weights that are in modules, by name of the question."""
        if self.weights is None:
            raise ConfigError(f"{self.name}: a layout that splits layers or attention needs the model's config.json")
        bits = self.module_bits(weights_dtype)
        return {name: self.weights.share(test, bits) for name, test in wanted.items()}

    def stage_share(self, weights_dtype: str | None, layers: range, first: bool, last: bool) -> float:
        """The part of the weights in those layers; embeddings are in the first stage, the head in the last."""

        def inside(module: Module) -> bool:
            layer = layer_of(module)
            if layer is not None:
                return layer in layers
            return first if module.kind is Kind.embedding else last if module.kind is Kind.head else first

        return self.shares(weights_dtype, {"stage": inside})["stage"]


def dtype_or_none(name: object) -> str | None:
    """A dtype of weights by its name in a config."""
    text = str(name).removeprefix("torch.")
    return text if text in WEIGHT_BITS and WEIGHT_BITS[text] >= 16 else None
