"""`rayk plan`: exit codes, the JSON object, the tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from rayk.cli import plan as command
from rayk.cli.flags import command_of
from rayk.cli.plan_flags import PlanFlags, _cache_dtypes, _gpu_names, _weight_dtypes
from rayk.errors import ConfigError
from rayk.planning.errors import ModelConfigError
from rayk.planning.node_plan import DeviceMemory, NodeMemory

GIB = 1 << 30
PINNED = [
    "weights", "activations", "signal_buffers", "kv_cache", "free", "pages", "page_bytes", "token_bytes", "tokens",
    "max_sequence_length", "max_batch_size",
]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command_of(PlanFlags, "rayk.cli.plan:plan"))
    code = app(args=list(argv), standalone_mode=False)
    return code, capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    code, out = run(capsys, *argv, "--format", "json")
    assert out.count("\n") == 1
    return code, json.loads(out)


@pytest.fixture
def llama(configs: Path) -> list[str]:
    return ["--config", str(configs / "llama-3.1-8b.json")]


def test_json_has_the_pinned_keys_and_adds_up(capsys: pytest.CaptureFixture[str], llama: list[str]) -> None:
    code, found = as_json(capsys, *llama, "--gpu", "h100", "--tp", "2", "--dp", "2", "--activation-reserve", "1GiB")
    replica = found["per_replica"]
    assert code == 0 and found["fits"] is True and found["suggestions"] == []
    assert list(replica)[: len(PINNED)] == PINNED and all(isinstance(replica[key], int) for key in PINNED)
    parts = ("weights", "activations", "signal_buffers", "kv_cache", "free")
    assert sum(replica[key] for key in parts) == replica["memory"] == 2 * 81_559 << 20
    assert replica["activations"] == 2 * GIB and replica["tokens"] == 128 * replica["pages"]
    assert replica["kv_cache"] == (replica["pages"] + 1) * replica["page_bytes"]
    [machine] = found["nodes"]
    assert [r["gpus"] for r in machine["replicas"]] == [[0, 1], [2, 3]]


def test_what_does_not_fit_is_exit_code_1_with_advice_that_holds(
    capsys: pytest.CaptureFixture[str], llama: list[str]
) -> None:
    tight = [*llama, "--gpu", "16GiB"]
    code, found = as_json(capsys, *tight)
    assert code == 1 and found["fits"] is False and found["problems"] and found["per_replica"]["pages"] == 0
    assert {"tp": 2} in found["suggestions"] and len(found["suggestions"]) >= 3
    for suggestion in found["suggestions"]:
        flags = [f for name, value in suggestion.items() for f in (f"--{name.replace('_', '-')}", str(value))]
        assert as_json(capsys, *tight, *flags)[0] == 0, suggestion
    code, out = run(capsys, *tight)
    assert code == 1 and "It does not fit" in out and "fits with --tp 2" in out


def test_tables_for_people(capsys: pytest.CaptureFixture[str], configs: Path) -> None:
    code, out = run(capsys, "--config", str(configs / "gemma-3-27b.json"), "--gpu", "h200", "--tp", "2")
    assert code == 0 and "It fits." in out and "52 of 62 layers" in out
    bars = [line for line in out.splitlines() if line.startswith("h200 ")]
    assert len(bars) == 2 and all(bar.count("K") > bar.count("W") > 5 for bar in bars)
    assert "requests of 4,096 tokens at once" in out and "kept free (utilization 0.9)" in out


def test_a_sweep_compares_variants(capsys: pytest.CaptureFixture[str], llama: list[str]) -> None:
    argv = [*llama, "--gpu", "24GiB", "--sweep", "tp=1,3", "page-size=16,128"]  # unquoted, as people type it
    code, found = as_json(capsys, *argv)
    assert code == 0 and [v["settings"] for v in found["sweep"]] == [
        {"tp": tp, "page_size": size} for tp in (1, 3) for size in (16, 128)
    ]
    assert [v["fits"] for v in found["sweep"]] == [True, True, False, False]
    assert "do not split" in found["sweep"][2]["error"]
    assert found["sweep"][1]["per_replica"] == found["per_replica"]
    _, out = run(capsys, *argv)
    assert "no: tp=3, page-size=16:" in out


def test_a_model_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    params = "layers=32,kv-heads=8,head-dim=128,weights=15GiB,max-length=131072"
    code, found = as_json(
        capsys, "--params", params, "--gpu", "24GiB", "--utilization", "1.0", "--activation-reserve", "0"
    )
    replica = found["per_replica"]
    assert code == 0 and replica["pages"] == 9 * GIB // (16 << 20) - 1
    assert replica["max_sequence_length"] == replica["tokens"] < 131_072 and found["notes"]


def test_without_a_gpu_flag_this_machine_is_planned(
    capsys: pytest.CaptureFixture[str], llama: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceMemory(0, "A GPU", 80 * GIB, 60 * GIB)
    monkeypatch.setattr(command, "measure_node", lambda: NodeMemory("", "here", 0, 0, (gpu,)))
    code, found = as_json(capsys, *llama)
    assert code == 0 and found["per_replica"]["memory"] == 60 * GIB and found["nodes"][0]["node"] == "here"
    code, out = run(capsys, *llama, "--tp", "2")
    assert code == 1 and "a replica needs 2" in out.replace("\n", " ")
    monkeypatch.setattr(command, "measure_node", lambda: NodeMemory("", "here", 0, 0))
    with pytest.raises(ConfigError, match="--gpu h100"):
        run(capsys, *llama)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--gpu", "h100", "--from-cluster"],
        ["--gpu", "h100", "--address", "auto"],
        ["--gpu", "h100", "--params", "layers=1"],
        ["--gpu", "h100", "stray"],
        ["--gpu", "h100", "--tp", "3"],
        ["--gpu", "h100", "--utilization", "0"],
        ["--gpu", "h100", "--activation-reserve", "-1GiB"],
        ["--gpu", "h100", "--sweep", "color=1,2"],
        ["--gpu", "h100", "--sweep", "tp=two"],
        ["--gpu", "h100", "--sweep", "tp="],
        ["--gpu", "h100", "--sweep", "page-size=" + ",".join(map(str, range(1, 300)))],
    ],
)
def test_bad_usage_is_an_error(capsys: pytest.CaptureFixture[str], llama: list[str], wrong: list[str]) -> None:
    with pytest.raises(ConfigError):
        run(capsys, *llama, *wrong)


def test_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--config"):
        run(capsys, "--gpu", "h100")
    with pytest.raises(ModelConfigError, match="cannot be read"):
        run(capsys, "--config", "no/such/config.json", "--gpu", "h100")


def test_planning_a_cluster_where_none_answers(capsys: pytest.CaptureFixture[str], llama: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1"):
        run(capsys, *llama, "--from-cluster", "--address", "127.0.0.1:1")


def test_a_folder_by_position_and_a_machine_of_eight(
    capsys: pytest.CaptureFixture[str], configs: Path, tmp_path: Path
) -> None:
    raw = (configs / "llama-3.1-8b.json").read_text()
    (tmp_path / "config.json").write_text(raw)
    code, found = as_json(capsys, str(tmp_path), "--gpu", "8xh200", "--max-length", "128k")
    assert code == 0 and len(found["nodes"][0]["replicas"]) == 8 and found["settings"]["max_length"] == 131_072
    assert found["total"] == {
        "gpus": 8,
        "gpus_used": 8,
        "replicas": 8,
        "tokens": 8 * found["per_replica"]["tokens"],
        "max_batch_size": 8 * found["per_replica"]["max_batch_size"],
    }
    _, out = run(capsys, str(tmp_path), "--gpu", "8xh200")
    assert "all 8 replicas, 8 GPUs" in out and "It fits. 8 GPUs in all." in out
    assert "weights bfloat16; cache bfloat16" in out and "overhead: driver, CUDA context" in out
    assert as_json(capsys, str(tmp_path), "--gpu", "8xh200", "--tp", "4")[1]["settings"]["dp"] == 2


def test_drafts_stages_and_groups(capsys: pytest.CaptureFixture[str], configs: Path) -> None:
    draft = ["--draft", str(configs / "llama-3.2-1b.json")]
    code, found = as_json(
        capsys, str(configs / "llama-3.1-70b.json"), *draft, "--gpu", "h200", "--tp", "2", "--pp", "2"
    )
    assert code == 0 and found["model"]["draft"] == "LlamaForCausalLM" and found["total"]["gpus"] == 4
    assert found["per_replica"]["token_bytes"] == 327_680 + 32_768
    argv = [str(configs / "deepseek-v3.json"), "--gpu", "8xh200", "--tp", "8", "--attention-dp", "8"]
    code, found = as_json(capsys, *argv)
    assert code == 0 and found["per_replica"]["groups"] == 8 and found["per_replica"]["token_bytes_per_gpu"] == 70_272
    code, found = as_json(capsys, str(configs / "deepseek-v3.json"), "--gpu", "h200", "--tp", "8", "--mla", "expanded")
    assert found["per_replica"]["token_bytes"] == 5_996_544


def test_a_batch_that_cannot_all_be_long_is_noted(capsys: pytest.CaptureFixture[str], configs: Path) -> None:
    argv = ["--gpu", "l4", "--tp", "4", "--max-length", "40960", "--max-batch-size", "8"]
    code, out = run(capsys, str(configs / "qwen3-32b.json"), *argv)
    assert code == 0 and "8 requests of 40,960 tokens do not fit at once: 1 does" in out


def test_a_sweep_is_read_at_80_columns(
    capsys: pytest.CaptureFixture[str], llama: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    axes = ["tp=1,2", "page-size=16,128", "kv-dtype=bfloat16,float8_e4m3fn", "max-length=128k"]
    _, out = run(capsys, *llama, "--gpu", "h100", "--sweep", *axes)
    lines = out[out.index("Variants") :].splitlines()
    rows = [line for line in lines if line.rstrip().endswith(("yes", "no"))]
    assert len(rows) == 8 and all(len(line.rstrip()) <= 80 for line in rows)
    assert "max-length=131072" in lines[0] + lines[1] and all(
        "float8_e4m3fn" in row or "bfloat16" in row for row in rows
    )


def test_a_shell_completes_names() -> None:
    assert "h200" in _gpu_names("h2") and _gpu_names("H100") == ["h100-pcie", "h100", "h100-nvl"]
    assert "nvfp4" in _weight_dtypes("nv") and _cache_dtypes("float8") == ["float8_e4m3fn", "float8_e5m2"]
