"""A checkpoint's folder: config.json, the quantization configs beside it, and the size of its weights by its files.

Nothing is executed and no tensor is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayk.planning.config_fields import BY_HAND
from rayk.planning.errors import ModelConfigError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"
SIDECARS = (MODELOPT, "quantize_config.json", "quant_config.json")
LONGEST_HEADER = 100 << 20  # the format's own limit
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """Bytes of the tensors of a checkpoint, and the plain dtype that most of them have, if headers say."""

    num_bytes: int
    dtype: str | None = None


@dataclass(frozen=True)
class Folder:
    """What the files say. `quantization` is empty for a plain checkpoint; `stored` None without weights or index."""

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    stored: Stored | None


def read_folder(path: Path) -> Folder:
    """A config.json, or a folder with one. ModelConfigError when a file cannot be read."""
    if path.is_dir():
        if not (path / CONFIG).is_file() and any(path.glob("*.gguf")):
            raise ModelConfigError("has GGUF files and no config.json; plan it by hand", str(path), BY_HAND)
        path = path / CONFIG
    raw = read_json(path)
    return Folder(path, raw, _quantization(path.parent, raw), stored_bytes(path.parent))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        way = "give a config.json, or a folder with one; nothing is downloaded"
        raise ModelConfigError(f"cannot be read: {error.strerror}; {way}", str(path), []) from None
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"is not JSON: {error}", str(path), []) from None
    if not isinstance(raw, dict):
        raise ModelConfigError("is not a JSON object", str(path), [])
    return raw


def _quantization(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The quantization config: of config.json, of its text part, or of a file beside it."""
    parts = [raw, *(v for k, v in raw.items() if isinstance(v, Mapping) and k.endswith("_config"))]
    for part in parts:
        for name in ("quantization_config", "compression_config", "quantization"):
            value = part.get(name)
            if value is None or value == {}:
                continue
            if not isinstance(value, dict):
                raise ModelConfigError(f"{name} must be an object, got {value!r}", str(folder / CONFIG), BY_HAND)
            return _with_sidecar(folder, value)
    for sidecar in SIDECARS:
        if (folder / sidecar).is_file():
            return read_json(folder / sidecar)
    return {}


def _with_sidecar(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt writes its settings twice; what only the sidecar has counts too."""
    if str(config.get("quant_method", "")).startswith("modelopt") and (folder / MODELOPT).is_file():
        beside = read_json(folder / MODELOPT).get("quantization")
        return {**(beside if isinstance(beside, dict) else {}), **config}
    return config


def stored_bytes(folder: Path) -> Stored | None:
    """By the headers of all weight files, else by the index; None without either."""
    index = folder / INDEX
    if index.is_file():
        content = read_json(index)
        places = content.get("weight_map")
        files = sorted({str(name) for name in places.values()}) if isinstance(places, Mapping) else []
        found = _headers([folder / name for name in files]) if files else None
        return found if found is not None else Stored(_total_size(index, content))
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    return _headers([folder / SINGLE] if (folder / SINGLE).is_file() else shards)


def _total_size(path: Path, content: Mapping[str, Any]) -> int:
    metadata = content.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(size, bool) or not isinstance(size, (int, float)) or size != int(size) or size <= 0:
        raise ModelConfigError(f"metadata.total_size is no number of bytes: {size!r}", str(path), [])
    return int(size)


def _headers(paths: list[Path]) -> Stored | None:
    """The tensors of these files; None if one is missing or is no safetensors file, such as a pointer to one."""
    total, plain = 0, Counter[str]()
    for path in paths:
        header = _header(path)
        if header is None:
            return None
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                total += end - start
                plain[PLAIN.get(entry.get("dtype"), "")] += end - start
    if total <= 0:
        return None
    dtype = plain.most_common(1)[0][0]
    return Stored(total, dtype or None)


def _header(path: Path) -> dict[str, Any] | None:
    """The format: the length of a JSON header in 8 bytes, the header, the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size - 8):
                return None
            header = json.loads(file.read(length))
        entries = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return header if all(0 <= start <= end for start, end in entries) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
