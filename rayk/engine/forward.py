"""The model as an engine sees it, and a forward that finds out which request it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from rayk.context import TokenWindow
from rayk.engine.cache import Cache
from rayk.engine.generation import Generation
from rayk.engine.rows import Column
from rayk.inputs import ShardInputs


class Model(Protocol):
    """What an engine needs of a model on pages. `max_length` counts prompt and answer."""

    vocab_size: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Any

    def logits(self, inputs: ShardInputs, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Process the packed tokens ([sum of counts] int64; row i has counts[i]), writing their keys and values.

        Returns the logits of each row's last token, [rows, vocab] float32.
        """
        ...


class Forwarded(NamedTuple):
    """Logits of the requests that went well, in the batch's order (None: of none), and what became of the others."""

    logits: torch.Tensor | None
    failed: list[tuple[Generation, Exception]]


def windows(batch: Sequence[Generation]) -> list[TokenWindow]:
    """The windows of a batch's contexts."""
    return [each.ctx.tokens for each in batch]


def forward(
    model: Model, cache: Cache, batch: Sequence[Generation], tokens: Column, counts: Sequence[int]
) -> Forwarded:
    """Forward a batch: `tokens` are its active windows, packed, counts[i] of request i.

    If that raises, it is repeated on halves, down to the requests that fail alone. Processing a window twice is
    harmless: it writes the same keys and values to the same places.
    """
    try:
        return Forwarded(_run(model, cache, batch, tokens, counts), [])
    except Exception as error:
        if len(batch) == 1:
            return Forwarded(None, [(batch[0], error)])
    middle, cut = len(batch) // 2, sum(counts[: len(batch) // 2])
    first = forward(model, cache, batch[:middle], tokens[:cut], counts[:middle])
    # What a model returns it may overwrite in its next forward.
    logits = [] if first.logits is None else [first.logits.clone()]
    second = forward(model, cache, batch[middle:], tokens[cut:], counts[middle:])
    logits += [] if second.logits is None else [second.logits]
    return Forwarded(torch.cat(logits) if logits else None, first.failed + second.failed)


def _run(
    model: Model, cache: Cache, batch: Sequence[Generation], tokens: Column, counts: Sequence[int]
) -> torch.Tensor:
    inputs = cache.inputs(batch)
    return model.logits(inputs, torch.from_numpy(tokens.astype(np.int64, copy=False)), counts)
