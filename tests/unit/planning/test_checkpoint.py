"""Models from config files: cache bytes, parameter counts, windows; and refusals that say what to pass by hand."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from rayk.errors import ConfigError
from rayk.planning.errors import ModelConfigError
from rayk.planning.manual_model import model_by_hand
from rayk.planning.model import Window
from rayk.planning.reading import read_model

GIB = 1 << 30

# Parameters as published (in 1e9), and bytes of a token in a bfloat16 cache.
PUBLISHED = {
    "llama-3.2-1b": (1.24, 32_768),
    "llama-3.1-8b": (8.03, 131_072),
    "llama-3.1-70b": (70.6, 327_680),
    "mistral-7b-v0.1": (7.24, 131_072),
    "mixtral-8x7b": (46.7, 131_072),
    "mixtral-8x22b": (141.0, 229_376),
    "qwen2.5-0.5b": (0.494, 12_288),
    "qwen2.5-7b": (7.62, 57_344),
    "qwen2-57b-a14b": (57.4, 57_344),
    "qwen3-32b": (32.8, 262_144),
    "qwen3-30b-a3b": (30.5, 98_304),
    "qwen3-235b-a22b": (235.0, 192_512),
    "gemma-2-9b": (9.24, 344_064),
    "gemma-2-27b": (27.2, 376_832),
    "gemma-3-1b": (1.0, 26_624),
    "gemma-3-4b": (4.3, 139_264),
    "gemma-3-27b": (27.4, 507_904),
    "phi-2": (2.78, 327_680),
    "phi-3-mini": (3.82, 393_216),
    "phi-4": (14.7, 204_800),
    "deepseek-v2-lite": (15.7, 31_104),
    "deepseek-v2": (236.0, 69_120),
    "deepseek-v3": (671.0, 70_272),
    "gpt-oss-20b": (20.9, 49_152),
    "gpt-oss-120b": (117.0, 73_728),
}


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is missing, whether or not transformers is installed here."""
    monkeypatch.setitem(sys.modules, "transformers", None)


def test_every_config_file_has_a_published_figure(configs: Path) -> None:
    assert {path.stem for path in configs.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_published(configs: Path, name: str) -> None:
    billions, token = PUBLISHED[name]
    model = read_model(configs / f"{name}.json")
    assert model.weights is not None
    assert model.weights.total == pytest.approx(billions * 1e9, rel=0.01)
    assert model.token_bytes("bfloat16") == token
    assert model.kv_params(tp=1, page_size=128, kv_dtype="bfloat16").bytes_per_page == 128 * token
    assert model.token_bytes("float8_e4m3fn") == token // 2


def test_bytes_of_weights(configs: Path) -> None:
    sizes = {"llama-3.1-8b": 16.06e9, "deepseek-v3": 673e9, "gpt-oss-20b": 13.76e9, "gpt-oss-120b": 65.2e9}
    for name, size in sizes.items():
        assert read_model(configs / f"{name}.json").loaded_bytes(None) == pytest.approx(size, rel=0.01)
    model = read_model(configs / "llama-3.1-8b.json")
    assert model.loaded_bytes("float32") == 2 * model.loaded_bytes(None)
    ends = 2 * 128_256 * 4096  # embeddings and head stay as they are
    assert model.loaded_bytes("int8") == pytest.approx(8.03e9 + ends, rel=0.001)
    assert model.loaded_bytes("int4") == pytest.approx((8.03e9 - ends) * 4.16 / 8 + 2 * ends, rel=0.01)


def test_windows_are_noted(configs: Path) -> None:
    found = {name: read_model(configs / f"{name}.json").window for name in PUBLISHED}
    assert {name: window for name, window in found.items() if window} == {
        "mistral-7b-v0.1": Window(4096, 32),
        "gemma-2-9b": Window(4096, 21),
        "gemma-2-27b": Window(4096, 23),
        "gemma-3-1b": Window(512, 22),
        "gemma-3-4b": Window(1024, 29),
        "gemma-3-27b": Window(1024, 52),
        "phi-3-mini": Window(2047, 32),
        "gpt-oss-20b": Window(128, 12),
        "gpt-oss-120b": Window(128, 18),
    }
    assert "52 of 62 layers" in read_model(configs / "gemma-3-27b.json").notes[0]


def test_heads_split_where_they_divide(configs: Path) -> None:
    llama = read_model(configs / "llama-3.1-8b.json")
    assert llama.kv_params(tp=8, page_size=128, kv_dtype="bfloat16").bytes_per_page == 16 << 20
    with pytest.raises(ConfigError, match="use tp 1, 2, 4, 8, 16, 32"):
        llama.kv_params(tp=3, page_size=128, kv_dtype="bfloat16")
    latent = read_model(configs / "deepseek-v3.json")
    assert latent.kv_params(tp=8, page_size=1, kv_dtype="bfloat16").bytes_per_page == 8 * 70_272
    with pytest.raises(ConfigError, match="128 query heads"):
        latent.kv_params(tp=3, page_size=1, kv_dtype="bfloat16")


def write(folder: Path, configs: Path, name: str = "llama-3.1-8b", **changes: Any) -> Path:
    """config.json in `folder`: that model's with changes; None takes a field away."""
    raw = json.loads((configs / f"{name}.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


def test_the_index_says_what_the_weights_take(tmp_path: Path, configs: Path) -> None:
    folder = write(tmp_path, configs)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 16_060_522_496}}))
    model = read_model(folder)
    assert model.loaded_bytes(None) == 16_060_522_496 and model.notes == ()
    assert model.loaded_bytes("float8_e4m3fn") < 10 * GIB
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 5_000_000_000}}))
    assert "the shapes give 14.96 GiB" in read_model(folder).notes[0]
    for wrong in ("16 GB", -5, 0, True, None, 1.5):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": wrong}}))
        with pytest.raises(ModelConfigError, match="total_size"):
            read_model(folder)


