"""How many parameters a model has, by what quantization treats alike, and the bytes that they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayk.errors import ConfigError

# Bits of one parameter, its share of scales included: int4 as written by GPTQ and AWQ (groups of 128 with a 16-bit
# scale and a 4-bit zero point), mxfp4 by the OCP microscaling specification (blocks of 32 with an 8-bit scale).
WEIGHT_BITS = {
    "float32": 32.0,
    "float16": 16.0,
    "bfloat16": 16.0,
    "float8_e4m3fn": 8.0,
    "float8_e5m2": 8.0,
    "int8": 8.0,
    "int4": 4 + 20 / 128,
    "mxfp4": 4 + 8 / 32,
}


@dataclass(frozen=True)
class Weights:
    """Parameter counts. Quantization leaves `rest` alone: embeddings, output head, norms, routers, biases."""

    experts: int = 0
    linears: int = 0
    rest: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.experts + other.experts, self.linears + other.linears, self.rest + other.rest)

    def __mul__(self, times: int) -> Weights:
        return Weights(self.experts * times, self.linears * times, self.rest * times)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.experts + self.linears + self.rest

    def num_bytes(self, bits: WeightBits) -> int:
        """Bytes in memory, rounded up."""
        return math.ceil((self.experts * bits.experts + self.linears * bits.linears + self.rest * bits.rest) / 8)


@dataclass(frozen=True)
class WeightBits:
    """Bits of a parameter of each kind, scales included."""

    experts: float
    linears: float
    rest: float

    @classmethod
    def of(cls, dtype: str, rest: str = "bfloat16") -> WeightBits:
        """All weights in `dtype`; what quantization leaves alone stays in `rest` when `dtype` is below 16 bits."""
        if dtype not in WEIGHT_BITS:
            raise ConfigError(f"weights dtype {dtype!r} is not one of {', '.join(WEIGHT_BITS)}")
        bits = WEIGHT_BITS[dtype]
        return cls(bits, bits, bits if bits >= 16 else WEIGHT_BITS[rest])


def checkpoint_bits(quantization: Mapping[str, Any] | None, dtype: str) -> WeightBits | None:
    """The bits of a checkpoint from its `quantization_config`; None for a method that is not known here."""
    plain = WEIGHT_BITS[dtype]
    if not quantization:
        return WeightBits(plain, plain, plain)
    bits = _quantized_bits(quantization)
    if bits is None:
        return None
    # gpt-oss quantizes its experts alone; the other methods all linear layers.
    return WeightBits(bits, plain if quantization.get("quant_method") == "mxfp4" else bits, plain)


def _quantized_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits of a quantized parameter: its own and its share of the group's scale and zero point."""
    match quantization:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
            return 8 + 32 / (rows * columns)
        case {"quant_method": "fp8" | "fbgemm_fp8"}:
            return 8.0
        case {"quant_method": "mxfp4"}:
            return WEIGHT_BITS["mxfp4"]
        case {"quant_method": "gptq" | "awq", "bits": int(bits)} if 1 <= bits <= 8:
            group = quantization.get("group_size", 128)
            return bits + (16 + bits) / group if isinstance(group, int) and group > 0 else float(bits)
        case {"quant_method": "bitsandbytes", "load_in_4bit": True}:
            return 4.5  # blocks of 64 with a 32-bit scale
        case {"quant_method": "bitsandbytes", "load_in_8bit": True}:
            return 8.0
        case {"quant_method": "compressed-tensors", "config_groups": {**groups}}:
            return _group_bits([group for group in groups.values() if isinstance(group, Mapping)])
    return None


def _group_bits(groups: list[Mapping[str, Any]]) -> float | None:
    """The widest of compressed-tensors' groups, so that a plan never has too little."""
    found = []
    for group in groups:
        match group.get("weights"):
            case {"num_bits": int(bits), "group_size": int(size)} if size > 0:
                found.append(bits + 16 / size)
            case {"num_bits": int(bits)}:
                found.append(float(bits))
    return max(found, default=None)
