"""A checkpoint folder, looked at before anything is loaded: which files there are, and whether they are whole.

Only safetensors are read: other weights are pickles, which run code. The headers say how long a file must be, so a
download that stopped half-way is found here, with the file's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from rayk.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
PICKLES = ("*.bin", "*.pt", "*.pth")
BLOCK = 8 << 20  # bytes read at a time


def check_folder(folder: Path) -> dict[str, Any]:
    """The content of config.json. CheckpointError, naming folder and file, unless config and weights are whole."""
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist; nothing is downloaded"
        raise CheckpointError(str(folder), "", reason)
    config = read_json(folder, CONFIG)
    for name in weight_files(folder):
        check_weights(folder, name)
    return config


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer, whole or not."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of that folder."""
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(str(folder), name, "is missing") from None
    except OSError as error:
        raise CheckpointError(str(folder), name, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(str(folder), name, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(str(folder), name, "is not a JSON object")
    return value


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, all of which exist."""
    if (folder / INDEX).is_file():
        places = read_json(folder, INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(str(folder), INDEX, "has no weight_map from tensors to files")
        names = sorted(set(places.values()))
        for name in names:
            if "/" in name or not (folder / name).is_file():
                missing = [tensor for tensor, place in places.items() if place == name]
                raise CheckpointError(str(folder), name, f"is missing; {INDEX} has {len(missing)} tensor(s) in it")
        return names
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            str(folder),
            pickles[0],
            "weights in a pickle are not loaded, since they can run code; convert them to safetensors "
            "(model.save_pretrained() of transformers writes them)",
        )
    raise CheckpointError(str(folder), WEIGHTS, f"is missing, and so is {INDEX}")


def identity(folder: Path) -> str:
    """What tells this checkpoint from every other one: config and weights, and not the folder. Reads all of it once.

    Sizes and shapes would not do: a fine-tuned model has those of the model that it was made from.
    """
    digest = xxhash.xxh3_128()
    for name in (CONFIG, *weight_files(folder)):
        path = folder / name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def check_weights(folder: Path, name: str) -> None:
    """CheckpointError unless that safetensors file has a header that fits its length."""
    try:
        with safe_open(folder / name, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(folder), name, f"is damaged: {error}") from None
