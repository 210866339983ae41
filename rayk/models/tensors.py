"""The tensors of a checkpoint: those in its files, and whether a model has taken every one of them.

A tensor that no parameter or buffer took is refused, unless the model's class says that it may be ignored
(transformers leaves those out of its report) or the config says that it belongs to layers which predict further tokens.
So is an integer or an 8-bit float without a scale that became a parameter of numbers: they mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rayk.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors: those that are numbers by themselves
SCALE = re.compile(r"scale|absmax|qzeros|SCB")
FURTHER_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_num_layers",
    "mtp_num_hidden_layers",
)


class Stored(NamedTuple):
    """A tensor in a file. dtype: safetensors' name of it, such as BF16 or F8_E4M3."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path, names: Iterable[str]) -> dict[str, Stored]:
    """All tensors of those files. CheckpointError for a damaged file, and for a tensor that is in two of them."""
    found: dict[str, Stored] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118  # no mapping: it has keys() alone
                    if tensor in found:
                        reason = f"has {tensor}, and so has {found[tensor].file}; delete the one that is not meant"
                        raise CheckpointError(str(folder), name, reason)
                    part = tensors.get_slice(tensor)
                    found[tensor] = Stored(name, str(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(folder), name, f"is damaged: {error}") from None
    return found


def index_against(folder: Path, index: str, places: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    """CheckpointError where the index has tensors that no file has."""
    absent = [tensor for tensor in places if tensor not in stored]
    if absent:
        reason = f"has {len(absent)} tensor(s) that are in no file, {_shown(absent)}: a file is not the one it was"
        raise CheckpointError(str(folder), index, reason)


def check_taken(
    folder: Path, stored: Mapping[str, Stored], model: Any, report: Mapping[str, Any], text: Any, quantised: bool
) -> None:
    """CheckpointError, with files and tensors, unless the model's tensors are those of the files.

    model: as loaded. report: transformers' account of the loading. text: the config of the text model. quantised:
    whether it says how the weights are quantised.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        files = sorted({each.file for each in stored.values()})
        where = files[0] if len(files) == 1 else ""
        raise CheckpointError(str(folder), where, f"{len(missing)} tensor(s) are missing, {_shown(missing)}")
    _check_shapes(folder, stored, report["mismatched_keys"])
    unexpected = sorted(name for name in report["unexpected_keys"] if not _predicts_further(name, stored, text))
    if unexpected:
        bare = not quantised and any(SCALE.search(name) for name in unexpected)
        scales = "; scales mean quantised weights, and no quantization_config says how" if bare else ""
        raise CheckpointError(
            str(folder),
            _files(unexpected, stored),
            f"{len(unexpected)} tensor(s) have no place in {type(model).__name__} and would be dropped, "
            f"{_shown(unexpected)}{scales}; config and weights do not belong together",
        )
    _check_twins(folder, stored, model)
    _check_scales(folder, stored, model, quantised)


def _check_shapes(folder: Path, stored: Mapping[str, Stored], mismatched: Iterable[Any]) -> None:
    found = sorted(mismatched)
    if found:
        name, has, wanted = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(
            str(folder),
            _files([name], stored),
            f"{name} has shape {tuple(has)}, config.json wants {tuple(wanted)}{more}; so they do not belong together",
        )


def _check_twins(folder: Path, stored: Mapping[str, Stored], model: Any) -> None:
    """transformers adds and takes off the base model's prefix: of two tensors that differ in it, one would be lost."""
    for name, each in stored.items():
        twin = stored.get(f"{model.base_model_prefix}.{name}")
        if twin is not None and model.base_model_prefix:
            raise CheckpointError(
                str(folder),
                each.file,
                f"{name} and {model.base_model_prefix}.{name} are the same parameter; delete the one that is not meant",
            )


def _check_scales(folder: Path, stored: Mapping[str, Stored], model: Any, quantised: bool) -> None:
    """Of numbers that are none without a scale, each must have one, unless integers were wanted."""
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    bare = sorted(
        name
        for name, each in stored.items()
        if each.dtype not in FLOATS
        and not {name, prefix + name, name.removeprefix(prefix)}.isdisjoint(floats)
        and not (quantised and _has_scale(name, stored))
    )
    if bare:
        raise CheckpointError(
            str(folder),
            _files(bare, stored),
            f"{len(bare)} tensor(s) of type {stored[bare[0]].dtype} would be served as plain numbers, {_shown(bare)}: "
            + ("their scales are missing" if quantised else "no quantization_config says what they mean"),
        )


def _has_scale(name: str, stored: Mapping[str, Stored]) -> bool:
    stem = name.removesuffix("weight")
    return any(
        other != name and other.startswith(stem) and SCALE.search(other[len(stem) :]) is not None for other in stored
    )


def _predicts_further(name: str, stored: Mapping[str, Stored], text: Any) -> bool:
    """Whether that tensor is of layers which predict the tokens after the next one, and that the config tells of.

    They are called mtp, or follow the last layer and have a projection of the embedding beside the hidden state.
    """
    extra = next((value for field in FURTHER_LAYERS if (value := getattr(text, field, None))), 0)
    if not isinstance(extra, int) or extra < 1:
        return False
    if re.search(r"(^|\.)mtp(_\w+)?\.", name):
        return True
    layer = re.match(r"(.*\blayers\.)(\d+)\.", name)
    if layer is None or not 0 <= int(layer[2]) - text.num_hidden_layers < extra:
        return False
    return any(other.endswith(f"layers.{layer[2]}.eh_proj.weight") for other in stored)


def _files(names: Iterable[str], stored: Mapping[str, Stored]) -> str:
    """The files of those tensors; '' when transformers has renamed all of them."""
    return ", ".join(sorted({stored[name].file for name in names if name in stored})[:3])


def _shown(names: list[str]) -> str:
    return f"such as {', '.join(names[:3])}"
