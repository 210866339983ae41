"""Ratios are those of the rows that rayk simulate prints."""

import json

import pytest

from rayk.simulate.model import Case, Simulator
from rayk.simulate.ratios import main, ratios
from rayk.workloads.generators import documents


def test_ratios_are_those_of_the_rows() -> None:
    work = documents(400, seed=2, scale=0.2)
    found = ratios(work, 4, 90_000, 0.7, 128, seeds=1)
    simulator = Simulator(work, 128, 0)
    rows = {}
    for router in ("cost", "round-robin"):
        case = Case(replicas=4, capacity=90_000, policy="lru", router=router)
        rows[router] = simulator.run(case, simulator.rate(case, 0.7))
    assert found.hits == rows["cost"].hit_rate / rows["cost"].pooled and found.imbalance == rows["cost"].imbalance
    assert found.p90_round_robin == rows["cost"].ttft.p90 / rows["round-robin"].ttft.p90
    assert found.replicas == 4 and found.mean_better >= found.mean_least_loaded - 1e-12


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--workload", "chat", "--requests", "60", "--replicas", "1,2", "--seeds", "2"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "replicas" and lines[2].split()[:2] == ["1", "1.000"] and len(lines) == 4
    assert main([*argv, "--format", "json"]) == 0
    assert [row["replicas"] for row in json.loads(capsys.readouterr().out)] == [1, 2]
    assert main(["--workload", "poetry"]) == 2 and "poetry" in capsys.readouterr().err
