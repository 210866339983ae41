"""The same requests without faults: every token that a disturbed Cluster answered with has to be that of another one,
in this process, that nothing befell.

Logits are rounded differently in a batch of another shape. Where that decides, either token is right: a greedy one
whose logit is as high, or a seeded one whose draw falls on the border between the two. Such a tie is judged by
transformers' own forward in float64, and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rayk.sampling import SamplingParams, uniforms
from rayk.workloads.request import IntArray

log = logging.getLogger("rayk.bench")

if TYPE_CHECKING:
    from rayk.cluster import Cluster


TIE = 1e-5
"""Of a draw or, relative to the highest, of a logit: ten times what rounding float32 logits moved either by."""

Logits = Callable[[Sequence[int]], "np.ndarray[Any, np.dtype[np.float64]]"]
"""Of the token after those, [vocab]."""


class Asked(msgspec.Struct, frozen=True):
    """A request of a Cluster and its answer. `prompt`: [length] int32."""

    request_id: str
    prompt: IntArray
    sampling: SamplingParams
    tokens: list[int]
    retries: int = 0  # replicas that it lost


class Comparison(msgspec.Struct, frozen=True, omit_defaults=True):
    """Requests that were asked again, and how many had other tokens; `first` says where the first one differs. `ties`
    are others, which differ from where rounding decides on."""

    requests: int
    differing: int
    first: str | None = None
    ties: int = 0


def logits_of(folder: Path | str) -> Logits:
    """By transformers, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.eval()

    def logits(tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        with torch.no_grad():
            found: np.ndarray[Any, np.dtype[np.float64]] = model(torch.tensor([list(tokens)])).logits[0, -1].numpy()
        return found

    return logits


def is_tie(each: Asked, other: int, at: int, logits: Logits) -> bool:
    """Whether token `at` of an answer could as well have been `other`."""
    token = each.tokens[at]
    scores = logits([*each.prompt.tolist(), *each.tokens[:at]])
    if each.sampling.greedy:
        return bool(scores.max() - min(scores[token], scores[other]) <= TIE * max(1.0, abs(scores.max())))
    powers = np.exp((scores - scores.max()) / each.sampling.temperature)
    reach = np.cumsum(powers / powers.sum())
    draw = uniforms(np.array([each.sampling.seed], np.uint64), np.array([at], np.uint64))[0]
    low, high = sorted((token, other))
    return bool(abs(draw - reach[low]) <= TIE and abs(draw - reach[high - 1]) <= TIE)


def compare(cluster: Cluster, asked: Sequence[Asked], folder: Path | str) -> Comparison:
    """Ask `cluster`, which serves the checkpoint of `folder`, the same."""
    outputs = cluster.generate(
        [{"id": each.request_id, "tokens": each.prompt} for each in asked], [each.sampling for each in asked]
    )
    differing, ties, first, logits = 0, 0, None, None
    for each, output in zip(asked, outputs, strict=True):
        if output.tokens != each.tokens:
            same = [one == other for one, other in zip(each.tokens, output.tokens, strict=False)]
            at = same.index(False) if False in same else len(same)
            lengths = f"{len(each.tokens)} and {len(output.tokens)} tokens, {each.retries} replicas lost"
            log.warning("request %r: %s and undisturbed %s (%s)", each.request_id, each.tokens, output.tokens, lengths)
            if at < len(same):
                logits = logits or logits_of(folder)
                if is_tie(each, output.tokens[at], at, logits):
                    ties += 1
                    continue
            differing += 1
            first = first or f"request {each.request_id!r} at token {at} ({lengths}; {output.error or 'no error'})"
    return Comparison(len(asked), differing, first, ties)
