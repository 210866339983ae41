"""What transformers says of a model: its modules and what each layer keeps of a token, from its own classes.

A config class is made from the fields, and the model that it describes on torch's meta device, which takes no memory:
nothing is downloaded, and no code that comes with a checkpoint is run. Everything here costs an import of torch and
transformers, so it is imported where it is needed.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from rayk.planning.model import CachedLayers, Split, State
from rayk.planning.recurrent import is_recurrent, state_of
from rayk.planning.weights import Kind, Module, Weights, in_tower

MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack")
NOT_CACHED = ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp")
COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")
ROUTERS = ("gate", "router", "shared_expert_gate")
DIVIDING = ("colwise", "rowwise", "packed_", "embedding_")  # how such styles of a plan begin
INDEX_BLOCK = 128  # an indexer's key has 8 bits an element and a 32-bit scale for each 128


MIXED = (  # model types of which some layers attend and others keep a state
    "bailing_hybrid",
    "bamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "zamba",
    "zamba2",
)


class Unbuildable(Exception):
    """The fields describe no model that transformers can make; the text says why."""


@dataclass(frozen=True)
class KnownModel:
    """What is known of a config: the text model's fields, all modules, and what layers keep of tokens and sequences.

    `refused` says why rayk's own model runner does not take it; None if it may.
    """

    class_name: str
    text: Any
    weights: Weights
    layers: tuple[CachedLayers, ...]
    state: State | None
    refused: str | None
    split: Split | None
    notes: tuple[str, ...] = ()


def knows(model_type: object) -> bool:
    """Whether transformers has a config class of that name."""
    return isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING


def known_model(raw: Mapping[str, Any]) -> KnownModel:
    """The model that a config.json of a known model type describes. Unbuildable where transformers refuses it."""
    return _known(json.dumps(_described(raw), sort_keys=True, default=str))


RUNNING = ("quantization_config", "quantization", "_attn_implementation", "attn_implementation")


def _described(value: Any) -> Any:
    """The fields that describe a model, without those of a way to run it; RoPE's old names as they are called now."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:  # how transformers writes what JSON has no number for
            return float(value["__float__"])
        found = {name: _described(v) for name, v in value.items() if name not in RUNNING}
        return {**found, "type": "longrope"} if found.get("type") == "su" else found
    return [_described(v) for v in value] if isinstance(value, list) else value


@lru_cache(maxsize=256)
def _known(text: str) -> KnownModel:
    raw = json.loads(text)
    with quiet():
        try:
            config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
            text_config = config.get_text_config(decoder=True)
            if "tie_word_embeddings" not in raw:  # of a composite model; checkpoints follow the text model
                config.tie_word_embeddings = bool(_get(text_config, "tie_word_embeddings", False))
            if (_get(text_config, "pad_token_id") or 0) >= (_get(text_config, "vocab_size") or 0):
                text_config.pad_token_id = None  # a default that is no token of this model
            model, notes = _build(config, text_config, raw.get("architectures"))
        except Unbuildable:
            raise
        except Exception as error:  # each class checks its fields in its own way, and some not at all
            line = next((t.strip() for t in reversed(str(error).splitlines()) if t.strip()), type(error).__name__)
            raise Unbuildable(f"transformers makes no {raw['model_type']} of it: {line}") from None
        layers, state = _kept(model, text_config)
        refused, split = _refusal(text_config, model), split_of(model, text_config)
        return KnownModel(type(model).__name__, text_config, weights_of(model), layers, state, refused, split, notes)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of config classes, which are about running a model."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _build(config: Any, text: Any, named: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The model on the meta device: the class that the file names, else the one for that config."""
    named = [named] if isinstance(named, str) else named
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    own = [c for n in names if getattr(c := getattr(transformers, n, None), "config_class", None) is type(config)]
    mapped = [c for c in (_mapped(name, config) for name in MAPPINGS) if c is not None]
    problem: Exception | None = None
    for model_class in dict.fromkeys([*own, *mapped]):
        try:
            return _on_meta(model_class, config), ()
        except Exception as error:
            problem = error
    if text is not config and (model_class := _mapped(MAPPINGS[0], text)) is not None:
        left_out = ("the encoders of images and sound are not counted: transformers cannot make them here",)
        return _on_meta(model_class, text), left_out
    if problem is None:
        raise Unbuildable(f"model_type {config.model_type!r} is no language model in transformers")
    raise problem


