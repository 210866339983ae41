"""Layouts of replicas over GPUs: shards beyond the KV heads, stages, groups, drafts; counts of GPUs in all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayk.errors import ConfigError
from rayk.planning.gpus import named_gpu, parse_gpu, parse_gpus
from rayk.planning.model import CachedLayers, Model, State
from rayk.planning.plan import MemoryPlan, plan_replica, shards
from rayk.planning.plan_request import PlanQuestion
from rayk.planning.reading import read_model
from rayk.planning.settings import PlanSettings
from rayk.planning.weights import Kind, layer_of

GIB = 1 << 30
H200 = parse_gpu("h200")


def plan(model: Model, **settings: Any) -> MemoryPlan:
    set_up = PlanSettings(activation_reserve=0, **settings)
    return plan_replica(model, set_up, [H200] * set_up.gpus)


def test_kv_heads_are_copied_where_there_are_fewer_than_shards(configs: Path) -> None:
    model = read_model(configs / "qwen3-235b-a22b.json")
    four, eight = plan(model, tp=4), plan(model, tp=8)
    assert four.token_bytes == 192_512 and eight.token_bytes == 8 * 48_128
    assert eight.devices[0].kv_cache // (eight.pages + 1) == 48_128 * 128
    assert any("4 KV heads is on 2 GPUs" in note for note in eight.notes)
    with pytest.raises(ConfigError, match="do not split over tp=3"):
        plan(model, tp=3)


def test_stages_have_their_layers_and_ends(configs: Path) -> None:
    model = read_model(configs / "llama-3.1-8b.json")
    assert model.weights is not None
    parts = shards(model, PlanSettings(pp=4, activation_reserve=0))
    layer = sum(m.size for m in model.weights.modules if layer_of(m) == 0)
    ends = {m.kind: m.size for m in model.weights.modules if layer_of(m) is None}
    for stage, part in enumerate(parts):
        own = 8 * layer + (ends[Kind.embedding] + 4096) * (stage == 0) + ends[Kind.head] * (stage == 3)
        assert part.weights == pytest.approx(2 * own, rel=1e-6)
        assert part.page == 8 * 4096 * 128
    whole = plan(model, pp=4)
    assert whole.token_bytes == 131_072 and whole.pages > 4 * plan(model).pages
    with pytest.raises(ConfigError, match="fewer than pp=33"):
        plan(model, pp=33)


def test_groups_have_attention_and_pages_of_their_own(configs: Path) -> None:
    model = read_model(configs / "deepseek-v3.json")
    together, apart = plan(model, tp=8), plan(model, tp=8, attention_dp=8)
    assert together.token_bytes == 8 * 70_272 and apart.token_bytes == 70_272
    assert apart.groups == 8 and apart.pages % 8 == 0 and apart.pages > 6 * together.pages
    attention = 8 * together.devices[0].weights
    assert attention < sum(d.weights for d in apart.devices) < 1.3 * attention
    assert apart.requests_of(128) == apart.pages and apart.max_sequence_length <= apart.tokens // 8


def test_a_draft_has_weights_and_pages_too(configs: Path) -> None:
    model, small = read_model(configs / "llama-3.1-70b.json"), read_model(configs / "llama-3.2-1b.json")
    both = replace(model, draft=small)
    assert both.token_bytes() == model.token_bytes() + small.token_bytes()
    assert both.loaded_bytes(None) == model.loaded_bytes(None) + small.loaded_bytes(None)
    assert plan(both, tp=8).fits and any("32,768 bytes" in note for note in plan(both, tp=8).notes)


def test_a_sequence_has_its_state_in_pages(configs: Path) -> None:
    model = read_model(configs / "llama-3.1-8b.json")
    hybrid = replace(model, state=State(0, 10 << 20))  # 40 MiB of pages of 16
    found = plan(hybrid)
    assert found.state_pages == 3 and found.requests_of(128) == found.pages // 4
    assert plan(hybrid, max_batch_size=2).fits
    tiny = plan_replica(hybrid, PlanSettings(activation_reserve=0, utilization=1.0), [parse_gpu(str(16_110_000_000))])
    assert not tiny.fits and "recurrent state" in tiny.problems[0]


def test_layers_of_several_shapes_are_summed_and_have_no_params() -> None:
    layers = (CachedLayers((0, 2), 4, 128, 64), CachedLayers((1,), 1, 512, 0, latent=True, expanded=(8, 192)))
    model = Model(name="mixed", cached=layers, num_layers=3, stored_bytes=GIB)
    assert model.token_bytes("bfloat16") == 2 * (2 * 4 * 192 + 512)
    assert model.expanded().token_bytes("bfloat16") == 2 * 3 * 2 * 8 * 192  # pages have one shape: the widest
    with pytest.raises(ConfigError, match="different shapes"):
        model.kv_params(tp=1, page_size=16, kv_dtype="bfloat16")


def test_imagined_nodes_have_eight_gpus(configs: Path) -> None:
    model = read_model(configs / "llama-3.1-8b.json")

    def sizes(count: int | None = None, **settings: int) -> list[int]:
        question = PlanQuestion(model, PlanSettings(**settings), H200, count=count)
        return [len(node.gpus) for node in question.machine()]

    assert sizes(tp=2, dp=2) == [4] and sizes(dp=16) == [8, 8] and sizes(tp=4, dp=3) == [8, 4]
    assert sizes(tp=16) == [16] and sizes(count=8) == [8] and sizes(count=12, tp=2) == [8, 4]
    whole = PlanQuestion(model, PlanSettings(dp=16), H200).plan()
    assert whole.fits and {replica.node_id for replica in whole.replicas} == {"0", "1"}
    short = PlanQuestion(model, PlanSettings(dp=9), H200, count=8).answer()
    assert short.plan.problems[0] == "9 replica(s) asked for, 8 fit" and short.suggestions[0].changes == (("dp", 8),)


def test_advice_names_the_gpus_in_all(configs: Path) -> None:
    model = read_model(configs / "llama-3.1-70b.json")
    answer = PlanQuestion(model, PlanSettings(dp=2), parse_gpu("h100")).answer()
    assert not answer.fits
    by_tp = {dict(r.changes)["tp"]: r.gpus for r in answer.suggestions if "tp" in dict(r.changes)}
    assert by_tp and all(gpus == 2 * tp for tp, gpus in by_tp.items())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("RTX4090", "rtx-4090"),
        ("3090", "rtx-3090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_as_nvidia_smi_prints_them(text: str, name: str) -> None:
    found = named_gpu(text)
    assert found is not None and found.name == name


def test_counts_of_gpus() -> None:
    assert parse_gpus("8xh200") == parse_gpus("8 x NVIDIA H200") == (H200, 8)
    assert parse_gpus("h200") == (H200, None) and parse_gpus("2x24GiB")[0].total == 24 * GIB
    for wrong in ("0xh200", "9999xh200", "8xh", "x8"):
        with pytest.raises(ConfigError):
            parse_gpus(wrong)


def test_lengths_by_yarn_and_dtypes_by_the_file(tmp_path: Path, configs: Path) -> None:
    raw = json.loads((configs / "qwen3-32b.json").read_text())

    def written(**changes: Any) -> Model:
        (tmp_path / "config.json").write_text(json.dumps(raw | changes))
        return read_model(tmp_path)

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert written(rope_scaling=yarn).max_length == 131_072 and written().max_length == 40_960
    wide = written(torch_dtype="float32")
    assert wide.token_bytes() == 2 * written().token_bytes() and wide.cache_dtype(None, "bfloat16") == "bfloat16"


def test_which_layers_attend_is_never_guessed(tmp_path: Path) -> None:
    facts = {"hidden_size": 2688, "num_hidden_layers": 52, "num_attention_heads": 32, "num_key_value_heads": 2}
    raw = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "head_dim": 128, **facts}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="recurrent state"):
        read_model(tmp_path)
