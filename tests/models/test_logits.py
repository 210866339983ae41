"""Logits on pages are those of the same checkpoint without a cache, for every architecture."""

from pathlib import Path

import pytest
import torch

from rayk.models import PagedModel, load_model

from ..unit.models.checkpoints import ARCHITECTURES, VOCAB, Rows, dense, prefill, prompts, write  # noqa: TID252  # tests/ is no package that has an absolute name

LENGTHS = [37, 1, 90, 16]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> PagedModel:
    return load_model(folder)


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error, relative to the largest logit where that is above 1."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


@torch.inference_mode()
def test_chunks_mixed_batches_and_greedy_answers(folder: Path, model: PagedModel) -> None:
    reference, texts = dense(folder), prompts(LENGTHS)
    rows = Rows(model, len(texts))
    answers = []
    for row, (logits, answer) in enumerate(prefill(rows, texts, 16, lambda logits: int(logits.argmax()))):
        assert worst(logits, reference(torch.tensor([texts[row]])).logits[0, -1]) < 1e-5
        answers.append(answer)
    for _ in range(12):
        logits = rows.step({row: answer[-1:] for row, answer in enumerate(answers)})
        for answer, token in zip(answers, logits.argmax(-1).tolist(), strict=True):
            answer.append(token)
    for text, answer in zip(texts, answers, strict=True):
        tokens = torch.tensor([text])
        want = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=len(answer),
            min_new_tokens=len(answer),
            eos_token_id=None,
        )
        assert want[0, len(text) :].tolist() == answer


@torch.inference_mode()
def test_a_shared_prefix_is_read_and_not_written(folder: Path, model: PagedModel) -> None:
    reference = dense(folder)
    (first,) = prompts([70])
    second = [*first[:64], *prompts([9], seed=1)[0]]
    rows = Rows(model, 2)
    rows.step({0: first})
    shared = rows.blocks[rows.table[0, :4].long()].clone()
    rows.share(0, 1, 64)
    logits = rows.step({1: second[64:], 0: [5]})
    assert torch.equal(rows.blocks[rows.table[0, :4].long()], shared)
    assert worst(logits[0], reference(torch.tensor([second])).logits[0, -1]) < 1e-5
    assert worst(logits[1], reference(torch.tensor([[*first, 5]])).logits[0, -1]) < 1e-5


@torch.inference_mode()
def test_logits_of_every_token(folder: Path, model: PagedModel) -> None:
    texts = prompts([20, 5])
    got = Rows(model, 2).step({0: texts[0], 1: texts[1]}, every_token=True)
    reference = dense(folder)
    want = torch.cat([reference(torch.tensor([text])).logits[0] for text in texts])
    assert got.shape == (25, VOCAB) and worst(got, want) < 1e-5