def _mapped(name: str, config: Any) -> Any:
    mapping = getattr(transformers, name, None)
    if mapping is None or type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _on_meta(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model


def small_model(raw: Mapping[str, Any], layers: int, device: torch.device) -> Any:
    """The first layers of the text model, with random weights, on a device. Unbuildable where that cannot be made."""
    if not knows(raw.get("model_type")):
        raise Unbuildable(f"model_type {raw.get('model_type')!r} is not known to transformers")
    try:
        text = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(_described(raw)).get_text_config(decoder=True)
        dense = _get(text, "first_k_dense_replace", 0)
        kept = min(int(text.num_hidden_layers), max(layers, dense + 1))
        if isinstance(kinds := _get(text, "layer_types"), list):
            text.layer_types = kinds[:kept]
        text.num_hidden_layers = kept
        model_class = _mapped(MAPPINGS[0], text)
        with torch.device(device):
            model: nn.Module = model_class(text)
    except Exception as error:  # as in _known()
        raise Unbuildable(f"transformers makes no {raw['model_type']} of {layers} layers: {error}") from None
    return model.eval()


def weights_of(model: nn.Module) -> Weights:
    """Its parameters by module, a shared one once. Buffers are left out: they are small."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for _, p in own)
        for parameter, tensor in own:
            found.append(_module(name, module, parameter, tensor, module is head))
    return Weights.of(found)


def split_of(model: Any, text: Any) -> Split | None:
    """What transformers' tensor parallel plan divides of a model."""
    if not _get(text, "base_model_tp_plan"):
        return None
    divided = {name: style for name, style in model.tp_plan.items() if style.startswith(DIVIDING)}
    heads = any(name.endswith(".k_proj") and style == "colwise" for name, style in divided.items())
    return Split(frozenset(divided), heads)


def _module(name: str, module: nn.Module, parameter: str, tensor: torch.Tensor, is_head: bool) -> Module:
    count, last = tensor.numel(), name.rpartition(".")[2]
    if parameter == "weight" and isinstance(module, nn.Embedding):
        return Module(name, Kind.embedding, count, tensor.shape[-1])
    if parameter == "weight" and isinstance(module, (nn.Linear, Conv1D)):
        kind = Kind.head if is_head else Kind.rest if last in ROUTERS else Kind.linear
        return Module(name, kind, count, tensor.shape[-1 if isinstance(module, nn.Linear) else 0])
    if tensor.dim() == 3 and ("expert" in name.lower() or "expert" in type(module).__name__.lower()):
        return Module(f"{name}.{parameter}", Kind.expert, count, tensor.shape[-1], tensor.shape[0])
    fan_in = tensor.shape[-1] if last in ROUTERS and tensor.dim() == 2 else 0
    return Module(name if parameter == "weight" else f"{name}.{parameter}", Kind.rest, count, fan_in)


def _kept(model: nn.Module, text: Any) -> tuple[tuple[CachedLayers, ...], State | None]:
    """What layers keep of each token, equal ones together, and what they keep of a sequence."""
    kinds = _get(text, "layer_types") or []
    if any(kind in COMPRESSED for kind in kinds):
        raise Unbuildable("its cache is compressed by layers of several kinds, which pages of tokens do not describe")
    kept: dict[int, CachedLayers] = {}
    indexers: dict[int, list[int]] = {}
    states: list[State | None] = []
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        place = Module(name, Kind.rest, 0)
        if not isinstance(index, int) or isinstance(index, bool) or in_tower(place) or "cross" in name.lower():
            continue
        class_name = type(module).__name__.lower()
        if "indexer" in class_name:
            size = getattr(module, "index_head_dim", None) or _get(text, "index_head_dim") or module.head_dim
            indexers.setdefault(int(size), []).append(index)
            continue
        if is_recurrent(module):
            states.append(state_of(module))
            continue
        if index < len(kinds) and kinds[index] in NOT_CACHED:
            continue
        found = _cached(module, text)
        if found is not None:
            window = _window(module, text, kinds[index] if index < len(kinds) else None)
            number = index if index not in kept else max(kept) + 1
            kept[number] = found._replace(layers=(number,), window=window)
    if not kept and not states:
        kept = _by_fields(text)
    if not kept:
        raise Unbuildable("it keeps a recurrent state and no keys and values of tokens: there is nothing to page")
    if None in states:
        raise Unbuildable("it keeps a recurrent state, of a size that is not known, in some of its layers")
    state = None
    for one in states:
        state = (state or State()).plus(one or State())
    grouped: dict[CachedLayers, list[int]] = {}
    for number, layer in sorted(kept.items()):
        grouped.setdefault(layer._replace(layers=()), []).append(number)
    groups = [layer._replace(layers=tuple(numbers)) for layer, numbers in grouped.items()]
    groups += [
        CachedLayers(tuple(numbers), 1, 0, 0, True, extra_bytes=size + 4 * -(-size // INDEX_BLOCK))
        for size, numbers in indexers.items()
    ]
    return tuple(groups), state


def field(config: Any, name: str) -> Any:
    """A field of a config by its common name; None where it is absent, or differs by layer."""
    return _get(config, name)


def _get(config: Any, name: str, default: Any = None) -> Any:
    try:
        value = getattr(config, name, default)
    except Exception:  # transformers refuses to give one value for what differs by layer
        return default
    return default if value is None else value


def _cached(module: nn.Module, text: Any) -> CachedLayers | None:
    """Heads and elements that this attention keeps of a token; None if it keeps none of its own."""
    if hasattr(module, "kv_a_proj_with_mqa") or (
        hasattr(module, "kv_lora_rank") and hasattr(module, "qk_rope_head_dim")
    ):
        own = {n: int(getattr(module, n, None) or text.__dict__[n]) for n in ("kv_lora_rank", "qk_rope_head_dim")}
        query = int(getattr(module, "num_heads", None) or _get(text, "num_attention_heads"))
        nope = int(getattr(module, "qk_nope_head_dim", None) or _get(text, "qk_nope_head_dim"))
        widest = max(
            nope + own["qk_rope_head_dim"], int(getattr(module, "v_head_dim", None) or _get(text, "v_head_dim"))
        )
        return CachedLayers((), 1, sum(own.values()), 0, True, None, expanded=(query, widest))
    if getattr(module, "is_kv_shared_layer", False):
        return None
    dim = getattr(module, "head_dim", None)
    if not isinstance(dim, int):
        dim = _get(text, "head_dim") or _get(text, "hidden_size") // _get(text, "num_attention_heads")
    if (key := _width(module, "k_proj")) is not None:
        value = _width(module, "v_proj")
        value = key if value is None else value
    elif (both := _width(module, "kv_proj")) is not None:
        key = value = both // 2
        repeated = int(getattr(module, "top_k", 1))  # JetMoe attends once for each expert that a token goes to
        expanded = (repeated * max(1, key // dim), dim) if repeated > 1 else None
        return CachedLayers((), max(1, key // dim), dim, dim, expanded=expanded)
    else:
        total = next((w for w in (_width(module, name) for name in FUSED) if w is not None), None)
        if total is None:
            return None
        query = getattr(module, "num_heads", None) or _get(text, "num_attention_heads")
        key = value = (total - int(query) * dim) // 2
    heads = max(1, key // dim)
    return CachedLayers((), heads, key // heads, value // heads, False, None)


def _width(module: nn.Module, name: str) -> int | None:
    """What a projection puts out for a token."""
    projection = getattr(module, name, None)
    if not isinstance(projection, nn.Module):
        return None
    if isinstance(projection, Conv1D):
        return int(projection.nf)
    size = getattr(projection, "out_features", None)
    return int(size) if isinstance(size, int) else None


def _by_fields(text: Any) -> dict[int, CachedLayers]:
    """For models whose attention does not number itself: as many keys and values as the fields say."""
    query, layers, hidden = (_get(text, n) for n in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    if not all(isinstance(n, int) and n > 0 for n in (query, layers, hidden)):
        return {}
    heads = _get(text, "num_key_value_heads", query)
    dim = _get(text, "head_dim", hidden // query)
    return {i: CachedLayers((i,), heads, dim, dim, False, None) for i in range(layers)}


def _window(module: nn.Module, text: Any, kind: str | None) -> int | None:
    """Tokens that the layer attends to, None for all."""
    size = getattr(module, "sliding_window", None)
    if kind is not None:
        size = (size or _get(text, "sliding_window")) if "sliding" in kind else None
    return int(size) if isinstance(size, int) and size > 0 else None


def _refusal(text: Any, model: nn.Module) -> str | None:
    """Why rayk's own runner does not take it, by its class and config."""
    from rayk.errors import ArchitectureError
    from rayk.models.architecture import refuse_by_config

    try:
        refuse_by_config(text, type(model))
    except ArchitectureError as error:
        return error.message
    except Exception:  # fields that differ by layer
        return "its layers have different shapes; pages have one"
    return None
