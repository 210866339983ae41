"""Counting what is live, torch's peak on CUDA by a stand-in, and measurements that are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk.errors import ConfigError
from rayk.planning.measure import CountedPeak, CudaPeak, Measurements, measure_activations
from rayk.planning.node_plan import Component
from rayk.planning.settings import PlanSettings


def test_live_storages_are_counted() -> None:
    given = torch.zeros(1000, dtype=torch.uint8)
    with CountedPeak() as peak:
        a = given + 1
        b = a.view(10, 100)
        del a
        c = b + 1
        assert peak.num_bytes == 2000
        del b, c
        given + 2
        given.add_(1)
    assert peak.num_bytes == 2000


def test_the_peak_of_cuda_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def says(name: str, value: Any = None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda device: (calls.append(name), value)[1])

    says("synchronize")
    says("reset_peak_memory_stats")
    says("memory_allocated", 300)
    says("max_memory_allocated", 1000)
    with CudaPeak(torch.device("cuda:0")) as peak:
        assert calls == ["synchronize", "reset_peak_memory_stats", "memory_allocated"]
    assert peak.num_bytes == 700 and calls[3:] == ["synchronize", "max_memory_allocated"]


def test_measurements_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.json"
    Measurements(path).put("a", 5)
    Measurements(path).put("b", 6)
    assert (Measurements(path).get("a"), Measurements(path).get("b"), Measurements(path).get("c")) == (5, 6, None)
    for damaged in ("{", "[1]", json.dumps({"a": "5"})):
        path.write_text(damaged)
        assert Measurements(path).get("a") is None


def test_what_cannot_be_measured_says_so(tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA device"):
        measure_activations(configs / "llama-3.1-8b.json", PlanSettings(), Measurements(tmp_path / "a"))
    with pytest.raises(ConfigError, match="one GPU"):
        measure_activations(configs / "llama-3.1-8b.json", PlanSettings(tp=2), Measurements(tmp_path / "a"))


def test_a_component_that_is_off_is_named() -> None:
    assert not Component("weights", 1000, 1030).is_off and not Component("pages", 1000, 971).is_off
    found = Component("weights", 1000, 1031)
    assert found.is_off and str(found).startswith("weights: 1031 bytes taken, 1000 planned (+3.1")
    assert Component("pages", 1000, 960).is_off and "nothing was planned" in str(Component("weights", 0, 5))
