"""The overhead's formula against what public start-up logs say is left for the cache."""

from pathlib import Path
from typing import Any

import pytest

from rayk.planning.gpus import parse_gpu
from rayk.planning.manual_model import model_by_hand
from rayk.planning.model import Model
from rayk.planning.overhead import estimate
from rayk.planning.plan import MemoryPlan, plan_replica
from rayk.planning.reading import read_model
from rayk.planning.settings import STATIC, PlanSettings

GIB = 1 << 30
MANY = 1024  # requests at once, vLLM's default from 0.9 on for GPUs of 70 GiB and more


def plan(model: Model, gpu: str, **settings: Any) -> MemoryPlan:
    set_up = PlanSettings(page_size=16, **settings)
    return plan_replica(model, set_up, [parse_gpu(gpu)] * set_up.gpus)


def test_llama_70b_in_float8_on_an_h200(configs: Path) -> None:
    """llm-d-benchmark#345: vLLM 0.9 has room for 174,336 tokens."""
    model = read_model(configs / "llama-3.1-70b.json")
    found = plan(model, "h200", weights_dtype="float8_e4m3fn", kv_dtype="bfloat16", max_batch_size=MANY)
    assert found.tokens == pytest.approx(174_336, rel=0.05)


def test_qwen3_235b_in_float8_on_four_h100(configs: Path) -> None:
    """vllm#21348: vLLM has room for 178,880 tokens; SGLang at 0.93, activations outside of that, for 367,404."""
    model = read_model(configs / "qwen3-235b-a22b.json")
    eight = {"tp": 4, "weights_dtype": "float8_e4m3fn", "kv_dtype": "bfloat16"}
    assert plan(model, "h100", max_batch_size=MANY, **eight).tokens == pytest.approx(178_880, rel=0.05)
    static = plan(model, "h100", utilization=0.93, activation_reserve=STATIC, **eight)
    assert static.tokens == pytest.approx(367_404, rel=0.05)


def test_llama_8b_on_a_3090_with_one_long_forward(configs: Path) -> None:
    """vllm#10517: 23,648 tokens when the largest forward has 29,000, so that no such request fits."""
    model = read_model(configs / "llama-3.1-8b.json")
    found = plan(model, "rtx-3090", max_batch_tokens=29_000, max_length=29_000)
    assert found.tokens == pytest.approx(23_648, rel=0.05) and not found.fits
    shorter = plan(model, "rtx-3090", max_batch_tokens=20_000, max_length=20_000)
    assert shorter.tokens == pytest.approx(1952 * 16, rel=0.05) and shorter.fits


def test_deepseek_r1_on_eight_h200(configs: Path) -> None:
    """aisimulate#263: SGLang at 0.82 has room for about 509,000 tokens."""
    model = read_model(configs / "deepseek-v3.json")
    found = plan(model, "h200", tp=8, utilization=0.82, activation_reserve=STATIC)
    assert found.tokens == pytest.approx(509_000, rel=0.05)


def test_qwen_14b_on_two_4090() -> None:
    """vllm#13061: at 0.98, and forwards of 2,048 tokens, 81,536 tokens; 131,072 are refused."""
    shape = "layers=48 kv-heads=8 head-dim=128 query-heads=40 parameters=14.77B"
    by_hand = plan(
        model_by_hand([shape]), "rtx-4090", tp=2, utilization=0.98, max_batch_tokens=2048, max_length=131_072
    )
    assert by_hand.tokens == pytest.approx(81_536, rel=0.05) and not by_hand.fits


def test_a_group_with_attention_of_its_own_holds_whole_latents(configs: Path) -> None:
    """sglang#6017: DeepSeek-R1 with data-parallel attention, 161,488 tokens in 10.57 GiB of each GPU."""
    model = read_model(configs / "deepseek-v3.json")
    found = plan(model, "h200", tp=16, attention_dp=16)
    [page] = {device.kv_cache // (found.pages // 16 + 1) for device in found.devices}
    assert 161_488 * page / 16 / GIB == pytest.approx(10.57, abs=0.005)
    assert found.groups == 16 and any("16 groups" in note for note in found.notes)


def test_caches_of_gpt_oss_and_qwen3_coder(configs: Path) -> None:
    """hf-mem#70: 12.00 GiB for 32 x 8,192 tokens; vllm#34076: 24.0 GiB for 262,144."""
    for name, tokens, size in (("gpt-oss-20b", 32 * 8192, 12.0), ("qwen3-30b-a3b", 262_144, 24.0)):
        assert read_model(configs / f"{name}.json").token_bytes("bfloat16") * tokens / GIB == pytest.approx(
            size, rel=0.01
        )


def test_activations_as_asked_for() -> None:
    """modular#6268: 4 x 21 GiB, 16 of weights in all and 5 of activations on each leave 39.6 GiB at 0.9."""
    model = model_by_hand(["layers=64 kv-heads=8 head-dim=128 weights=16GiB"])
    found = plan(model, "21GiB", tp=4, activation_reserve=5 * GIB)
    assert sum(d.kv_cache for d in found.devices) / GIB == pytest.approx(39.6, rel=0.05)


def test_it_is_never_nothing_and_says_why(configs: Path) -> None:
    model = read_model(configs / "llama-3.1-8b.json")
    for settings in (PlanSettings(), PlanSettings(max_batch_tokens=1), PlanSettings(activation_reserve=STATIC)):
        found = estimate(model, settings, 80 * GIB)
        assert found.total > GIB // 2 and "CUDA context" in found.reason
    assert "8,192 tokens (estimated)" in estimate(model, PlanSettings(max_batch_size=8), 80 * GIB).reason
    assert "256 requests (estimated)" in estimate(model, PlanSettings(), 80 * GIB).reason
    assert "(measured)" in estimate(model, PlanSettings(measured_activations=5), 80 * GIB).reason
