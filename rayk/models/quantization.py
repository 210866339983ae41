"""Quantised weights: who says that they are, and whether transformers can read them.

config.json says it in `quantization_config`; other tools write it to files of their own, or under other names, which
transformers does not read. It skips what it does not know and serves the bare numbers, so all of that is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayk.errors import CheckpointError

FIELD = "quantization_config"
UNREAD_FIELDS = ("quantization", "compression_config", "quant_config")  # of MLX, of older tools
ALIKE = {"w_bit": "bits", "bits": "bits", "q_group_size": "group_size", "group_size": "group_size"}
REMEDY = "use the unquantised checkpoint, or one quantised with"


def sidecars(folder: Path) -> list[str]:
    """Files beside the config that say how weights are quantised: hf_quant_config.json, quantize_config.json, .."""
    return sorted(path.name for path in folder.iterdir() if path.match("*quant*.json") and path.is_file())


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The method that config.json names, as a person would; None where the weights are not quantised."""
    found = _entry(config)
    if found is None:
        return None
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or "")


def refuse_quantization(
    folder: Path, file: str, config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]
) -> None:
    """CheckpointError for a quantisation that would not be honoured.

    config: the content of `file`. beside: that of each sidecar, by its name.
    """
    for part in _parts(config):
        for field in UNREAD_FIELDS:
            if part.get(field):
                raise CheckpointError(str(folder), file, f"{field} is not read by transformers; {REMEDY} {_known()}")
    method = quant_method(config)
    if method is not None:
        _refuse_method(folder, file, method, _entry(config) or {})
    for name, value in beside.items():
        says = _method_beside(value)
        if method is None:
            what = f"quantised with {says}" if says else "quantised"
            reason = f"says that the weights are {what}, and {file} does not, which alone is read; {REMEDY} {_known()}"
            raise CheckpointError(str(folder), name, f"{reason}. Where the weights are plain, delete the file")
        _refuse_contradiction(folder, name, value, says, method, _entry(config) or {})


def _refuse_method(folder: Path, file: str, method: str, entry: Mapping[str, Any]) -> None:
    known = _methods()
    if method not in known:
        reason = f"quant_method {method!r} is unknown to transformers" if method else f"{FIELD} has no quant_method"
        raise CheckpointError(str(folder), file, f"{reason}, which would serve the bare numbers; {REMEDY} {_known()}")
    company = "so that a token's result would depend on the others in its batch"
    if method == "bitsandbytes" and entry.get("load_in_8bit") and entry.get("llm_int8_threshold", 6.0) > 0:
        raise CheckpointError(
            str(folder),
            file,
            f"8-bit bitsandbytes looks for outliers over a whole batch, {company}; set llm_int8_threshold to 0.0 "
            f"in {FIELD}, or use 4 bits",
        )
    for group in _groups(entry):
        scheme = group.get("input_activations")
        if isinstance(scheme, dict) and scheme.get("dynamic") is True and scheme.get("strategy") == "tensor":
            reason = f"{method} scales activations by the largest of a whole batch, {company}; use a scale per token"
            raise CheckpointError(str(folder), file, reason)


def _refuse_contradiction(
    folder: Path, name: str, value: Mapping[str, Any], says: str, method: str, entry: Mapping[str, Any]
) -> None:
    if says and says.replace("-", "_").lower() not in (method.replace("-", "_"), *_aliases(entry)):
        reason = f"says that the weights are quantised with {says}, config.json says {method}"
        raise CheckpointError(str(folder), name, f"{reason}; delete the file if config.json is right")
    for field, alike in ALIKE.items():
        if field in value and alike in entry and value[field] != entry[alike]:
            reason = f"has {field} {value[field]!r}, config.json has {alike} {entry[alike]!r}"
            raise CheckpointError(str(folder), name, f"{reason}; delete the file if config.json is right")


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def _entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What transformers takes: of the whole model, else of its text part."""
    for part in _parts(config):
        if part.get(FIELD) is not None:
            value = part[FIELD]
            return value if isinstance(value, dict) else {}
    return None


def _groups(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = entry.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _method_beside(value: Mapping[str, Any]) -> str:
    """The method that a sidecar names, or the tool that wrote it, or ''."""
    nested = value.get("quantization")
    algorithm = nested.get("quant_algo") if isinstance(nested, dict) else None
    producer = value.get("producer")
    tool = producer.get("name") if isinstance(producer, dict) else None
    return str(value.get("quant_method") or " ".join(str(each) for each in (tool, algorithm) if each))


def _aliases(entry: Mapping[str, Any]) -> set[str]:
    """Other names of the config's own method, such as that of a packing."""
    return {str(entry.get(field, "")).replace("-", "_").lower() for field in ("quant_algo", "checkpoint_format")}


def _methods() -> set[str]:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return {"bitsandbytes" if name.startswith("bitsandbytes") else name for name in AUTO_QUANTIZATION_CONFIG_MAPPING}


def _known() -> str:
    return ", ".join(sorted(_methods()))
