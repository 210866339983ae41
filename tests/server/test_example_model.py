"""The checkpoint to try rayk on: whole, the same for the same seed, and it overwrites nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rayk.cli.example_model import WEATHER, example_model, write_example_model
from rayk.cluster import Cluster
from rayk.errors import ConfigError


def test_the_same_bytes_for_the_same_seed_and_a_model_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = torch.get_rng_state()
    example_model(tmp_path / "a", seed=0, steps=2)
    assert "a Llama of 1" in capsys.readouterr().out
    write_example_model(tmp_path / "b", steps=2)
    write_example_model(tmp_path / "c", seed=1, steps=2)
    assert torch.equal(draws, torch.get_rng_state()), "random numbers of the caller are its own"
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    asked = [{"role": "user", "content": "What is the weather in Rome? ☂"}]
    text = tokenizer.apply_chat_template(asked, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nTools:\n{") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with Cluster(tmp_path / "a", pages=16, page_size=16) as cluster:
        [output] = cluster.generate(text, max_new_tokens=4)
    assert output.error is None and output.text is not None


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not empty; name a new folder"):
        write_example_model(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]
