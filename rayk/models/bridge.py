"""How transformers' models reach the pages: one attention function in its registry, which hands over to an object.

A model calls the function named `rayk` for each layer, with the keyword arguments that its forward was given. One of
them, `paged`, is the object that attends in this call. So models, threads and batches share nothing but the name.

No mask is registered under that name: transformers then makes none, and asks no device whether it needs one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from rayk.attention import Backend, PagedBatch, PagedPool, Rules
from rayk.errors import ArchitectureError

NAME = "rayk"
_registering = threading.Lock()


class Attention(Protocol):
    """What attends in one forward."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        """query, key, value: `[tokens, heads, dim]` of the packed batch; as many of them as the query, of the value's
        dim."""


def register() -> None:
    """Make the name known to transformers, once per process."""
    from transformers import AttentionInterface

    with _registering:
        if NAME not in AttentionInterface._global_mapping:
            AttentionInterface.register(NAME, _attend)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    paged: Attention | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' signature: `[1, heads, tokens, dim]` each; returns `[1, tokens, heads, dim]`."""
    if paged is None:
        raise ArchitectureError(type(module).__name__, "it is not given the arguments of the model's forward")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ArchitectureError(type(module).__name__, "it is not causal")
    if attention_mask is not None:
        raise ArchitectureError(type(module).__name__, "it has a mask of the model's own")
    rules = Rules(
        query.shape[3] ** -0.5 if scaling is None else scaling,
        window_of(module, sliding_window),
        softcap or None,
        s_aux,
    )
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return paged.attend(module.layer_idx, query, key, value, rules)[None], None


def window_of(module: Any, given: int | None) -> int | None:
    """The window of that layer: as the model gives it, or as its config has it for that layer or for all.

    Some models say it to transformers' masks only, which are not made here.
    """
    if given is not None:
        return given
    types = getattr(module.config, "layer_types", None)
    if types and types[module.layer_idx] != "sliding_attention":
        return None
    window: int | None = getattr(module.config, "sliding_window", None)
    return window


@dataclass(frozen=True)
class PagedAttention:
    """Writes the new keys and values into the pages, and attends over them. `layers` maps a model's layer numbers to
    the pool's."""

    pool: PagedPool
    batch: PagedBatch
    backend: Backend
    layers: Mapping[int, int]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        dim, wanted = self.pool.head_dim, value.shape[2]
        query, key, value = (_widened(states, dim) for states in (query, key, value))
        at = self.layers[layer]
        self.pool.write(at, key, value, self.batch)
        found = self.backend.attend(query, *self.pool.layer(at), self.batch, rules)
        return found if wanted == dim else found[..., :wanted]


def _widened(states: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros behind each head: they change no score, and no value that is kept. MLA has narrower values than keys."""
    return states if states.shape[2] == dim else pad(states, (0, dim - states.shape[2]))


@dataclass(frozen=True)
class LayerShape:
    """What one layer asks of the cache."""

    kv_heads: int
    head_dim: int
    softcap: bool
    sinks: bool


@dataclass(frozen=True)
class Recorder:
    """Attends to nothing and remembers what was asked, by layer number, in the order of the calls."""

    calls: list[tuple[int, LayerShape]] = field(default_factory=list)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        dim = max(key.shape[2], value.shape[2])
        shape = LayerShape(key.shape[1], dim, rules.softcap is not None, rules.sinks is not None)
        self.calls.append((layer, shape))
        return query.new_zeros((*query.shape[:2], value.shape[2]))