def test_a_checkpoint_in_one_file(tmp_path: Path, configs: Path) -> None:
    folder = write(tmp_path, configs)
    header = b'{"w":{"dtype":"BF16","shape":[512],"data_offsets":[0,1024]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1024))
    assert read_model(folder).loaded_bytes(None) == 1024


def test_quantized_checkpoints(tmp_path: Path, configs: Path) -> None:
    plain = read_model(configs / "llama-3.1-8b.json").loaded_bytes(None)
    known = [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.35),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 0.36),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.37),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 0.56),
        ({"quant_method": "fbgemm_fp8"}, 0.56),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}}, 0.56),
    ]
    for config, share in known:
        assert read_model(write(tmp_path, configs, quantization_config=config)).loaded_bytes(None) == pytest.approx(
            share * plain, rel=0.03
        )
    folder = write(tmp_path, configs, quantization_config={"quant_method": "magic"})
    unknown = read_model(folder)
    with pytest.raises(ConfigError, match=r"magic.*--weights-dtype"):
        unknown.loaded_bytes(None)
    assert unknown.loaded_bytes("float8_e4m3fn") == read_model(configs / "llama-3.1-8b.json").loaded_bytes(
        "float8_e4m3fn"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 4 * GIB}}))
    assert read_model(folder).loaded_bytes(None) == 4 * GIB


def test_unknown_architectures_say_what_to_pass_by_hand(tmp_path: Path, configs: Path) -> None:
    folder = write(tmp_path, configs, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(ModelConfigError, match="MambaForCausalLM is not known") as caught:
        read_model(folder)
    assert caught.value.missing == ["layers", "kv-heads", "head-dim", "weights", "max-length"]
    assert '--params "layers=.. kv-heads=..' in str(caught.value)
    assert read_model(write(tmp_path, configs, architectures=None)).name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 7}, "contradiction"),
        ({"hidden_size": 4095}, "no multiple of num_attention_heads"),
        ({"hidden_size": -4096}, "at least 1"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_hidden_layers": 10**7}, "absurd"),
        ({"num_hidden_layers": 10**15}, "absurd"),
        ({"num_hidden_layers": "32"}, "must be an integer"),
        ({"num_hidden_layers": True}, "must be an integer"),
        ({"attention_bias": "no"}, "true or false"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"torch_dtype": "float7"}, "float7"),
        ({"quantization_config": "fp8"}, "quantization_config"),
    ],
)
def test_fields_that_cannot_be_are_refused(tmp_path: Path, configs: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelConfigError, match=text):
        read_model(write(tmp_path, configs, **changes))


def test_more_contradictions(tmp_path: Path, configs: Path) -> None:
    with pytest.raises(ModelConfigError, match="first_k_dense_replace"):
        read_model(write(tmp_path, configs, "deepseek-v3", first_k_dense_replace=99))
    with pytest.raises(ModelConfigError, match="text_config"):
        read_model(write(tmp_path, configs, "gemma-3-4b", text_config=3))
    with pytest.raises(ModelConfigError, match="text_config: num_hidden_layers is missing"):
        read_model(write(tmp_path, configs, "gemma-3-4b", text_config={}))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00"])
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelConfigError, match="JSON"):
        read_model(tmp_path)
    with pytest.raises(ModelConfigError, match="cannot be read"):
        read_model(tmp_path / "nothing.json")


def test_a_model_by_hand() -> None:
    model = model_by_hand(["layers=32,kv-heads=8", "head-dim=128 weights=15GiB max-length=131072"])
    assert (model.token_bytes(), model.loaded_bytes(None), model.max_length) == (131_072, 15 * GIB, 131_072)
    assert model.splits_over(8) and not model.splits_over(3)
    with pytest.raises(ConfigError, match="number of parameters"):
        model.loaded_bytes("float8_e4m3fn")
    latent = model_by_hand(["layers=61 latent-dim=576 query-heads=128 parameters=671B dtype=float8_e4m3fn"])
    assert (latent.token_bytes(), latent.loaded_bytes(None)) == (70_272, 671 * 10**9)
    assert latent.loaded_bytes("bfloat16") == 2 * 671 * 10**9


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "layers=32",
        "layers=32 kv-heads=8 head-dim=128",
        "layers=32 kv-heads=8 head-dim=128 weights=-5GiB",
        "layers=32 kv-heads=8 head-dim=128 weights=0.5",
        "layers=0 kv-heads=8 head-dim=128 weights=1GiB",
        "layers=1e3 kv-heads=8 head-dim=128 weights=1GiB",
        "layers=99999999999 kv-heads=8 head-dim=128 weights=1GiB",
        "layers=32 kv-heads=8 head-dim=128 parameters=lots",
        "layers=32 kv-heads=8 head-dim=128 parameters=0B",
        "layers=32 kv-heads=8 head-dim=128 weights=1GiB color=red",
        "layers=32 layers=33 kv-heads=8 head-dim=128 weights=1GiB",
        "layers=32 kv-heads=8 latent-dim=576 weights=1GiB",
        "layers kv-heads=8 head-dim=128 weights=1GiB",
        "layers=32 kv-heads=8 head-dim=128 weights=1GiB dtype=bits",
    ],
)
def test_numbers_by_hand_that_cannot_be(wrong: str) -> None:
    with pytest.raises(ConfigError):
        model_by_hand([wrong])
