"""Quantised weights that transformers reads on a CPU with accelerate alone: block float8 and mxfp4, as it serves them.

The other methods need packages with kernels of their own; tests/unit/models/test_folder.py has them refused by name.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayk import Cluster

from ..unit.models.checkpoints import prompts, write  # noqa: TID252  # tests are no package

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None, reason="needs accelerate: pip install 'rayk[smollm2]'"
    ),
    # Of accelerate, which is no code of rayk's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


def quantised(folder: Path, tensors: dict[str, torch.Tensor], method: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    return folder


def block_float8(folder: Path) -> Path:
    write(folder, "llama", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found[name] = tensor
        if "proj" in name:
            rows, columns = tensor.shape
            blocks = tensor.view(rows // 128, 128, columns // 128, 128)
            scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            found[name] = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scales
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    return quantised(folder, found, method)


def mxfp4(folder: Path) -> Path:
    write(folder, "gpt-oss", intermediate_size=32)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            found[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = experts, outputs, inputs // 32
        found[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        found[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return quantised(folder, found, {"quant_method": "mxfp4", "modules_to_not_convert": plain})


@pytest.mark.parametrize("make", [block_float8, mxfp4])
def test_answers_are_those_of_transformers(tmp_path: Path, make: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder, texts = make(tmp_path), prompts([20, 5, 37])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with Cluster(folder, page_size=16, pages=24, chunk_size=16, device="cpu") as cluster:
        outputs = cluster.generate(texts, max_new_tokens=10, ignore_eos=True)
    for text, output in zip(texts, outputs, strict=True):
        tokens = torch.tensor([text])
        want = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=10, eos_token_id=None
        )
        assert output.error is None and output.tokens == want[0, len(text) :].tolist()
