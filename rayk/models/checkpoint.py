"""A checkpoint folder, looked at before anything is loaded: which files there are, and whether they are whole.

Only safetensors are read: other weights are pickles, which run code. The headers say how long a file must be, so a
download that stopped half-way is found here, with the file's name. What lies in the folder and would change an answer
is either served or refused by name: adapters, weights that are not read, two sets of weights, quantisation that config
and sidecars do not agree on.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from rayk.errors import CheckpointError
from rayk.models.quantization import refuse_quantization, sidecars
from rayk.models.tensors import Stored, index_against, read_headers

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
PICKLES = ("*.bin", "*.pt", "*.pth")
OTHER_FORMATS = (*PICKLES, "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")
ADAPTERS = ("adapter_config.json", "adapter_model.*", "adapters.*", "*lora*.safetensors", "*lora*.bin")
OTHER_COPIES = (
    "consolidated*.safetensors",
    "model.fp*.safetensors",
    "model.bf16*.safetensors",
)  # Mistral's layout; variants
BLOCK = 8 << 20  # bytes read at a time


def check_folder(folder: Path) -> dict[str, Any]:
    """The content of config.json. CheckpointError, naming folder and file, unless config and weights are whole and
    nothing beside them would change an answer unseen."""
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist; nothing is downloaded"
        raise CheckpointError(str(folder), "", reason)
    _refuse_adapters(folder)
    config = read_json(folder, CONFIG)
    if config.get("transformers_weights") is not None:
        reason = f"has transformers_weights={config['transformers_weights']!r}; name the weights {WEIGHTS} instead"
        raise CheckpointError(str(folder), CONFIG, reason)
    refuse_quantization(folder, CONFIG, config, {name: read_json(folder, name) for name in sidecars(folder)})
    stored_tensors(folder)
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


def _refuse_adapters(folder: Path) -> None:
    found = _matching(folder, ADAPTERS)
    if found:
        raise CheckpointError(
            str(folder),
            found[0],
            "is an adapter, which is not applied; merge it into its base model (merge_and_unload() of peft) and save "
            "that, or take it out of the folder",
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, all of which exist."""
    places = _weight_map(folder)
    if places is None:
        return [WEIGHTS]
    names = sorted(set(places.values()))
    if (folder / WEIGHTS).is_file() and names != [WEIGHTS]:
        reason = f"names other files than {WEIGHTS}, which is here too; delete whichever of the two is not meant"
        raise CheckpointError(str(folder), INDEX, reason)
    for name in names:
        if "/" in name or not (folder / name).is_file():
            missing = [tensor for tensor, place in places.items() if place == name]
            raise CheckpointError(str(folder), name, f"is missing; {INDEX} has {len(missing)} tensor(s) in it")
    return names


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor by the index; None where there is one file and no index."""
    if (folder / INDEX).is_file():
        index = read_json(folder, INDEX)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(str(folder), INDEX, "has no weight_map from tensors to files")
        if not isinstance(index.get("metadata"), dict):
            raise CheckpointError(
                str(folder), INDEX, 'has no metadata, which transformers asks for: add "metadata": {}'
            )
        return places
    if (folder / WEIGHTS).is_file():
        return None
    others = _matching(folder, OTHER_FORMATS)
    if others and _matching(folder, PICKLES):
        raise CheckpointError(
            str(folder),
            _matching(folder, PICKLES)[0],
            "weights in a pickle are not loaded, since they can run code; convert them to safetensors "
            "(model.save_pretrained() of transformers writes them)",
        )
    beside = f"; {others[0]} is not read, convert it to safetensors" if others else ""
    raise CheckpointError(str(folder), WEIGHTS, f"is missing, and so is {INDEX}{beside}")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of the weights, by name; no data is read.

    CheckpointError for a file that is damaged, a tensor that two files have, one that the index has and no file, and
    for other safetensors beside, which nobody would read.
    """
    names = weight_files(folder)
    found = read_headers(folder, names)
    index_against(folder, INDEX, _weight_map(folder) or {}, found)
    beside = [name for name in _matching(folder, ("*.safetensors",)) if name not in names]
    unread = [name for name in beside if not any(fnmatchcase(name, pattern) for pattern in OTHER_COPIES)]
    if unread:
        source = INDEX if (folder / INDEX).is_file() else WEIGHTS
        raise CheckpointError(
            str(folder),
            unread[0],
            f"is beside {source} and not part of it, so that its tensors would not be served; take it out of the "
            "folder, or name its tensors in the index",
        )
    return found


def other_copies(folder: Path) -> list[str]:
    """Files with weights in other formats, layouts or precisions, which are not read."""
    return [name for name in _matching(folder, (*OTHER_FORMATS, *OTHER_COPIES)) if name not in weight_files(folder)]


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if any(fnmatchcase(name.lower(), pattern) for pattern in patterns)]


def identity(folder: Path) -> str:
    """What tells this checkpoint from every other one: all that decides its keys and values, and not the folder. Reads
    all of it once.

    That is the config, what says how the weights are quantised, and the weights; whatever else could change an answer
    is refused. Sizes and shapes would not do: a fine-tuned model has those of the model that it was made from.
    """
    digest = xxhash.xxh3_128()
    for name in (CONFIG, *sidecars(folder), *weight_files(folder)):
        path = folder / name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
