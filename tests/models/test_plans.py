"""What `load_model` takes, `plan` takes, with the same bytes of a token; over all causal models of transformers.

The models are tiny and random; whether one runs on pages is decided by the functions that load_model calls.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rayk.errors import ArchitectureError, ConfigError
from rayk.kvcache.buffers import PageBuffers
from rayk.models import architecture, load_model
from rayk.models.bridge import register
from rayk.planning.errors import ModelConfigError
from rayk.planning.measure import Measurements, measure_activations
from rayk.planning.node_plan import Component, DeviceMemory
from rayk.planning.overhead import estimate
from rayk.planning.plan import plan_replica
from rayk.planning.reading import read_model
from rayk.planning.settings import PlanSettings

from ..unit.models.checkpoints import write  # noqa: TID252  # tests/ is no package that has an absolute name
from .architectures import causal, tiny

LARGEST = 5_000_000  # parameters
RUNS_AGAIN = ("HrmTextConfig",)  # it goes through its layers several times, and the plan counts them once
AT_LEAST = 112  # those that load_model takes of transformers 5.23, of those that become tiny


def verdict(model_class: Any, config: Any) -> dict[int, Any] | None:
    """Shapes of the layers if rayk's runner takes the model; None if it refuses it."""
    text = config.get_text_config(decoder=True)
    try:
        architecture.refuse_by_config(text, model_class)
        with torch.device("meta"):
            if sum(p.numel() for p in model_class(config).parameters()) > LARGEST:
                raise ValueError("not small")
        model = model_class(config).eval().requires_grad_(False)
        architecture.freeze_rope(model)
        way, _ = architecture.way_of(model, text)
    except ArchitectureError:
        return None
    return way.shapes


def test_plan_takes_what_load_model_takes(tmp_path: Path) -> None:
    register()
    transformers.logging.set_verbosity_error()
    taken, wrong = [], {}
    for config_class, model_class in causal():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of config classes with odd values
            try:
                config = tiny(config_class)
                shapes = verdict(model_class, config)
            except Exception:  # no tiny model can be made in this simple way
                continue
        if shapes is None:
            continue
        raw = json.loads(config.to_json_string(use_diff=False)) | {"dtype": "float32"}
        if "num_layers" in raw:  # a file has one of the two names
            raw.pop("num_hidden_layers", None)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        name = config_class.__name__
        taken.append(name)
        try:
            model = read_model(tmp_path).served()
        except ModelConfigError as error:
            wrong[name] = str(error)
            continue
        heads, dim = (max(each) for each in zip(*((s.kv_heads, s.head_dim) for s in shapes.values()), strict=True))
        kept = {s.latent for s in shapes.values()}
        token = (1 if kept == {True} else 2) * len(shapes) * heads * dim * 4
        if name in RUNS_AGAIN:
            token = model.token_bytes()
        if model.token_bytes() != token or model.refused is not None:
            wrong[name] = f"{model.token_bytes()} bytes planned, {token} used; {model.refused}"
    assert not wrong, wrong
    assert len(taken) >= AT_LEAST, taken


TEN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "opt",
    "deepseek-v3",
    "gpt-oss",
)


@pytest.mark.parametrize("name", TEN)
def test_a_plan_is_what_is_allocated(tmp_path: Path, name: str) -> None:
    """Weights as loaded and pages as allocated, against the plan of the same folder."""
    folder = write(tmp_path, name)
    planned = read_model(folder)
    gpu = DeviceMemory(0, "memory", 8 << 20, 8 << 20)
    plan = plan_replica(planned, PlanSettings(page_size=16, activation_reserve=0, utilization=1.0), [gpu])
    loaded = load_model(folder)
    buffers = PageBuffers(loaded.cache_params(page_size=16, devices=["cpu"]), plan.pages, ["cpu"])
    [device] = plan.devices
    assert plan.fits and sum(t.nbytes for t in buffers.all_buffers) == device.kv_cache
    assert not Component("weights", device.weights, loaded.num_bytes).is_off
    by_shapes = planned.loaded_bytes("float32")
    assert planned.loaded_bytes(None) == pytest.approx(by_shapes, rel=0.01)  # headers, and shapes without buffers
    assert device.kv_cache + device.weights <= gpu.free < device.kv_cache + device.weights + 2 * plan.page_bytes


def test_activations_are_measured_and_near_the_estimate(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "vocab_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **shape}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    asked = PlanSettings(max_batch_tokens=1024, max_batch_size=1)
    measured = measure_activations(tmp_path, asked, Measurements(tmp_path / "found.json"), "cpu")
    again = measure_activations(tmp_path, asked, Measurements(tmp_path / "found.json"), "cpu")
    assert measured == again and estimate(read_model(tmp_path), asked, 1 << 30).working == pytest.approx(
        measured, rel=0.3
    )
    exact = replace(asked, measured_activations=measured)
    assert estimate(read_model(tmp_path), exact, 1 << 30).working == measured
    with pytest.raises(ConfigError, match="one GPU"):
        measure_activations(tmp_path, PlanSettings(tp=2), Measurements(tmp_path / "found.json"), "cpu")
