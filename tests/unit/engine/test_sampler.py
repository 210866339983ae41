"""Tokens from logits: transformers' own distribution, and draws that follow it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerationMixin

from rayk.engine.sampler import _adjusted, is_plain, sample, warpers
from rayk.engine.sequence import SequenceState
from rayk.errors import ConfigError
from rayk.protocol.engine_request import Limits, Request
from rayk.sampling import SamplingParams, uniforms

LIMITS = Limits(vocab_size=50, max_length=1000, num_pages=100, page_size=16, has_tokenizer=True)


def sequence(tokens=(1, 2, 3), seed: int = 0, **sampling) -> SequenceState:
    request = Request(0, "r", list(tokens), SamplingParams(seed=seed, **sampling))
    return SequenceState(request, LIMITS.check(request), LIMITS, 0, 0.0)


def logits(rows: int, seed: int = 0, vocab: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_uniforms_are_uniform_and_independent_of_company() -> None:
    seeds = np.repeat(np.arange(300, dtype=np.uint64), 300)
    positions = np.tile(np.arange(300, dtype=np.uint64), 300)
    drawn = uniforms(seeds, positions)
    assert 0 <= drawn.min() and drawn.max() < 1
    assert np.abs(np.histogram(drawn, 20, (0, 1))[0] / len(drawn) - 0.05).max() < 0.004
    grid = drawn.reshape(300, 300) - 0.5
    for shifted in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):
        assert abs(shifted.mean()) * 12 < 0.02, "neighbours are correlated"
    assert len(np.unique(drawn)) == len(drawn)
    assert uniforms(seeds[77:78], positions[77:78]) == drawn[77]
    assert uniforms(np.array([2**64 - 1], np.uint64), np.array([0], np.uint64)) < 1


def test_the_most_likely_token() -> None:
    scores = logits(4)
    scores[2, [7, 9]] = 40.0  # a tie: the first, as argmax has it
    plain = [sequence() for _ in range(4)]
    assert all(is_plain(each) for each in plain)
    fast, slow = sample(scores, plain, True), sample(scores, plain, False)
    assert fast.tokens.tolist() == slow.tokens.tolist() == scores.argmax(dim=-1).tolist()
    assert fast.tokens[2] == 7 and fast.tokens.dtype == np.int64
    assert not is_plain(sequence(temperature=0.5)) and not is_plain(sequence(logprobs=0))
    assert not is_plain(sequence(repetition_penalty=1.1)) and is_plain(sequence(temperature=1e-9))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_distributions_are_those_of_transformers(settings) -> None:
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
    mixin = GenerationMixin()
    config._eos_token_tensor = None
    wanted: LogitsProcessorList = mixin._get_logits_processor(
        config, input_ids_seq_length=3, device="cpu", logits_processor=LogitsProcessorList()
    )
    scores = logits(6)
    params = SamplingParams(**settings)
    ours = scores
    for process in warpers(*params.shape):
        ours = process(None, ours)
    theirs = wanted(torch.ones(6, 3, dtype=torch.long), scores)
    assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_draws_follow_the_distribution() -> None:
    scores = logits(1, seed=3, vocab=8) / 3
    count = 4000
    rows = [sequence(seed=i, temperature=1.0) for i in range(count)]
    drawn = sample(scores.expand(count, -1), rows, False).tokens
    found = np.bincount(drawn, minlength=8) / count
    want = scores[0].softmax(-1).numpy()
    assert np.abs(found - want).max() < 4 * np.sqrt(0.25 / count)


def test_no_draw_is_impossible() -> None:
    """Whatever the number drawn, the token is one that was left by top_k."""
    scores = logits(1000, seed=5)
    rows = [sequence(seed=i, temperature=0.8, top_k=2) for i in range(1000)]
    drawn = torch.from_numpy(sample(scores, rows, False).tokens)
    assert (scores.topk(2).indices == drawn[:, None]).any(dim=1).all()


def test_a_low_temperature_is_the_most_likely_token() -> None:
    scores = logits(20) * 1e4
    rows = [sequence(seed=i, temperature=2e-6) for i in range(20)]
    assert sample(scores, rows, False).tokens.tolist() == scores.argmax(-1).tolist()


def test_mixed_rows() -> None:
    scores = logits(5)
    kinds = [{}, {"temperature": 1.0}, {"repetition_penalty": 5.0}, {"temperature": 1.0, "top_k": 3}, {"logprobs": 2}]
    rows = [sequence(seed=9, **kind) for kind in kinds]
    together = sample(scores, rows, False)
    for i, kind in enumerate(kinds):
        assert sample(scores[i : i + 1], [sequence(seed=9, **kind)], False).tokens[0] == together.tokens[i]
    assert list(together.logprobs) == [4] and len(together.logprobs[4].top_ids) == 2


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = torch.zeros(2, 50)
    scores[:, 4], scores[:, 9] = 3.0, 2.9
    rows = [sequence([4, 4, 1], repetition_penalty=1.2), sequence([1, 2], repetition_penalty=1.2)]
    assert sample(scores, rows, False).tokens.tolist() == [9, 4]
    seen = torch.tensor([[4, 4, 1]])
    assert RepetitionPenaltyLogitsProcessor(1.2)(seen, scores[:1]).argmax() == 9
    assert scores[0, 4] == 3.0, "the logits are not changed"


def test_rows_that_fail_leave_the_others() -> None:
    scores = logits(4)
    scores[1, 5], scores[2] = float("nan"), float("-inf")
    rows = [sequence(), sequence(), sequence(temperature=1.0), sequence(temperature=1.0)]
    sampled = sample(scores, rows, False)
    assert sorted(sampled.failed) == [1, 2]
    assert sampled.tokens[0] == scores[0].argmax()


def test_biases_and_penalties_count_what_the_answer_has() -> None:
    request = Request(0, "r", [4, 4, 1, 7, 7, 9], SamplingParams(), generated=3)
    scores = logits(1)
    for settings in (
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.75},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {7: 2.0, 40: -100.0}},
    ):
        given = SamplingParams(**settings)
        asked = SequenceState(
            Request(0, "r", request.tokens, given, generated=3), LIMITS.check(request), LIMITS, 0, 0.0
        )
        want = scores[0].clone()
        for token, count in ((7, 2), (9, 1)):  # of the answer; 4 and 1 are the prompt's
            want[token] -= given.presence_penalty + given.frequency_penalty * count
        for token, bias in given.logit_bias.items():
            want[token] += bias
        before = scores.clone()
        torch.testing.assert_close(_adjusted(scores, [asked])[0], want)
        assert torch.equal(scores, before), "the logits are not changed"
    forced = sequence(logit_bias={33: 100.0})
    assert sample(scores, [forced], False).tokens.tolist() == [33] and not is_plain(forced)


def test_no_end_before_its_time() -> None:
    scores = torch.zeros(1, 50)
    scores[0, 8], scores[0, 9] = 5.0, 4.0
    early = sequence(min_tokens=2, max_new_tokens=4, stop_token_ids=(8,))
    assert sample(scores, [early], False).tokens.tolist() == [9]
    late = sequence([1, 2, 3], min_tokens=0, stop_token_ids=(8,))
    assert sample(scores, [late], False).tokens.tolist() == [8]


def test_names_of_vllm_and_of_transformers() -> None:
    assert SamplingParams(max_tokens=5) == SamplingParams(max_new_tokens=5)
    assert SamplingParams(min_new_tokens=2, num_return_sequences=3) == SamplingParams(min_tokens=2, n=3)
    with pytest.raises(ConfigError, match="'max_tokens' and 'max_new_tokens' are one setting"):
        SamplingParams(max_new_tokens=4, max_tokens=5)
    wire = msgspec.msgpack.encode(SamplingParams(max_tokens=5, logit_bias={3: 1.5}, prompt_logprobs=0))
    assert msgspec.msgpack.decode(wire, type=SamplingParams).logit_bias == {3: 1.5}


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0}, {"n": True}, {"n": 129}, {"min_tokens": -1}, {"min_tokens": 65}, {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")}, {"logit_bias": {1: 101}}, {"logit_bias": {-1: 1}}, {"logit_bias": [3]},
        {"logit_bias": {"5": 1}}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1},
    ],
)  # fmt: skip
def test_what_is_no_setting_is_named(settings) -> None:
    assert str(SamplingParams(**settings).problem()).startswith(next(iter(settings)) + " is ")


def test_settings_in_pythons_own_types_are_sent_as_they_are() -> None:
    usual = SamplingParams(max_new_tokens=5, temperature=0.5, seed=3)
    assert usual.plain() is usual
    given = SamplingParams(temperature=1, top_k=np.int64(3), stop_token_ids=[np.int32(4)], ignore_eos=np.bool_(True))
    assert given.problem() is None
    made = given.plain()
    found = (made.temperature, made.top_k, made.stop_token_ids, made.ignore_eos)
    assert found == (1.0, 3, (4,), True)
    assert [type(each) for each in (*found[:2], *found[2], found[3])] == [float, int, int, bool]
