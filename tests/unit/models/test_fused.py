"""Projections that are computed together: what each gives is what it gives alone."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from rayk.models import load_model
from rayk.models.fused import fuse, part_again

from .checkpoints import Rows, prefill, prompts, write

TEXTS = prompts([5, 40, 17])


def answers(model: Any) -> list[Any]:
    return prefill(Rows(model, len(TEXTS)), TEXTS, 16, lambda logits: int(logits.argmax()))


# With biases, experts beside a dense layer, and a latent.
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "deepseek-v3"])
def test_logits_are_those_of_separate_projections(tmp_path: Path, name: str) -> None:
    model = load_model(write(tmp_path, name))
    size, want = model.num_bytes, answers(model)
    assert fuse(model._model) and not fuse(model._model)
    found = answers(model)
    assert [tokens for _, tokens in found] == [tokens for _, tokens in want]
    for (logits, _), (wanted, _) in zip(found, want, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert model.num_bytes == size
    part_again(model._model)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(answers(model), want, strict=True))


class Pair(torch.nn.Module):
    """Two projections, as an MLP has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = torch.nn.Linear(8, 6), torch.nn.Linear(8, 4)
        self.requires_grad_(False)


def test_each_part_goes_with_its_own_input() -> None:
    pair, (one, other) = Pair(), torch.randn(2, 3, 8)
    want = [(pair.gate_proj(x), pair.up_proj(x)) for x in (one, other)]
    fuse(pair)
    found = pair.gate_proj(one), pair.up_proj(other), pair.up_proj(one), pair.gate_proj(other), pair.gate_proj(other)
    for each, wanted in zip(found, (want[0][0], want[1][1], want[0][1], want[1][0], want[1][0]), strict=True):
        torch.testing.assert_close(each, wanted)
    one.mul_(2)  # changed in place after all took their part: not what was computed before
    torch.testing.assert_close(
        pair.up_proj(one), torch.nn.functional.linear(one, pair.up_proj.weight, pair.up_proj.bias)
    )


def test_weights_that_change_in_place_are_the_products_too() -> None:
    pair, given = Pair(), torch.randn(3, 8)
    fuse(pair)
    pair.up_proj.weight.mul_(2)
    pair.up_proj.bias.zero_()
    pair.gate_proj(given)
    torch.testing.assert_close(pair.up_proj(given), given @ pair.up_proj.weight.T)


def test_threads_do_not_take_each_others_parts() -> None:
    pair, given, wrong = Pair(), torch.randn(2, 5, 8), []
    want = [pair.up_proj(part) for part in given]
    fuse(pair)

    def work(number: int) -> None:
        for _ in range(200):
            pair.gate_proj(given[number])
            if not torch.allclose(pair.up_proj(given[number]), want[number], atol=1e-6):
                wrong.append(number)

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_differs_stays_apart() -> None:
    pair = Pair()
    pair.up_proj = torch.nn.Linear(8, 4, bias=False)
    assert not fuse(pair)
