"""Checkpoints in floating point of 8 and 4 bits, and those described by schemes: compressed-tensors and ModelOpt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayk.planning.weights import QUANTIZED, WEIGHT_BITS, Bits, Kind, Module, NamePatterns, grouped, only


def fp8(c: Mapping[str, Any]) -> tuple[str, Bits]:
    block = c.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2:
        rows, columns = block
        extra = 32 / (rows * columns)
        four = c.get("expert_dtype") in ("fp4", "mxfp4", "nvfp4")
        return (
            f"float8 in blocks of {rows} x {columns}" + (", experts fp4" if four else ""),
            only(QUANTIZED, lambda m: WEIGHT_BITS["mxfp4"] if four and m.kind is Kind.expert else 8 + extra),
        )
    return "float8", only(QUANTIZED, lambda module: 8.0)


def rows(title: str, width: float, scale: float = 32) -> Callable[[Mapping[str, Any]], tuple[str, Bits]]:
    """Every linear layer in `width` bits with a scale a row."""
    return lambda c: (title, only(QUANTIZED, grouped(width, -1, scale)))


def blocks(title: str, width: float, size: int) -> Callable[[Mapping[str, Any]], tuple[str, Bits]]:
    """Every linear layer with an 8-bit scale for each `size`."""
    return lambda c: (title, only(QUANTIZED, grouped(width, size, 8)))


def mxfp4(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """As gpt-oss has it: experts alone."""
    return "mxfp4 experts", only((Kind.expert,), lambda module: WEIGHT_BITS["mxfp4"])


def compressed_tensors(c: Mapping[str, Any]) -> tuple[str, Bits]:
    groups = c["config_groups"]
    sparse: Any = c.get("sparsity_config")
    sparse = sparse if isinstance(sparse, Mapping) else {}
    if "bitmask" in str(sparse.get("format")) and "24" not in str(sparse.get("format")):
        raise ValueError(f"sparsity format {sparse['format']}")
    half = "24" in str(sparse.get("format", c.get("format", "")))  # two of four kept, and two bits for where each was
    rules: list[tuple[NamePatterns | None, Callable[[Module], float], str]] = []
    for name, group in groups.items():
        if isinstance(group, list):  # a preset by name: its targets
            targets, (width, label) = group, PRESETS[str(name).upper()]
        else:
            targets, (width, label) = group.get("targets", ["Linear"]), _scheme(group, str(c.get("format", "")))
        everything = any(t in ("Linear", "LinearBase", "FusedMoE") or str(t).endswith("MoE") for t in targets)
        rules.append((None if everything else NamePatterns(targets), _halved(width) if half else width, label))
    rules.sort(key=lambda rule: rule[0] is None)  # what is named wins over what is of a class

    def find(module: Module) -> float | None:
        if module.kind not in (*QUANTIZED, Kind.head):
            return None
        inside = module.kind is not Kind.head  # the output head only by name
        return next((b(module) for names, b, _ in rules if (inside if names is None else names.share(module))), None)

    labels = ", ".join(dict.fromkeys(label for *_, label in rules))
    return f"compressed-tensors {labels}{' 2:4 sparse' if half else ''}", find


def _halved(bits: Callable[[Module], float]) -> Callable[[Module], float]:
    return lambda module: bits(module) / 2 + 1


def _scheme(group: Mapping[str, Any], form: str) -> tuple[Callable[[Module], float], str]:
    """Bits and label of one group of compressed-tensors, ModelOpt or quark."""
    weights = group.get("weights")
    if weights is None:
        return (lambda module: 16.0), "16 bits"
    width, kind, size = weights["num_bits"], weights.get("type", "int"), weights.get("group_size")
    form = str(group.get("format") or form)
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if isinstance(block, list) and len(block) == 2 and strategy == "block":
        area = block[0] * block[1]
        return (lambda module: width + 16 / area), f"{kind}{width} in blocks of {block[0]} x {block[1]}"
    small = kind == "float" and width <= 8 and isinstance(size, int) and size > 0
    scale = 8 if small and (width == 4 or "mxfp" in form) else 16
    zero = width if weights.get("symmetric") is False else 0
    label = f"{kind}{width}" + (f" (groups of {size})" if isinstance(size, int) and size > 0 else "")
    if strategy == "tensor":
        return (lambda module: float(width)), label
    return grouped(width, size, scale, zero), label


PRESETS: dict[str, tuple[Callable[[Module], float], str]] = {
    "UNQUANTIZED": (lambda module: 16.0, "16 bits"),
    "W8A16": (grouped(8, -1), "int8"),
    "W4A16": (grouped(4, 128), "int4 (groups of 128)"),
    "W4A16_ASYM": (grouped(4, 128, zero=4), "int4 (groups of 128)"),
    "W4A8": (grouped(4, 128), "int4 (groups of 128)"),
    "W4AFP8": (grouped(4, 128), "int4 (groups of 128)"),
    "W8A8": (grouped(8, -1), "int8"),
    "INT8": (grouped(8, -1), "int8"),
    "FP8": (lambda module: 8.0, "float8"),
    "FP8_DYNAMIC": (grouped(8, -1), "float8"),
    "FP8_BLOCK": (lambda module: 8 + 16 / (128 * 128), "float8 in blocks of 128 x 128"),
    "NVFP4": (grouped(4, 16, 8), "nvfp4"),
    "NVFP4A16": (grouped(4, 16, 8), "nvfp4"),
    "MXFP4": (grouped(4, 32, 8), "mxfp4"),
    "MXFP4A16": (grouped(4, 32, 8), "mxfp4"),
    "MXFP8": (grouped(8, 32, 8), "mxfp8"),
    "MXFP8A16": (grouped(8, 32, 8), "mxfp8"),
}


def modelopt(c: Mapping[str, Any]) -> tuple[str, Bits]:
    layers = c.get("quantized_layers")
    if isinstance(layers, Mapping) and layers:
        rules = [(NamePatterns([name]), _modelopt_bits(own, c)) for name, own in layers.items()]

        def find(module: Module) -> float | None:
            if module.kind not in (*QUANTIZED, Kind.head):
                return None
            return next((bits(module) for names, bits in rules if names.share(module)), None)

        kinds = ", ".join(sorted({str(own.get("quant_algo")) for own in layers.values()}))
        return f"ModelOpt {kinds}", find
    if c.get("quant_algo") is None and isinstance(c.get("config_groups"), Mapping):
        title, found = compressed_tensors(c)
        return title.replace("compressed-tensors", "ModelOpt"), found
    return f"ModelOpt {c['quant_algo']}", only(QUANTIZED, _modelopt_bits(c, c))


def _modelopt_bits(own: Mapping[str, Any], c: Mapping[str, Any]) -> Callable[[Module], float]:
    algorithm = str(own["quant_algo"]).upper()
    group = own.get("group_size") or c.get("group_size")
    match algorithm:
        case "FP8" | "FP8_PER_TENSOR":
            return lambda module: 8.0
        case "FP8_PER_CHANNEL_PER_TOKEN" | "FP8_PC_PT" | "INT8_SQ" | "W8A8_SQ_PER_CHANNEL" | "INT8" | "W8A16":
            return grouped(8, -1, 32)
        case "FP8_PB_WO" | "FP8_PB_REAL" | "FP8_BLOCK_SCALES":
            return lambda module: 8 + 32 / (128 * 128)
        case "NVFP4" | "NVFP4_AWQ" | "W4A16_NVFP4" | "W4A8_NVFP4_FP8":
            return grouped(4, group or 16, 8)
        case "MXFP4" | "W4A8_MXFP4_FP8":
            return grouped(4, group or 32, 8)
        case "MXFP8":
            return grouped(8, group or 32, 8)
        case "W4A16_AWQ" | "W4A8_AWQ" | "INT4_AWQ" | "W4A16":
            return grouped(4, group or 128)
    raise ValueError(f"quant_algo {algorithm}")
