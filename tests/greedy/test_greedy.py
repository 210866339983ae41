"""A part of the matrix; matrix.py runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..unit.models.checkpoints import dense, write  # noqa: TID252  # tests/ is no package that has an absolute name
from .matrix import Reference, compare, dense_answers, random_prompts, run

pytestmark = pytest.mark.slow

CASES = [("llama", 16, 16, False), ("gemma2", 64, 128, True), ("gpt2", 512, 16, False), ("llama", 64, 16, True)]


@pytest.mark.parametrize(("name", "chunk_size", "page_size", "tiers"), CASES)
def test_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, name: str, chunk_size: int, page_size: int, tiers: bool
) -> None:
    folder = write(tmp_path, name)
    model = dense(folder)
    prompts = random_prompts(model.config.get_text_config().vocab_size, page_size)
    disk = tmp_path / "tiers" if tiers else None
    outcome = run(name, folder, prompts, dense_answers(model, prompts), chunk_size, page_size, tiers=disk)
    print(outcome)
    assert not outcome.wrong
    assert not tiers or (outcome.from_host and outcome.from_disk)
    assert outcome.preemptions >= 20 and outcome.cached > 0


def test_a_difference_is_seen() -> None:
    reference = Reference([1, 2, 3], [0.5, 0.00005, 0.5])
    assert compare([1, 2, 3], reference) == "same"
    assert compare([1, 9, 9], reference) == "tie"
    assert [compare(tokens, reference) for tokens in ([9, 2, 3], [1, 2, 9], [1, 2], [1, 2, 3, 4])] == ["wrong"] * 4
