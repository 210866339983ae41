"""How transformers' models reach the pages: one attention function in its registry, which hands over to an object.

A model calls the function named `rayk` for each layer. What attends in this call is the object that this thread has
bound with attending(): not every model hands the keyword arguments of its forward down to its layers. So models,
threads and batches share nothing but the name.

No mask is registered under that name: transformers then makes none, and asks no device whether it needs one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from rayk.attention import Backend, PagedBatch, PagedPool, Rules
from rayk.errors import ArchitectureError

NAME = "rayk"
LATENT = "_rayk_latent"
"""The attribute of an attention module whose keys are a latent (rayk.models.latent)."""
_registering = threading.Lock()
_bound = threading.local()


class NotCausal(ArchitectureError):
    """A token sees later ones: no way of running it on pages is right."""


class Attention(Protocol):
    """What attends in one forward."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rules: Rules,
        latent: bool = False,
    ) -> torch.Tensor:
        """query, key, value: `[tokens, heads, dim]` of the packed batch; as many of them as the query, of the value's
        dim. latent: keys are values, too, and kept once."""


def register() -> None:
    """Make the name known to transformers, once per process."""
    from transformers import AttentionInterface

    with _registering:
        if NAME not in AttentionInterface._global_mapping:
            AttentionInterface.register(NAME, _attend)


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """What attends in the forwards of this thread, while this lasts."""
    before = getattr(_bound, "attention", None)
    _bound.attention = attention
    try:
        yield
    finally:
        _bound.attention = before


def is_attending() -> bool:
    """Whether this thread is in such a forward."""
    return getattr(_bound, "attention", None) is not None


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' signature: `[1, heads, tokens, dim]` each; returns `[1, tokens, heads, dim]`."""
    paged: Attention | None = getattr(_bound, "attention", None)
    if paged is None:
        raise ArchitectureError(type(module).__name__, "its attention was called outside a forward of rayk's")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotCausal(type(module).__name__, "it is not causal")
    if attention_mask is not None:
        raise ArchitectureError(type(module).__name__, "it has a mask of the model's own")
    rules = Rules(
        query.shape[3] ** -0.5 if scaling is None else scaling,
        window_of(module, sliding_window),
        softcap or None,
        s_aux,
    )
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    latent = module.__dict__.get(LATENT)
    if latent is None:
        return paged.attend(module.layer_idx, query, key, value, rules)[None], None
    found = paged.attend(module.layer_idx, latent.query(query), key, key, rules, latent=True)
    return latent.output(found)[None], None


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
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rules: Rules,
        latent: bool = False,
    ) -> torch.Tensor:
        dim, heads, wanted = self.pool.head_dim, key.shape[1], value.shape[2]
        query = widened(query, query.shape[1], dim)
        at = self.layers[layer]
        key, value = (widened(states, self.pool.heads, dim) for states in (key, value))
        self.pool.write(at, key, value, self.batch)
        keys, values = self.pool.layer(at)
        if heads < self.pool.heads:
            keys, values = keys[:, :, :heads], values[:, :, :heads]
        found = self.backend.attend(query, keys, values, self.batch, rules)
        return found if wanted == dim else found[..., :wanted]


def widened(states: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """`[tokens, heads, dim]`, with zeros behind each head and after the last one: they change no score, and no value
    that is kept. MLA has narrower values than keys, and layers may have fewer heads than others."""
    more = heads - states.shape[1], dim - states.shape[2]
    return states if more == (0, 0) else pad(states, (0, more[1], 0, more[0]))


@dataclass(frozen=True)
class LayerShape:
    """What one layer asks of the cache."""

    kv_heads: int
    head_dim: int
    softcap: bool
    sinks: bool
    latent: bool = False


@dataclass(frozen=True)
class Recorder:
    """Attends to nothing and remembers what was asked, by layer number, in the order of the calls."""

    calls: list[tuple[int, LayerShape]] = field(default_factory=list)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rules: Rules,
        latent: bool = False,
    ) -> torch.Tensor:
        dim = max(key.shape[2], value.shape[2])
        shape = LayerShape(key.shape[1], dim, rules.softcap is not None, rules.sinks is not None, latent)
        self.calls.append((layer, shape))
        return query.new_zeros((*query.shape[:2], value.shape[2]))


class Way(Protocol):
    """How a model runs on pages. shapes: what each of its layers asks of them, in the order of the pool's layers."""

    @property
    def shapes(self) -> dict[int, LayerShape]: ...

    def logits(
        self, pool: PagedPool, batch: PagedBatch, backend: Backend | None, tokens: torch.Tensor, every_token: bool
    ) -> torch.Tensor:
        """In the model's dtype `[rows, vocab]` after the last token of each row, or `[tokens, vocab]`. tokens: int64
        `[tokens]` of the packed batch, on the model's device."""


@dataclass(frozen=True)
class ByRegistry:
    """rayk's attention in place of the model's. offset: what the model adds to positions."""

    model: Any
    shapes: dict[int, LayerShape]
    offset: int = 0

    @cached_property
    def _layers(self) -> dict[int, int]:
        return {layer: at for at, layer in enumerate(self.shapes)}

    @cached_property
    def _keeps_rows(self) -> bool:
        return "logits_to_keep" in signature(self.model.forward).parameters

    def logits(
        self, pool: PagedPool, batch: PagedBatch, backend: Backend | None, tokens: torch.Tensor, every_token: bool
    ) -> torch.Tensor:
        assert backend is not None
        only = {"logits_to_keep": batch.last} if self._keeps_rows and not every_token else {}
        positions = batch.positions + self.offset if self.offset else batch.positions
        with attending(PagedAttention(pool, batch, backend, self._layers)):
            found: torch.Tensor = self.model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, **only
            ).logits[0]
        return found if only or every_token else found[batch.last]
