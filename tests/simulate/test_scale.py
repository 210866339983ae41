"""The scale harness on a small load: it decides for real, and its figures hang together."""

import json

import pytest

from rayk.simulate.scale import Load, carry, main


def test_a_small_load() -> None:
    carried = carry(Load(replicas=20, rate=500.0, requests=400, pages=400))
    assert 0 < carried.decision_p50_us <= carried.decision_p99_us <= carried.decision_max_us
    assert carried.ingest_pages_per_s > 10_000 and carried.busy > 0
    assert 20 * 300 < carried.entries <= 20 * 400
    assert carried.imbalance < 2


def test_cost_finds_what_round_robin_does_not() -> None:
    found = {
        router: carry(Load(replicas=20, rate=500.0, requests=400, pages=2000, router=router)).hit_rate
        for router in ("cost", "round-robin")
    }
    assert found["cost"] > 1.3 * found["round-robin"]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--replicas", "4", "--requests", "50", "--pages", "200"]
    assert main(argv) == 0 and "decision_p99_us" in capsys.readouterr().out
    assert main([*argv, "--format", "json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["load"]["replicas"] == 4 and out["carried"]["entries"] > 0
