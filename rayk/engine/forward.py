"""The model as an engine sees it, and a forward that finds out which request it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from rayk.context import TextContext
from rayk.engine.cache import Cache
from rayk.engine.decode_batch import Column
from rayk.kvcache.runtime_inputs import ShardInputs


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
    """Logits of the requests that went well, in the batch's order (None: of none); by position, why others did not."""

    logits: torch.Tensor | None
    failed: dict[int, Exception]


def forward(
    model: Model, cache: Cache, contexts: Sequence[TextContext], tokens: Column, counts: Sequence[int]
) -> Forwarded:
    """Forward a batch: `tokens` ([sum of counts] int64) are its active windows, counts[i] of context i.

    If that raises, it is repeated on halves, down to the requests that fail alone. Processing a window twice is
    harmless: it writes the same keys and values to the same places.
    """
    try:
        return Forwarded(model.logits(cache.inputs(contexts), torch.from_numpy(tokens), counts), {})
    except Exception as error:
        if len(contexts) == 1:
            return Forwarded(None, {0: error})
    middle = len(contexts) // 2
    cut = sum(counts[:middle])
    first = forward(model, cache, contexts[:middle], tokens[:cut], counts[:middle])
    # What a model returns it may overwrite in its next forward.
    logits = [] if first.logits is None else [first.logits.clone()]
    second = forward(model, cache, contexts[middle:], tokens[cut:], counts[middle:])
    logits += [] if second.logits is None else [second.logits]
    failed = first.failed | {middle + at: error for at, error in second.failed.items()}
    return Forwarded(torch.cat(logits) if logits else None, failed)
