"""Published models by the facts of their configs: bytes of a token, and parameters as published (in 1e9)."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayk.planning.reading import read_model

MODELS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "real_models.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_cache_and_parameters(tmp_path: Path, name: str) -> None:
    facts = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    model = read_model(tmp_path)
    assert model.token_bytes("bfloat16") == facts["token_bytes"]
    assert model.weights is not None and model.cached_layers <= model.num_layers
    if facts["parameters"] is not None:
        assert model.weights.total == pytest.approx(facts["parameters"] * 1e9, rel=0.02)


def test_recurrent_layers_keep_a_state(tmp_path: Path) -> None:
    """36 of 48 layers: 32 x 128 x 128 numbers in float32, and 3 inputs of a convolution of 8,192 channels."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Qwen3-Next-80B"]["config"]))
    model = read_model(tmp_path)
    assert (model.cached_layers, model.num_layers) == (12, 48)
    assert model.state.num_bytes("bfloat16") == 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert any("recurrent" in note for note in model.notes) and model.refused is not None
