"""Bytes of quantized checkpoints against sums by hand, and what a checkpoint asks of the cache."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rayk.planning.checkpoint import read_folder
from rayk.planning.reading import read_model

LINEAR, ENDS, NORMS = 6_979_321_856, 2 * 525_336_576, 266_240  # of the 8B Llama: layers; embeddings and head; norms
HEAD = ENDS // 2
REST = 2 * (ENDS + NORMS)
ATTENTION = 32 * 41_943_040
FIRST_MLP = 3 * 4096 * 14_336
DEFAULT = object()


def gigabytes(tmp_path: Path, configs: Path, field: str = "quantization_config", **files: Any) -> float:
    """Of the 8B Llama with these JSON files beside config.json, or with `inline` in it."""
    raw = json.loads((configs / "llama-3.1-8b.json").read_text())
    if "inline" in files:
        raw[field] = files.pop("inline")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return read_model(tmp_path).loaded_bytes(None)


def group(bits: int, **more: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "float", **more}}


def tensors(**more: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "ignore": ["lm_head"], **more}


INLINE: list[tuple[dict[str, Any], float]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, LINEAR * (4 + 20 / 128) / 8 + REST),
    (
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "lm_head": True},
        (LINEAR + HEAD) * 8.75 / 8 + REST - 2 * HEAD,
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*self_attn.*": {}}},
        (LINEAR - ATTENTION) * (4 + 20 / 128) / 8 + 2 * ATTENTION + REST,
    ),
    (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {r"+:.*\.mlp\.": {"bits": 8, "group_size": 64}},
        },
        (LINEAR - ATTENTION) * (8 + 24 / 64) / 8 + ATTENTION * (4 + 20 / 128) / 8 + REST,
    ),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["self_attn"]},
        (LINEAR - ATTENTION) * (4 + 20 / 64) / 8 + 2 * ATTENTION + REST,
    ),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, LINEAR * 4.5 / 8 + REST),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        LINEAR * (4 + 1 / 8 + 1 / 512) / 8 + REST,
    ),
    (
        {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"],
        },
        LINEAR - FIRST_MLP + 2 * FIRST_MLP + REST,
    ),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, LINEAR * (1 + 4 / 128**2) + REST),
    (
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["model.layers.0.mlp.up_proj"]},
        LINEAR + FIRST_MLP / 3 + REST,
    ),
    (tensors(format="float-quantized", config_groups={"a": group(8, strategy="tensor")}), LINEAR + REST),
    (tensors(format="nvfp4-pack-quantized", config_groups={"a": group(4, group_size=16)}), LINEAR * 4.5 / 8 + REST),
    (tensors(format="mxfp4-pack-quantized", config_groups={"a": group(4, group_size=32)}), LINEAR * 4.25 / 8 + REST),
    (
        tensors(
            format="pack-quantized",
            config_groups={
                "a": group(4, group_size=128) | {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}
            },
        ),
        LINEAR * (4 + 16 / 128) / 8 + REST,
    ),
    (
        tensors(
            config_groups={
                "a": group(8, strategy="tensor"),
                "b": group(4, group_size=16) | {"targets": ["re:.*mlp.*"]},
            },
            ignore=["re:.*lm_head", "re:.*self_attn.*"],
        ),
        (LINEAR - ATTENTION) * 4.5 / 8 + 2 * ATTENTION + REST,
    ),
    (tensors(config_groups={"FP8_DYNAMIC": ["Linear"]}), LINEAR + REST),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, LINEAR * 4.5 / 8 + REST),
    (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "model.layers.*.mlp": {"quant_algo": "NVFP4"},
                "model.layers.*.self_attn": {"quant_algo": "FP8"},
            },
        },
        (LINEAR - ATTENTION) * 4.5 / 8 + ATTENTION + REST,
    ),
    (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
        LINEAR * 4.5 / 8 + REST,
    ),
    (
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 128}}},
        },
        LINEAR * 4.25 / 8 + REST,
    ),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, LINEAR + REST),
    (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            "exclude": ["lm_head"],
        },
        LINEAR + REST,
    ),
    (
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "extra_config": {"model.layers.0.mlp": {"bits": 16}},
        },
        (LINEAR - FIRST_MLP) * (4 + 20 / 128) / 8 + 2 * FIRST_MLP + REST,
    ),
    ({"quant_method": "exl2", "bits": 4.25, "head_bits": 6}, LINEAR * 4.25 / 8 + HEAD * 6 / 8 + REST - 2 * HEAD),
    ({"quant_method": "eetq"}, LINEAR + REST),
    ({"quant_method": "mxfp4"}, 2 * LINEAR + REST),  # its experts alone, and it has none
]


@pytest.mark.parametrize(("config", "size"), INLINE)
def test_methods_in_the_config(tmp_path: Path, configs: Path, config: dict[str, Any], size: float) -> None:
    assert gigabytes(tmp_path, configs, inline=config) == pytest.approx(size, rel=0.002)


def test_mlx_quantizes_embeddings_too(tmp_path: Path, configs: Path) -> None:
    size = gigabytes(tmp_path, configs, "quantization", inline={"group_size": 64, "bits": 4})
    assert size == pytest.approx((LINEAR + ENDS) * 4.5 / 8 + 2 * NORMS, rel=0.001)
    mixed = {"group_size": 64, "bits": 4, "lm_head": False, "model.embed_tokens": {"bits": 8, "group_size": 64}}
    size = gigabytes(tmp_path, configs, "quantization", inline=mixed)
    assert size == pytest.approx(LINEAR * 4.5 / 8 + HEAD * 8.5 / 8 + 2 * HEAD, rel=0.001)


def test_files_beside_the_config(tmp_path: Path, configs: Path) -> None:
    modelopt = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    assert gigabytes(tmp_path, configs, hf_quant_config=modelopt) == pytest.approx(LINEAR + REST, rel=0.001)
    model = read_model(tmp_path)
    assert model.cache_dtype(None) == "float8_e4m3fn" and model.cache_dtype("bfloat16") == "bfloat16"
    (tmp_path / "hf_quant_config.json").unlink()
    legacy = {"bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.01}
    assert gigabytes(tmp_path, configs, quantize_config=legacy) == pytest.approx(
        LINEAR * (4 + 20 / 128) / 8 + REST, rel=0.001
    )
    (tmp_path / "quantize_config.json").unlink()
    awq = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    assert gigabytes(tmp_path, configs, quant_config=awq) == pytest.approx(
        LINEAR * (4 + 20 / 128) / 8 + REST, rel=0.001
    )


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (tensors(config_groups={"a": group(8)}, kv_cache_scheme={"num_bits": 8, "type": "float"}), "float8_e4m3fn"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "float8_e4m3fn"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, "bfloat16"),
        ({"quant_method": "gptq", "bits": 4}, "bfloat16"),
    ],
)
def test_the_checkpoint_names_the_dtype_of_the_cache(tmp_path: Path, configs: Path, config: Any, dtype: str) -> None:
    gigabytes(tmp_path, configs, inline=config)
    assert read_model(tmp_path).cache_dtype(None) == dtype


def test_experts_may_be_left_alone_one_by_one(tmp_path: Path, configs: Path) -> None:
    raw = json.loads((configs / "qwen3-30b-a3b.json").read_text())

    def size(**config: Any) -> int:
        raw["quantization_config"] = {"quant_method": "fp8", **config}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return read_model(tmp_path).loaded_bytes(None)

    whole = size()
    expert = 3 * raw["hidden_size"] * raw["moe_intermediate_size"]
    assert size(modules_to_not_convert=["model.layers.3.mlp.experts.7.down_proj"]) - whole == pytest.approx(
        expert / 3, rel=0.01
    )
    assert size(modules_to_not_convert=["model.layers.3.mlp.experts"]) - whole == 128 * expert
    assert size(modules_to_not_convert=["lm_head", "mlp.gate", "model.norm"]) == whole


def test_tensors_beside_the_config_decide(tmp_path: Path, configs: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 5_000_000_000}, "weight_map": {"a": "one.safetensors"}})
    )
    known = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert gigabytes(tmp_path, configs, inline=known) == 5_000_000_000  # the file itself is missing
    header = json.dumps({"__metadata__": {}, "a": {"dtype": "F16", "shape": [8], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "one.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    stored = read_folder(tmp_path).stored
    assert stored is not None and stored.num_bytes == 16 and stored.dtype == "float16"
    for damaged in (
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        struct.pack("<Q", 9) + b"[1, 2, 3]",
    ):
        (tmp_path / "one.safetensors").write_bytes(damaged)
        assert gigabytes(tmp_path, configs, inline={"quant_method": "magic"}) == 5_000_000_000


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "magic"},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "compressed-tensors", "config_groups": {"NEW": ["Linear"]}},
        {"quant_method": "modelopt", "quant_algo": "FP2"},
        {"quant_method": "quark", "global_quant_config": None, "layer_quant_config": {"a": {"weight": {"dtype": "x"}}}},
        {"load_in_2bit": True},
    ],
)
def test_what_cannot_be_judged_is_unknown_until_a_dtype_is_named(tmp_path: Path, configs: Path, config: Any) -> None:
    raw = json.loads((configs / "llama-3.1-8b.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = read_model(tmp_path)
    with pytest.raises(ValueError, match="--weights-dtype"):
        model.loaded_bytes(None)
    assert model.loaded_bytes("nvfp4") == pytest.approx(LINEAR * 4.5 / 8 + REST, rel=0.001)
