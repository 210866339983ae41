"""Published models by the facts of their configs: bytes of a token, and parameters as published (in 1e9)."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayk.planning.errors import ModelConfigError
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


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_null_is_not_the_default_of_a_class(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite projects queries at once: q_lora_rank is null, where its class has 1,536."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "vocab_size": 102_400}
    latent = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    experts = {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408, "first_k_dense_replace": 1}
    config = {"model_type": "deepseek_v2", "v_head_dim": 128, "intermediate_size": 10_944, **sizes, **latent, **experts}
    weights = read_model(written(tmp_path, config)).weights
    assert weights is not None and weights.total == pytest.approx(15.70648e9, rel=1e-4)


@pytest.mark.parametrize("model_type", ["llava", "kimi_k25"])
def test_fields_that_a_class_does_not_read_are_refused(tmp_path: Path, model_type: str) -> None:
    """The fields of the text model stand at the top, where that class does not look for them."""
    config = {"model_type": model_type, "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 32_000}
    with pytest.raises(ModelConfigError, match=r"(num_hidden_layers|hidden_size) is \d+, but transformers"):
        read_model(written(tmp_path, config))


def test_experts_are_not_left_out_of_a_stand_in(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = {"model_type": "xverse", "architectures": ["XverseForCausalLM"], "intermediate_size": 64, **sizes}
    assert read_model(written(tmp_path, config)).name == "LlamaForCausalLM"
    with pytest.raises(ModelConfigError, match="XverseForCausalLM is not known"):
        read_model(written(tmp_path, {**config, "num_experts": 64}))


def test_how_a_model_was_run_does_not_matter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = {"model_type": "llama", "intermediate_size": 64, "_attn_implementation": "flash_attention_2", **sizes}
    assert read_model(written(tmp_path, config)).cached_layers == 2


@pytest.mark.parametrize("name", ["DeepSeek-VL2-tiny", "Ling-mini-2.0"])
def test_a_stand_in_adds_no_layers(tmp_path: Path, name: str) -> None:
    assert not any("predict further" in note for note in read_model(written(tmp_path, MODELS[name]["config"])).notes)
