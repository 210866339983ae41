"""Logits to tokens: the most likely one of each row at once, or transformers' processors and one draw a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rayk.engine.sequence import SequenceState
from rayk.protocol.engine_reports import TokenLogprobs
from rayk.sampling import uniforms

NOT_FINITE = "its logits are not finite; the weights or the dtype may be damaged or unfit"

Processor = Any  # transformers' LogitsProcessor: (input_ids [n, length], scores [n, vocab]) -> scores


class Sampled(NamedTuple):
    """The chosen tokens, [n] int64; by row, what failed (its token means nothing), and log probabilities asked for."""

    tokens: npt.NDArray[np.int64]
    failed: dict[int, Exception]
    logprobs: dict[int, TokenLogprobs]


Sampler = Callable[[torch.Tensor, Sequence[SequenceState], bool], Sampled]


def sample(logits: torch.Tensor, sequences: Sequence[SequenceState], plain: bool) -> Sampled:
    """One token for each row of `logits` ([n, vocab] float32, not changed). `plain`: all rows are plain."""
    found, finite = _best(logits)
    failed: dict[int, Exception] = {}
    if not finite.all():
        failed = {int(row): FloatingPointError(NOT_FINITE) for row in np.flatnonzero(finite == 0)}
    if plain:
        return Sampled(found, failed, {})
    found = found.copy()
    good = [row for row in range(len(sequences)) if finite[row]]
    for rows in _alike([row for row in good if not _takes_best(sequences[row])], sequences):
        try:
            found[rows] = _draw(logits[rows], [sequences[row] for row in rows])
        except Exception as error:  # of a processor: a matter of these requests alone
            failed |= dict.fromkeys(rows, error)
    asked = [row for row in good if row not in failed and sequences[row].sampling.logprobs is not None]
    logprobs = {
        row: token_logprobs(logits[row : row + 1], found[row : row + 1], sequences[row].sampling.logprobs or 0)[0]
        for row in asked
    }
    return Sampled(found, failed, logprobs)


def _best(logits: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.generic]]:
    """The most likely token of each row, and whether its logit is a finite number."""
    if logits.device.type == "cpu":  # numpy takes an eighth of torch's time
        rows = logits.detach().numpy()
        found = rows.argmax(-1)
        return found, np.isfinite(rows[np.arange(len(rows)), found])
    best, tokens = logits.max(dim=-1)
    chosen = torch.stack((tokens, torch.isfinite(best).to(torch.int64))).cpu().numpy()  # one copy off the device
    return chosen[0], chosen[1]


def is_plain(sequence: SequenceState) -> bool:
    """Whether its token is the most likely one, and nothing else is wanted."""
    return _takes_best(sequence) and sequence.sampling.logprobs is None


def _takes_best(sequence: SequenceState) -> bool:
    return sequence.sampling.greedy and not sequence.sampling.adjusts


def _alike(rows: Sequence[int], sequences: Sequence[SequenceState]) -> list[list[int]]:
    """Rows grouped by what shapes their distributions."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(sequences[row].sampling.shape, []).append(row)
    return list(groups.values())


def _draw(scores: torch.Tensor, sequences: Sequence[SequenceState]) -> npt.NDArray[np.int64]:
    """Tokens of rows whose distributions are shaped alike, [n] int64."""
    scores = _adjusted(scores, sequences)
    sampling = sequences[0].sampling
    if sampling.greedy:
        return np.asarray(scores.argmax(dim=-1).cpu())
    if sequences[0].processors is None:
        sequences[0].processors = warpers(*sampling.shape)
    scores = scores - scores.amax(dim=-1, keepdim=True)  # so that a low temperature cannot overflow
    for process in sequences[0].processors:
        scores = process(None, scores)
    # The draw is the inverse of the distribution function, in float64 so that its last steps do not vanish.
    reach = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
    seeds = np.array([each.seed for each in sequences], np.uint64)
    positions = np.array([each.generated for each in sequences], np.uint64)
    at = torch.from_numpy(uniforms(seeds, positions)).to(reach.device)[:, None] * reach[:, -1:]
    drawn = torch.searchsorted(reach, at, right=True)[:, 0]
    return np.asarray(torch.minimum(drawn, _last_possible(scores)).cpu())


def _last_possible(scores: torch.Tensor) -> torch.Tensor:
    """The last token of each row with a probability, [n]: rounding must not carry a draw beyond it."""
    return scores.shape[-1] - 1 - torch.isfinite(scores).flip(-1).to(torch.int8).argmax(dim=-1)


def _adjusted(scores: torch.Tensor, sequences: Sequence[SequenceState]) -> torch.Tensor:
    """Biases, penalties, and no end before its time: row by row, each has its own tokens."""
    if not any(each.sampling.adjusts for each in sequences):
        return scores
    scores = scores.clone()
    for row, each in zip(scores, sequences, strict=True):
        if each.sampling.adjusts:
            _adjust(row, each)
    return scores


def _adjust(row: torch.Tensor, sequence: SequenceState) -> None:
    """Change one row, [vocab] float32, in place."""
    sampling, structure = sequence.sampling, sequence.structure
    if structure is not None:
        row.masked_fill_(~structure.allowed().to(row.device), -torch.inf)
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=row.device)
        row[tokens] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)
    if sequence.generated < sampling.min_tokens and sequence.stop_ids and structure is None:
        row[torch.tensor(sequence.stop_ids, device=row.device)] = -torch.inf
    if sampling.repetition_penalty != 1:
        from transformers import RepetitionPenaltyLogitsProcessor

        seen = torch.from_numpy(sequence.ctx.tokens.all.astype(np.int64)).to(row.device)
        row.copy_(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(seen[None], row[None])[0])
    if sampling.presence_penalty or sampling.frequency_penalty:
        found, counts = np.unique(sequence.answer, return_counts=True)
        less = sampling.presence_penalty + sampling.frequency_penalty * counts
        row[torch.from_numpy(found.astype(np.int64)).to(row.device)] -= torch.from_numpy(less).to(row)


def warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> list[Processor]:
    """transformers' own, in the order in which generate() applies them."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[Processor] = []
    if temperature != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        found.append(TopPLogitsWarper(float(top_p)))
    if min_p:
        found.append(MinPLogitsWarper(float(min_p)))
    return found


def token_logprobs(logits: torch.Tensor, tokens: npt.NDArray[np.int64], count: int) -> list[TokenLogprobs]:
    """Log probabilities of tokens[i] and of the `count` most likely ones by row i of `logits`, [n, vocab] float32."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    top = torch.topk(scores, min(count, scores.shape[-1]))
    chosen = scores.gather(1, torch.from_numpy(tokens).to(scores.device)[:, None])[:, 0]
    rows = zip(chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [TokenLogprobs(each, tuple(ids), tuple(values)) for each, ids, values in rows]
