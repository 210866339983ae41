"""How a checkpoint stores its weights: from a quantization config to bits of each module, and the cache's dtype.

Bits of a parameter contain its share of the scales and zero points of its group. What a method is known to leave alone
(embeddings, output head, norms, routers) stays as it was, and so does what the config lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rayk.planning import float_formats as floats
from rayk.planning import integer_formats as integers
from rayk.planning.weights import WEIGHT_BITS, Bits, Kind, Module, NamePatterns

FP8_CACHE = "float8_e4m3fn"
SKIPPED = ("ignore", "modules_to_not_convert", "exclude_modules", "exclude", "ignored_layers", "skip_modules")


@dataclass(frozen=True)
class Storage:
    """How weights are stored. `title` is for people; `bits` gives those of a parameter of a module.

    `cache_dtype` is the cache's dtype that the checkpoint asks for, `notes` what to say of it.
    """

    title: str
    bits: Callable[[Module], float]
    cache_dtype: str | None = None
    notes: tuple[str, ...] = ()


class UnknownQuantization(Exception):
    """A method whose sizes are not known here; its text names it."""


def storage(config: Mapping[str, Any], dtype: str) -> Storage:
    """What a quantization config says, or a plain checkpoint in `dtype` if it is empty. UnknownQuantization if it
    cannot be understood."""
    plain = WEIGHT_BITS[dtype]
    if not config:
        return Storage(dtype, lambda module: plain)
    if isinstance(inner := config.get("quantization"), Mapping):  # as ModelOpt nests it
        config = {**config, **inner}
    title, quantized = _method(config)
    skipped = NamePatterns(name for key in SKIPPED for name in integers.names_in(config.get(key)))

    def bits(module: Module) -> float:
        found = quantized(module)
        if found is None:
            return plain
        left = skipped.share(module) if skipped else 0.0
        return (1 - left) * found + left * plain

    cache, notes = _cache_dtype(config)
    return Storage(f"{title}, the rest {dtype}", bits, cache, notes)


def _method(config: Mapping[str, Any]) -> tuple[str, Bits]:
    """The method's name for people, and its bits, None for what it leaves alone."""
    name = str(config.get("quant_method") or "").lower().replace("_", "-")
    if not name and ("quant_algo" in config):
        name = "modelopt"
    if not name and isinstance(config.get("bits"), int) and ("group_size" in config or "mode" in config):
        name = "mlx" if config.get("damp_percent") is None and "desc_act" not in config else "gptq"
    if not name and ("w_bit" in config or "q_group_size" in config):
        name = "awq"
    if not name and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        name = "bitsandbytes"
    read = _METHODS.get(name) or next((_METHODS[n] for n in _METHODS if name.startswith(f"{n}-")), None)
    if read is None:
        raise UnknownQuantization(f"weights quantized with {name or 'an unnamed method'!r}")
    try:
        title, bits = read(config)
        tried = bits(Module("model.layers.0.mlp.down_proj", Kind.linear, 1 << 24, 1 << 12))
        if tried is not None and not 0 < tried <= 32:
            raise ValueError(f"{tried} bits")
    except Exception as error:  # a config may hold anything where a number is expected
        raise UnknownQuantization(f"weights quantized with {name!r}, in which {error!r} is not understood,") from None
    return title, bits


def _cache_dtype(c: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The dtype of keys and values that a checkpoint has scales for."""
    scheme = c.get("kv_cache_scheme") or c.get("kv_cache_quant_config")
    algorithm = str(c.get("kv_cache_quant_algo") or "").upper()
    if "FP8" in algorithm or (isinstance(scheme, Mapping) and scheme):
        return FP8_CACHE, ()
    if algorithm in ("", "NONE"):
        return None, ()
    return FP8_CACHE, (f"the checkpoint asks for a cache in {algorithm}, which pages do not have; float8 is planned",)


_METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[str, Bits]]] = {
    "aqlm": integers.aqlm,
    "auto-round": integers.auto_round,
    "awq": integers.awq,
    "bitnet": integers.fixed("BitNet, 2 bits", 2),
    "bitsandbytes": integers.bitsandbytes,
    "compressed-tensors": floats.compressed_tensors,
    "eetq": integers.fixed("EETQ int8", 8),
    "exl2": integers.exl,
    "exl3": integers.exl,
    "fbgemm-fp8": floats.rows("fbgemm float8", 8),
    "fp-quant": integers.fp_quant,
    "fp8": floats.fp8,
    "gptq": integers.gptq,
    "higgs": integers.higgs,
    "hqq": integers.hqq,
    "intel/auto-round": integers.auto_round,
    "mlx": integers.mlx,
    "modelopt": floats.modelopt,
    "mxfp4": floats.mxfp4,
    "mxfp8": floats.blocks("mxfp8", 8, 32),
    "nvfp4": floats.blocks("nvfp4", 4, 16),
    "quanto": integers.quanto,
    "quark": integers.quark,
    "torchao": integers.torchao,
}
