"""`rayk bench --forward hf`: a real model serves the workloads, and its cache does what an independent one would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayk.bench.hf import fitted, model_shape
from rayk.cli.main import main
from rayk.errors import CheckpointError, ConfigError
from rayk.workloads.generators import GENERATORS

from ..unit.models.checkpoints import write  # noqa: TID252  # tests/ is no package that has an absolute name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1)


@pytest.fixture
def bench(folder: Path, capsys: pytest.CaptureFixture[str]):
    def run(*flags: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        common = ["--forward", "hf", "--model", str(folder), "--runtime", "inline", "--page-size", "16"]
        code = main(["bench", *common, "--format", "json", *flags])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return run


def test_one_request_at_a_time_hits_what_an_infinite_cache_would(bench) -> None:
    """Prompts quote what the model really answered, or its answers' pages would never be hit."""
    code, result, err = bench(
        "--workload", "chat", "--requests", "25", "--replicas", "1", "--concurrency", "1", "--pages", "2000"
    )
    assert code == 0, err
    assert result["requests"] == {"submitted": 25, "completed": 25, "failed": 0, "preempted": 0, "retried": 0}
    assert result["hit_rate"]["measured"] == result["hit_rate"]["infinite"] > 0.02
    assert result["tokens"]["prompt"] == result["tokens"]["cached"] + result["tokens"]["computed"]
    assert {"ttft", "itl", "e2e"} <= set(result["latency"]) and result["latency"]["ttft"]["p50"] > 0
    assert result["throughput"]["generated_tokens_per_s"] > 0
    assert result["replicas"][0]["peak_used_pages"] > 0 and "verify" not in result
    assert result["config"]["forward"] == "hf" and result["config"]["head_dim"] == 8


def test_scarce_pages_and_two_replicas(bench) -> None:
    code, result, _ = bench("--workload", "random", "--requests", "16", "--concurrency", "8", "--pages", "70")
    assert code == 0
    assert result["requests"]["completed"] == 16 and result["hit_rate"]["measured"] == 0
    assert sum(replica["requests"] for replica in result["replicas"]) == 16
    assert result["tokens"]["recomputed"] >= 0


def test_requests_that_arrive_and_users_who_think(bench, tmp_path: Path) -> None:
    """Open loop, and a sweep over how fast: each run lasts as long as its arrivals do."""
    load = ["--workload", "chat", "--requests", "8", "--replicas", "1", "--pages", "400"]
    code, found, err = bench(*load, "--sweep", "speed=40,80", "--slo-ttft", "30s", "--out", str(tmp_path / "s"))
    assert code == 0, err
    slow, fast = found["results"]
    assert found["flag"] == "speed" and slow["elapsed"] > 1.2 * fast["elapsed"] > 0
    assert slow["requests"]["completed"] == 8 and slow["goodput"]["share"] == 1.0
    assert (tmp_path / "s" / "speed-40" / "report.html").exists() and (tmp_path / "s" / "scaling.png").exists()
    code, found, err = bench(*load, "--think-time", "0.001", "--concurrency", "2")
    assert code == 0 and found["requests"]["completed"] == 8, err


def test_tiers_keep_what_the_device_has_no_room_for(bench, tmp_path: Path) -> None:
    """What an infinite cache would hit is hit, most of it from the tiers; another run on the folder hits more."""
    scarce = ["--workload", "chat", "--requests", "25", "--replicas", "1", "--concurrency", "1", "--pages", "64"]
    tiers = ["--host-memory", "128KiB", "--disk-dir", str(tmp_path / "disk"), "--disk-memory", "64MiB"]
    code, first, err = bench(*scarce, *tiers)
    assert code == 0, err
    by_tier = first["hit_rate"]["by_tier"]
    assert first["hit_rate"]["measured"] == first["hit_rate"]["infinite"] > 0.02
    assert by_tier["disk"] > 0 and sum(by_tier.values()) == pytest.approx(first["hit_rate"]["measured"])
    assert first["tiers"]["disk_written"] > 0 and first["tiers"]["failed_loads"] == 0
    code, second, _ = bench(*scarce, *tiers)
    assert code == 0 and second["hit_rate"]["measured"] > first["hit_rate"]["measured"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forward", "verify"], "--forward hf needs --model"),
        (["--model", "/nowhere"], "does not exist"),
        (["--pages", "1"], "--pages"),
        (["--host-memory", "100"], "one page takes"),
        (["--disk-memory", "1MiB"], "--disk-dir and --disk-memory go together"),
    ],
)
def test_bad_usage(bench, flags: list[str], message: str) -> None:
    code, result, err = bench(*flags, "--requests", "5")
    assert code == 2 and result is None and message in err


def test_shapes_and_lengths(folder: Path, tmp_path: Path) -> None:
    shape = model_shape(folder)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.dtype, shape.length) == (1, 2, 8, "float32", 1024)
    workload = fitted(lambda scale: GENERATORS["chat"](30, seed=0, scale=scale), 500)
    assert 100 < workload.longest <= 500
    with pytest.raises(ConfigError, match="no request"):
        fitted(lambda scale: GENERATORS["chat"](30, seed=0, scale=scale), 1)
    with pytest.raises(CheckpointError):
        model_shape(tmp_path)
