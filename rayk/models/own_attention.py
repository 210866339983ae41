"""Models that attend by themselves: their keys and values are written to the pages and gathered for them.

A model whose attention is not in transformers' registry, or needs more than the registry is told (biases by distance,
chunks, a mask of its own), is given what it would be given by transformers: a cache that has the keys and values of all
earlier tokens. Rows with as many new tokens go together, padded on the left to the longest; those with more than one
token go alone, and so do all rows of a model that counts positions by the length of its cache.

That gathers all earlier tokens of a row for every layer and forward, which costs more than attention in place does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer

from rayk.attention import Backend, PagedBatch, PagedPool
from rayk.errors import ArchitectureError
from rayk.models.bridge import LayerShape, widened

BACKEND = "transformers"
"""What is shown as the backend of such a model."""


class Rows(NamedTuple):
    """Rows of one forward that have `new_tokens` each.

    order: rows of the batch. tokens: int64 `[rows * new_tokens]`, where their tokens are packed. new: the slots that
    these go to. held: int64 `[rows, longest]`, the slot of each token, of the first one where a row is shorter.
    mask: int64 `[rows, longest]`, 0 for those. positions: int64 `[rows, new_tokens]`.
    """

    order: list[int]
    new_tokens: int
    tokens: torch.Tensor
    new: torch.Tensor
    held: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


class _Layer(DynamicLayer):
    """One layer of the pages as transformers sees a layer of a cache."""

    def __init__(self, pool: PagedPool, at: int | None, rows: Rows) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self._pool, self._at, self._rows = pool, at, rows
        self._seen = rows.held.shape[1] - rows.new_tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._at is None:
            raise ArchitectureError("it", "a layer caches that did not before")
        pool, rows = self._pool, self._rows
        states = [each.transpose(1, 2).flatten(0, 1) for each in (key_states, value_states)]
        key, value = (widened(each, pool.heads, pool.head_dim) for each in states)
        pool.write_slots(self._at, key, value, rows.new)
        self._seen = rows.held.shape[1]
        found = pool.read_slots(self._at, rows.held.flatten(), key_states.dtype)
        key, value = (
            gathered.view(*rows.held.shape, *gathered.shape[1:])[:, :, : each.shape[1], : each.shape[2]].transpose(1, 2)
            for gathered, each in zip(found, states, strict=True)
        )
        return key, value

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.held.shape[1] - self._rows.new_tokens + query_length, 0


@dataclass(frozen=True)
class OwnAttention:
    """A model with attention of its own. layers: its layer numbers in the order of the pool's. alone: rows go one by
    one. offset: what it adds to positions."""

    model: Any
    shapes: dict[int, LayerShape]
    alone: bool = False
    offset: int = 0

    def logits(
        self, pool: PagedPool, batch: PagedBatch, backend: Backend | None, tokens: torch.Tensor, every_token: bool
    ) -> torch.Tensor:
        places = {layer: at for at, layer in enumerate(self.shapes)}
        named = signature(self.model.forward).parameters
        found: torch.Tensor | None = None
        for rows in self._grouped(batch):
            layers: list[Any] = [_Layer(pool, places.get(layer), rows) for layer in range(max(self.shapes) + 1)]
            more: dict[str, Any] = {"position_ids": rows.positions + self.offset} if "position_ids" in named else {}
            if "logits_to_keep" in named and not every_token:
                more["logits_to_keep"] = 1
            logits = self.model(
                input_ids=tokens[rows.tokens].view(len(rows.order), rows.new_tokens),
                attention_mask=rows.mask,
                past_key_values=Cache(layers=layers),
                use_cache=True,
                **more,
            ).logits
            into = rows.tokens if every_token else torch.tensor(rows.order, device=logits.device)
            part = logits.flatten(0, 1) if every_token else logits[:, -1]
            if found is None:
                found = part.new_empty((batch.tokens if every_token else batch.rows, part.shape[1]))
            found.index_copy_(0, into, part)
        assert found is not None
        return found

    def _grouped(self, batch: PagedBatch) -> Iterator[Rows]:
        lengths = batch.kv_lengths.tolist() if batch.kv_lengths_host is None else batch.kv_lengths_host
        single = [row for row, count in enumerate(batch.counts) if count == 1 and not self.alone]
        if single:
            yield _rows(batch, single, lengths)
        for row, count in enumerate(batch.counts):
            if count > 1 or self.alone:
                yield _rows(batch, [row], lengths)


def _rows(batch: PagedBatch, order: list[int], lengths: Sequence[int]) -> Rows:
    device, count = batch.table.device, batch.counts[order[0]]
    own = torch.tensor([lengths[row] for row in order], device=device)
    longest = max(lengths[row] for row in order)
    at = torch.arange(longest, device=device) - (longest - own)[:, None]  # [rows, longest], below 0 where there is none
    seen, at = at >= 0, at.clamp(min=0)
    pages = batch.table[torch.tensor(order, device=device)].long().gather(1, at // batch.page_size)
    held = pages * batch.page_size + at % batch.page_size
    tokens = (batch.starts[:-1].long()[order, None] + torch.arange(count, device=device)).flatten()
    return Rows(order, count, tokens, held[:, longest - count :].flatten(), held, seen.long(), at[:, longest - count :])


def cached_shapes(model: Any, tokens: torch.Tensor) -> dict[int, LayerShape]:
    """What each layer caches, by the model's layer number. ArchitectureError where that is not a key and a value for
    each token; whatever the model raises."""
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    shapes = {}
    for layer, kept in enumerate(cache.layers):
        if not isinstance(kept, DynamicLayer) or kept.keys is None or kept.values is None:
            continue
        if kept.keys.shape[:3] != kept.values.shape[:3] or kept.keys.shape[2] != tokens.shape[1]:
            name = type(model).__name__
            raise ArchitectureError(name, f"layer {layer} does not cache one key and one value for each token")
        dim = max(kept.keys.shape[3], kept.values.shape[3])
        shapes[layer] = LayerShape(kept.keys.shape[1], dim, False, False)
    if not shapes:
        raise ArchitectureError(type(model).__name__, "it caches nothing")
    return shapes
