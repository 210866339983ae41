"""A model from its config.json, and the size of its weights from the files beside it. Nothing is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayk.bench.quantity import show_bytes
from rayk.memory.architectures import ARCHITECTURES, MODEL_TYPES, Architecture, vision_tower
from rayk.memory.errors import ModelConfigError
from rayk.memory.fields import BY_HAND, Fields
from rayk.memory.model import Model
from rayk.memory.weights import WEIGHT_BITS, checkpoint_bits

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGREE = 0.05  # index and shapes may differ so much: tied copies, buffers


def read_model(path: Path) -> Model:
    """The model of a config.json, or of a folder with one. ModelConfigError when it cannot be understood."""
    path = path / "config.json" if path.is_dir() else path
    raw = _read_json(path)
    name, architecture = _architecture(path, raw)
    notes: list[str] = []
    f = Fields(str(path), raw, notes)
    text = f.part(architecture.part) if architecture.part else f
    text = Fields(text.path, {**architecture.defaults, **text.values}, notes)
    weights = architecture.count(text)
    if f.has("vision_config") and architecture.part:
        weights += vision_tower(f.part("vision_config"), text.number("hidden_size"))
    query, kv, dim = architecture.cached(text)
    window = architecture.window(text)
    dtype = _dtype(f, text)
    bits = checkpoint_bits(_quantization(f), dtype)
    computed = None if bits is None else weights.num_bytes(bits)
    stored = _stored_bytes(path.parent)
    if stored is None and computed is None:
        method = _quantization(f).get("quant_method")
        raise f.error(f"the size of weights quantized with {method!r} is unknown, and there is no {INDEX} beside it")
    if stored and computed and abs(stored - computed) > AGREE * computed:
        notes.append(f"the checkpoint has {show_bytes(stored)} of weights, the shapes give {show_bytes(computed)}")
    if extra := text.number("num_nextn_predict_layers", 0, least=0):
        notes.append(f"{extra} layer(s) that predict further tokens are not counted")
    if window is not None:
        share = f"{window.layers} of {text.number('num_hidden_layers')} layers"
        notes.append(
            f"{share} attend to the last {window.tokens} tokens only; the cache keeps all tokens of all layers"
        )
    return Model(
        name=name,
        layers=text.number("num_hidden_layers"),
        kv_heads=kv,
        head_dim=dim,
        query_heads=query,
        latent=architecture.latent,
        max_length=text.number("max_position_embeddings"),
        weights=weights,
        weight_bytes=computed if stored is None else stored,
        dtype=dtype,
        window=window,
        notes=tuple(notes),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelConfigError(f"cannot be read: {error.strerror}", str(path), []) from None
    except ValueError as error:
        raise ModelConfigError(f"is not JSON: {error}", str(path), []) from None
    if not isinstance(raw, dict):
        raise ModelConfigError("is not a JSON object", str(path), [])
    return raw


def _architecture(path: Path, raw: dict[str, Any]) -> tuple[str, Architecture]:
    """By class name, else by model type."""
    named = raw.get("architectures") or []
    names = [named] if isinstance(named, str) else [n for n in named if isinstance(n, str)]
    for name in [*names, MODEL_TYPES.get(str(raw.get("model_type")), "")]:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    what = ", ".join(names) or raw.get("model_type") or "no architecture"
    raise ModelConfigError(f"{what} is not known; known are {', '.join(ARCHITECTURES)}", str(path), BY_HAND)


def _dtype(f: Fields, text: Fields) -> str:
    """The dtype that the weights are stored in, unless quantized."""
    found = [g.values[n] for g in (f, text) for n in ("dtype", "torch_dtype") if g.has(n)]
    name = str(found[0] if found else "bfloat16").removeprefix("torch.")
    if name not in WEIGHT_BITS:
        raise f.error(f"dtype {name!r} is not one of {', '.join(WEIGHT_BITS)}")
    return name


def _quantization(f: Fields) -> dict[str, Any]:
    value = f.values.get("quantization_config", {})
    if not isinstance(value, dict):
        raise f.error(f"quantization_config must be an object, got {value!r}")
    return value


def _stored_bytes(folder: Path) -> int | None:
    """Bytes of the tensors beside the config: by the index, or of a checkpoint in one file; None without either."""
    if (folder / INDEX).is_file():
        path = folder / INDEX
        metadata = _read_json(path).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(size, bool) or not isinstance(size, (int, float)) or size != int(size) or size <= 0:
            raise ModelConfigError(f"metadata.total_size is no number of bytes: {size!r}", str(path), [])
        return int(size)
    if (folder / SINGLE).is_file():
        with (folder / SINGLE).open("rb") as file:
            header = int.from_bytes(file.read(8), "little")  # the format: length of a JSON header, header, tensors
        tensors = (folder / SINGLE).stat().st_size - 8 - header
        return tensors if tensors > 0 else None
    return None
