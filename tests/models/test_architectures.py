"""A few of all architectures, as `python -m tests.models.architectures` tries each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayk.models import load_model

from .architectures import attempt, causal, multimodal, save

PAIRS = {config.__name__: (config, model) for config, model in (*causal(), *multimodal())}
REGISTRY, OWN = "torch-sdpa", "transformers"
CASES = {
    "FalconConfig": OWN,
    "GPTJConfig": OWN,
    "GPTNeoXConfig": REGISTRY,
    "MptConfig": OWN,
    "StableLmConfig": OWN,
    "MiMoV2FlashConfig": REGISTRY,  # layers with different KV heads
    "Gemma3nTextConfig": OWN,  # layers that use the keys and values of others
    "BartConfig": OWN,  # positions by the length of its cache: rows go one by one
    "Qwen2_5_VLConfig": REGISTRY,
    "Mistral3Config": REGISTRY,
    "LlavaConfig": REGISTRY,
    "InternVLConfig": REGISTRY,
    "SmolVLMConfig": REGISTRY,
}
REFUSED = {
    "Qwen3NextConfig": "recurrent state",
    "JambaConfig": "recurrent state",
    "Lfm3Config": "layers of type conv",
    "DeepseekV32Config": "layers of type indexed_attention",
    "PaliGemmaConfig": "looks ahead",
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_generate(tmp_path: Path, name: str) -> None:
    found = attempt(*PAIRS[name], tmp_path)
    assert (found.verdict, found.by) == ("equal", CASES[name]), found


@pytest.mark.parametrize("name", REFUSED)
def test_hybrids_and_what_looks_ahead_are_refused_by_name(tmp_path: Path, name: str) -> None:
    found = attempt(*PAIRS[name], tmp_path)
    assert found.verdict == "refused" and found.model in found.why and REFUSED[name] in found.why, found


def test_towers_are_not_kept_in_memory(tmp_path: Path) -> None:
    model = load_model(save(*PAIRS["LlavaConfig"], tmp_path))
    text = torch.nn.ModuleList([model._model.get_decoder(), model._model.lm_head])
    assert model.num_bytes <= 1.01 * sum(t.numel() * t.element_size() for t in (*text.parameters(), *text.buffers()))
    assert model._model.model.vision_tower is None
