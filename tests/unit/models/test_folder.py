"""What else may lie in a checkpoint folder: all that changes an answer is served, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayk.errors import ArchitectureError, CheckpointError
from rayk.models import load_model
from rayk.models.architecture import refuse_unread_rope
from rayk.models.checkpoint import check_folder, identity
from rayk.models.load import _listening
from rayk.models.quantization import refuse_quantization
from rayk.models.tensors import Stored, check_taken, read_headers

from .checkpoints import Rows, dense, prompts, write

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EH = "model.layers.2.eh_proj.weight"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})


def add(folder: Path, **tensors: torch.Tensor) -> None:
    """More tensors; `__` in a name is a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save(folder, load_file(folder / WEIGHTS) | more)


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def shard(folder: Path, places: Callable[[dict[str, str]], dict[str, str]] = lambda index: index) -> None:
    """Two files instead of one; `places` changes what the index says."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {}
    for at, file in enumerate((FIRST, SECOND)):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 2 == at}
        save(folder, part, file)
        index |= dict.fromkeys(part, file)
    put(folder, INDEX, {"metadata": {}, "weight_map": places(index)})


def duplicate(folder: Path) -> None:
    shard(folder)
    save(folder, load_file(folder / SECOND) | dict([next(iter(load_file(folder / FIRST).items()))]), SECOND)


def as_type(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save(folder, {name: t.to(dtype) if "up_proj" in name else t for name, t in found.items()})

    return change


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def set_file(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder, name, value)


BF16 = torch.ones(2, dtype=torch.bfloat16)
TOOLS: dict[str, dict[str, Any]] = {
    "awq": {"bits": 4, "group_size": 32},
    "gptq": {"bits": 4, "group_size": 128},
    "bitsandbytes": {"load_in_4bit": True},
    "compressed-tensors": {"format": "float-quantized", "config_groups": {}},
    "aqlm": {},
    "quanto": {"weights": "int8"},
}
if importlib.util.find_spec("accelerate") is None:
    TOOLS |= {"fp8": {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}, "mxfp4": {}}
"""Methods that transformers reads with a package that the tests do not have, and fields of theirs."""

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter's config": (set_file("adapter_config.json", {}), r"adapter_config.json: is an adapter.*merge_and_unload"),
    "adapter's weights": (set_file("adapter_model.bin", 0), r"adapter_model.bin: is an adapter"),
    "MLX's adapter": (lambda f: save(f, {"a": BF16}, "adapters.safetensors"), r"adapters.safetensors: is an adapter"),
    "another adapter": (lambda f: save(f, {"a": BF16}, "my_LoRA.safetensors"), r"my_LoRA.safetensors: is an adapter"),
    "bias": (lambda f: add(f, model__layers__0__self_attn__q_proj__bias=torch.ones(32)), r"1 tensor.*q_proj.bias"),
    "a layer too many": (set_config(num_hidden_layers=1), r"model.safetensors: 9 tensor\(s\) have no place in Llama"),
    "scale": (lambda f: add(f, lm_head__weight_scale=BF16), r"lm_head.weight_scale; scales mean quantised weights"),
    "layers to come, not told of": (lambda f: add(f, mtp__fc__weight=BF16), r"no place .*mtp.fc.weight"),
    "prefix and none": (
        lambda f: add(f, norm__weight=torch.ones(32)),
        r"norm.weight and model.norm.weight are the same parameter",
    ),
    "float8": (as_type(torch.float8_e4m3fn), r"2 tensor\(s\) of type F8_E4M3 .*no quantization_config"),
    "int8": (as_type(torch.int8), r"2 tensor\(s\) of type I8 .*no quantization_config"),
    "unknown method": (
        set_config(quantization_config={"quant_method": "modelopt"}),
        r"config.json: quant_method 'modelopt' is unknown .*use the unquantised checkpoint, or one .*gptq",
    ),
    "no method": (set_config(quantization_config={"bits": 4}), r"quantization_config has no quant_method"),
    "method of the text part": (
        set_config(text_config={"quantization_config": {"quant_method": "brandnew"}}),
        r"quant_method 'brandnew' is unknown",
    ),
    **{
        f"no tool for {method}": (
            set_config(quantization_config={"quant_method": method, **fields}),
            rf"quant_method '{method}' cannot be loaded here: .*pip install",
        )
        for method, fields in TOOLS.items()
    },
    "outliers of a batch": (
        set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"8-bit bitsandbytes .*others in its batch; set llm_int8_threshold to 0.0",
    ),
    "MLX": (set_config(quantization={"bits": 4}), r"config.json: quantization is not read"),
    "modelopt beside": (
        set_file("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}),
        r"hf_quant_config.json: says that the weights are quantised with modelopt FP8, and config.json does not",
    ),
    "old GPTQ beside": (set_file("quantize_config.json", {"bits": 4}), r"quantize_config.json: says that .* quantised"),
    "a sidecar that is no JSON": (
        lambda f: (f / "quant_config.json").write_text("{"),
        r"quant_config.json: is not JSON",
    ),
    "weights of another name": (
        set_config(transformers_weights="consolidated.safetensors"),
        r"config.json: has transformers_weights='consolidated.safetensors'; name the weights model.safetensors",
    ),
    "two sets of weights": (
        lambda f: (shard(f), save(f, {"a": BF16})),
        r"index.json: names other files than model.safetensors, which is here too",
    ),
    "one tensor in two files": (duplicate, rf"{SECOND}: has .*, and so has {FIRST}; delete"),
    "index beyond the files": (
        lambda f: shard(f, lambda index: index | {"model.other": FIRST}),
        r"index.json: has 1 tensor\(s\) that are in no file, such as model.other",
    ),
    "an index without metadata": (
        lambda f: (shard(f), put(f, INDEX, {"weight_map": json.loads((f / INDEX).read_text())["weight_map"]})),
        r"index.json: has no metadata",
    ),
    "a shard beside the index": (
        lambda f: (shard(f), save(f, {"a": BF16}, "model-00003-of-00003.safetensors")),
        r"model-00003-of-00003.safetensors: is beside model.safetensors.index.json and not part of it",
    ),
    "weights beside": (
        lambda f: save(f, {"a": BF16}, "delta.safetensors"),
        r"delta.safetensors: is beside model.safetensors and not part of it",
    ),
    "soft cap": (set_config(final_logit_softcapping=3.0), r"final_logit_softcapping=3.0, which LlamaForCausalLM does"),
    "window": (set_config(sliding_window=4, use_sliding_window=False), r"sliding_window=4, which Llama.* delete it"),
    "part of a head": (set_config(partial_rotary_factor=0.5), r"turns all of a head by its position, .* 0.5 of it"),
    "dtype": (set_config(dtype="float64"), r"config.json: asks for .*float64; a model computes in float32"),
    "8-bit dtype": (set_config(dtype="float8_e4m3fn"), r"config.json: asks for .*float8_e4m3fn"),
    "activation": (set_config(hidden_act="superglu"), r"transformers looks for 'superglu'"),
    "code of its own": (
        set_config(architectures=["MyLlama"], auto_map={"AutoModelForCausalLM": "modeling_my.MyLlama"}),
        r"MyLlama .*its code comes with the checkpoint and is not run",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_an_answer_unseen_is_refused(copy: Path, what: str) -> None:
    spoil, says = REFUSED[what]
    spoil(copy)
    with pytest.raises((CheckpointError, ArchitectureError), match=says):
        load_model(copy)


ALIKE: dict[str, Callable[[Path], object]] = {
    "shards": shard,
    "an index that lacks a tensor": lambda f: shard(f, lambda index: dict(list(index.items())[1:])),
    "an index of one file": lambda f: put(
        f, INDEX, {"metadata": {}, "weight_map": dict.fromkeys(load_file(f / WEIGHTS), WEIGHTS)}
    ),
    "frequencies": lambda f: add(f, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "layers to come": lambda f: (add(f, mtp__fc__weight=BF16), edit(f, num_nextn_predict_layers=1)),
    "the layer to come": lambda f: (add(f, **{EH.replace(".", "__"): BF16}), edit(f, num_nextn_predict_layers=1)),
    "neutral fields": set_config(final_logit_softcapping=None, residual_multiplier=1.0, quantization_config=None),
    "its class by name": set_config(auto_map={"AutoModelForCausalLM": "modeling_my.MyLlama"}),
}


@pytest.mark.parametrize("what", ALIKE)
def test_what_changes_nothing_is_served_as_before(llama: Path, copy: Path, what: str) -> None:
    ALIKE[what](copy)
    (text,) = prompts([20])
    want = Rows(load_model(llama), 1).step({0: text})
    torch.testing.assert_close(Rows(load_model(copy), 1).step({0: text}), want)


def test_copies_in_other_formats_are_told_of(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({}, copy / "pytorch_model.bin")
    save(copy, {"a": BF16}, "consolidated.safetensors")
    with caplog.at_level(logging.WARNING, "rayk.models"):
        load_model(copy)
    assert "not read: consolidated.safetensors, pytorch_model.bin; the safetensors are served" in caplog.text


def test_an_adapter_alone_is_called_one(tmp_path: Path) -> None:
    put(tmp_path, "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(CheckpointError, match=r"adapter_config.json: is an adapter.*merge it into its base"):
        check_folder(tmp_path)


def test_a_layer_that_only_follows_the_last_one_is_not_dropped(copy: Path) -> None:
    """What predicts further tokens has a projection of its own; a layer that a short config cuts off has none."""
    edit(copy, num_hidden_layers=1, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"9 tensor\(s\) have no place"):
        load_model(copy)


def test_a_scaling_of_positions_that_no_layer_reads_is_refused(copy: Path) -> None:
    edit(copy, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0})
    load_model(copy)
    model = dense(copy)
    refuse_unread_rope(model, model.config)
    del model.model.rotary_emb.rope_type
    with pytest.raises(ArchitectureError, match="do not read rope_type linear"):
        refuse_unread_rope(model, model.config)


@pytest.mark.parametrize(
    ("kind", "message"), [(ValueError, "no such thing"), (RuntimeError, "shapes"), (KeyError, "x")]
)
def test_a_trial_that_raises_names_the_architecture(
    llama: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    from transformers import LlamaForCausalLM

    def forward(*args: Any, logits_to_keep: int = 0, **kwargs: Any) -> None:
        raise kind(message)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ArchitectureError, match=f"LlamaForCausalLM .*a trial of 8 tokens raised {kind.__name__}: "):
        load_model(llama)


# -- quantised weights, for whose tools the tests have no package ------------------------------------------------------


class Loaded(torch.nn.Module):
    """A model as transformers leaves it: one layer, of that type."""

    base_model_prefix = "model"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(2, 2, bias=False)
        self.q_proj.weight = torch.nn.Parameter(self.q_proj.weight.detach().to(dtype), requires_grad=False)


def taken(dtype: torch.dtype, stored: Mapping[str, str], quantised: bool = True, **report: Any) -> None:
    empty: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    files = {name: Stored(WEIGHTS, kind, (2, 2)) for name, kind in stored.items()}
    text = SimpleNamespace(num_hidden_layers=2)
    check_taken(Path("folder"), files, Loaded(dtype), empty | report, text, quantised)


def test_numbers_have_their_scales() -> None:
    whole = {"q_proj.weight": "F8_E4M3", "q_proj.weight_scale_inv": "F32"}
    taken(torch.float32, whole)  # computed from both
    taken(torch.float8_e4m3fn, whole)  # kept as it is, and its scale beside
    taken(torch.int8, {"q_proj.weight": "I8", "q_proj.SCB": "F32"})
    taken(torch.float32, {"q_proj.weight": "BF16"})
    for dtype in (torch.float32, torch.float8_e4m3fn):
        with pytest.raises(CheckpointError, match=r"q_proj.weight: their scales are missing"):
            taken(dtype, {"q_proj.weight": "F8_E4M3", "k_proj.weight_scale_inv": "F32"})
    with pytest.raises(CheckpointError, match=r"q_proj.input_scale; config and weights"):
        taken(torch.float32, {**whole, "q_proj.input_scale": "F32"}, unexpected_keys={"q_proj.input_scale"})
    with pytest.raises(CheckpointError, match=r"model.safetensors: 1 tensor.*missing, such as q_proj.weight_scale"):
        taken(torch.float8_e4m3fn, {"q_proj.weight": "F8_E4M3"}, missing_keys={"q_proj.weight_scale"})


def test_a_conversion_that_fails_names_its_tensor() -> None:
    said: list[str] = []
    log = logging.getLogger("transformers.modeling_utils")
    with _listening(said):
        log.warning("\x1b[35mReport\x1b[0m\nmodel.layers.0.down_proj.weight | \x1b[31mCONVERSION\x1b[0m | no scale")
    log.warning("later")
    assert said == ["Report", "model.layers.0.down_proj.weight | CONVERSION | no scale"]


FP8 = {"quant_method": "fp8", "group_size": 128}
SIDECARS: dict[str, tuple[dict[str, Any], str | None]] = {
    "same": ({"quant_method": "fp8"}, None),
    "silent": ({"checkpoint": "x"}, None),
    "other method": ({"quant_method": "gptq"}, "says that the weights are quantised with gptq, config.json says fp8"),
    "other groups": ({"q_group_size": 64}, "has q_group_size 64, config.json has group_size 128"),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_a_sidecar_must_agree(case: str) -> None:
    value, says = SIDECARS[case]

    def ask() -> None:
        refuse_quantization(Path("folder"), "config.json", {"quantization_config": FP8}, {"quant.json": value})

    if says is None:
        ask()
    else:
        with pytest.raises(CheckpointError, match=f"quant.json: {says}; delete the file if config.json is right"):
            ask()


def test_scales_of_a_whole_batch_are_refused() -> None:
    activations = {"dynamic": True, "strategy": "token"}
    entry = {"quant_method": "compressed-tensors", "config_groups": {"0": {"input_activations": activations}}}
    refuse_quantization(Path("folder"), "config.json", {"quantization_config": entry}, {})
    activations["strategy"] = "tensor"
    with pytest.raises(CheckpointError, match=r"largest of a whole batch.*use a scale per token"):
        refuse_quantization(Path("folder"), "config.json", {"quantization_config": entry}, {})


def test_identity_covers_what_says_how_weights_are_quantised(copy: Path) -> None:
    before = identity(copy)
    put(copy, "generation_config.json", {"temperature": 0.5})
    assert identity(copy) == before  # decides no key and no value
    put(copy, "quantize_config.json", {"bits": 4})
    beside = identity(copy)
    put(copy, "quantize_config.json", {"bits": 8})
    assert len({before, beside, identity(copy)}) == 3


def test_identity_covers_every_file_that_is_read(copy: Path) -> None:
    shard(copy)
    before = identity(copy)
    save(copy, {name: tensor + 1 for name, tensor in load_file(copy / SECOND).items()}, SECOND)
    assert identity(copy) != before


def test_headers_say_type_and_shape(copy: Path) -> None:
    found = read_headers(copy, [WEIGHTS])["model.norm.weight"]
    assert found == Stored(WEIGHTS, "F32", (32,))


# -- attention layers of a class that may have others -----------------------------------------------------------------


def test_the_layers_decide_not_the_class(tmp_path: Path) -> None:
    folder = write(tmp_path / "attention", "granite-4")
    (text,) = prompts([30])
    with torch.inference_mode():
        want = dense(folder)(torch.tensor([text])).logits[0, -1]
    got = Rows(load_model(folder), 1).step({0: text})[0]
    assert (got - want).norm() / want.norm() < 1e-5
    mixed = write(tmp_path / "mixed", "granite-4", layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ArchitectureError, match=r"GraniteMoeHybridForCausalLM .*recurrent state"):
        load_model(mixed)
