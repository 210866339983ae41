"""Answers under faults beside those without: what differs is wrong, but where rounding decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rayk.bench.chaos.undisturbed import TIE, Asked, compare, is_tie, logits_of
from rayk.cluster import Cluster
from rayk.sampling import SamplingParams, uniforms

from ..unit.models.checkpoints import prompts, write  # noqa: TID252  # tests/ is no package that has an absolute name

SEED = 7


def scores(*powers: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Logits of these probabilities."""
    return np.log(np.array(powers) / sum(powers))


def asked(tokens: Sequence[int], sampling: SamplingParams) -> Asked:
    return Asked("r", np.arange(3, dtype=np.int32), sampling, list(tokens))


@pytest.mark.parametrize(
    ("gap", "other", "tie"), [(TIE / 2, 2, True), (100 * TIE, 2, False), (TIE / 2, 0, False)], ids=str
)
def test_greedy_tokens_tie_where_both_are_the_best(gap: float, other: int, tie: bool) -> None:
    logits = np.array([-1.0, 1.0, 1.0 - gap, -2.0])
    assert is_tie(asked([1], SamplingParams(max_new_tokens=1)), other, 0, lambda tokens: logits) == tie


@pytest.mark.parametrize(("beside", "tie"), [(TIE / 2, True), (-TIE / 2, True), (100 * TIE, False)], ids=str)
def test_seeded_tokens_tie_where_the_draw_is_on_their_border(beside: float, tie: bool) -> None:
    sampling = SamplingParams(max_new_tokens=2, temperature=1.0, seed=SEED)
    draw = float(uniforms(np.array([SEED], np.uint64), np.array([1], np.uint64))[0])
    border = draw + beside
    seen: list[list[int]] = []

    def logits(tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        seen.append(list(tokens))
        return scores(border / 2, border / 2, (1 - border) / 2, (1 - border) / 2)

    assert is_tie(asked([3, 1], sampling), 2, 1, logits) == is_tie(asked([3, 2], sampling), 1, 1, logits) == tie
    assert not is_tie(asked([3, 0], sampling), 3, 1, logits), "a border that is not theirs"
    assert seen[0] == [0, 1, 2, 3]


def test_the_same_is_asked_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "llama", "llama")
    texts = [np.array(text, np.int32) for text in prompts((5, 9, 17, 30), seed=3)]
    greedy = SamplingParams(max_new_tokens=6, ignore_eos=True)
    seeded = msgspec.structs.replace(greedy, temperature=1.0, seed=SEED)
    kinds = [greedy, seeded, greedy, seeded]
    with Cluster(str(folder), page_size=4, pages=64, max_batch_size=4, device="cpu", threads=1) as cluster:
        outputs = cluster.generate([text.tolist() for text in texts], kinds)
        answers = [
            Asked(str(at), text, kind, output.tokens)
            for at, (text, kind, output) in enumerate(zip(texts, kinds, outputs, strict=True))
        ]
        assert msgspec.to_builtins(compare(cluster, answers, folder)) == {"requests": 4, "differing": 0}
        logits = logits_of(folder)
        for each in answers:
            drawn = each.tokens[2]
            best = int(logits([*each.prompt.tolist(), *each.tokens[:2]]).argmax())
            assert each is answers[1] or each is answers[3] or drawn == best, "it is the same model"
        wrong = [*answers[1].tokens]
        wrong[3] = (wrong[3] + 40) % 64
        answers[1] = msgspec.structs.replace(answers[1], tokens=wrong)
        found = compare(cluster, answers, folder)
        assert (found.requests, found.differing, found.ties) == (4, 1, 0)
        assert found.first is not None and found.first.startswith("request '1' at token 3 (6 and 6 tokens")
        answers[0] = msgspec.structs.replace(answers[0], tokens=answers[0].tokens[:4])
        assert compare(cluster, answers, folder).differing == 2, "one that is short"
