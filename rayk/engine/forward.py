"""The model as an engine sees it, and a forward that finds out which request it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
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

        Returns the logits of each row's last token, [rows, vocab] float32. Where log probabilities of prompts are asked
        for it is called with every_token=True too, and returns those of all tokens, [tokens, vocab].
        """
        ...


class Forwarded(NamedTuple):
    """Logits of the requests that went well, in the batch's order (None: of none); by position, why others did not,
    and of those that are wanted `whole` the logits of every token, [count, vocab]."""

    logits: torch.Tensor | None
    failed: dict[int, Exception]
    whole: dict[int, torch.Tensor]


def forward(
    model: Model,
    cache: Cache,
    contexts: Sequence[TextContext],
    tokens: Column,
    counts: Sequence[int],
    whole: frozenset[int] = frozenset(),
) -> Forwarded:
    """Forward a batch: `tokens` ([sum of counts] int64) are its active windows, counts[i] of context i.

    If that raises, it is repeated on halves, down to the requests that fail alone. Processing a window twice is
    harmless: it writes the same keys and values to the same places. `whole`: positions, see Forwarded.
    """
    try:
        if whole:
            return _every_token(model, cache, contexts, tokens, counts, whole)
        return Forwarded(model.logits(cache.inputs(contexts), torch.from_numpy(tokens), counts), {}, {})
    except Exception as error:
        if len(contexts) == 1:
            return Forwarded(None, {0: error}, {})
    middle = len(contexts) // 2
    cut = sum(counts[:middle])
    left, right = {at for at in whole if at < middle}, {at - middle for at in whole if at >= middle}
    first = forward(model, cache, contexts[:middle], tokens[:cut], counts[:middle], frozenset(left))
    # What a model returns it may overwrite in its next forward.
    logits = [] if first.logits is None else [first.logits.clone()]
    every = {at: part.clone() for at, part in first.whole.items()}
    second = forward(model, cache, contexts[middle:], tokens[cut:], counts[middle:], frozenset(right))
    logits += [] if second.logits is None else [second.logits]
    failed = first.failed | {middle + at: error for at, error in second.failed.items()}
    every |= {middle + at: part for at, part in second.whole.items()}
    return Forwarded(torch.cat(logits) if logits else None, failed, every)


def _every_token(
    model: Any,
    cache: Cache,
    contexts: Sequence[TextContext],
    tokens: Column,
    counts: Sequence[int],
    whole: frozenset[int],
) -> Forwarded:
    """forward() of a batch in which the logits of all tokens of some are wanted; they are made for all of it."""
    found = model.logits(cache.inputs(contexts), torch.from_numpy(tokens), counts, every_token=True)
    ends = np.cumsum(counts)
    return Forwarded(found[ends - 1], {}, {at: found[ends[at] - counts[at] : ends[at]] for at in whole})
