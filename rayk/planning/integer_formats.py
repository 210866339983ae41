"""Checkpoints in groups of integers: GPTQ, AWQ, AutoRound, bitsandbytes, HQQ, torchao, quark, MLX and the like.

Each function takes a quantization config and gives its name for people and the bits of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayk.planning.weights import QUANTIZED, Bits, Kind, Module, NamePatterns, grouped, in_layers, only


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def names_in(value: Any) -> list[str]:
    return [n for n in value if isinstance(n, str)] if isinstance(value, list) else []


def _width(c: Mapping[str, Any]) -> Any:
    width = c["bits"]
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 1 <= width <= 16:
        raise ValueError(f"bits {width!r}")
    return width


def gptq(c: Mapping[str, Any]) -> tuple[str, Bits]:
    width, group = _width(c), c.get("group_size", 128)
    base = in_layers(grouped(width, group, zero=width), head=bool(c.get("lm_head")))
    dynamic = _object(c.get("dynamic"))
    rules = [(NamePatterns([f"re:.*(?:{k[2:] if k[:2] in ('+:', '-:') else k})"]), k, v) for k, v in dynamic.items()]
    inside = [n for names in c.get("modules_in_block_to_quantize") or () for n in names_in(names)]
    wanted = NamePatterns(inside)

    def find(module: Module) -> float | None:
        for names, key, change in rules:
            if names.names(module.name) or any(names.names(n) for n in _one_of(module)):
                if key.startswith("-:"):
                    return None
                own = change.get("bits", width)
                return grouped(own, change.get("group_size", group), zero=own)(module)
        return None if wanted and not wanted.share(module) else base(module)

    return f"GPTQ int{width} (groups of {group})", find


def _one_of(module: Module) -> tuple[str, ...]:
    what = module.name.rpartition(".experts.")[2]
    return (module.name.replace(f".experts.{what}", f".experts.0.{what}"),) if ".experts." in module.name else ()


def awq(c: Mapping[str, Any]) -> tuple[str, Bits]:
    width = c["bits"] if "bits" in c else c.get("w_bit", 4)
    group = c["group_size"] if "group_size" in c else c.get("q_group_size", 128)
    return f"AWQ int{width} (groups of {group})", in_layers(grouped(width, group, zero=width))


def auto_round(c: Mapping[str, Any]) -> tuple[str, Bits]:
    width, group, kind = _width(c), c.get("group_size", 128), str(c.get("data_type", "int"))
    extra = _object(c.get("extra_config"))
    own = [(NamePatterns([name if set(name).isdisjoint("\\[(^$") else f"re:{name}"]), v) for name, v in extra.items()]

    def bits(settings: Mapping[str, Any]) -> Callable[[Module], float]:
        w, g = settings.get("bits", width), settings.get("group_size", group)
        if w >= 16:
            return lambda module: 16.0
        if "fp" in kind:
            return grouped(w, g, 8)
        return grouped(w, g, zero=w)

    base = in_layers(bits({}))

    def find(module: Module) -> float | None:
        for names, settings in own:
            if module.kind in (*QUANTIZED, Kind.head) and names.share(module):
                return bits(settings)(module)
        return base(module)

    return f"AutoRound {kind}{width} (groups of {group})", find


def bitsandbytes(c: Mapping[str, Any]) -> tuple[str, Bits]:
    skipped = NamePatterns(names_in(c.get("llm_int8_skip_modules")))
    if c.get("load_in_4bit") or c.get("_load_in_4bit"):
        twice = bool(c.get("bnb_4bit_use_double_quant"))
        # a 32-bit scale for each 64; quantized again, 8 bits and a 32-bit scale for each 256 of those
        width = 4 + (8 / 64 + 32 / (64 * 256) if twice else 32 / 64)
        title = f"bitsandbytes {c.get('bnb_4bit_quant_type', 'fp4')}{' with double quantization' if twice else ''}"
        found = only(QUANTIZED, lambda module: width)
    elif c.get("load_in_8bit") or c.get("_load_in_8bit"):
        title, found = "bitsandbytes int8", only(QUANTIZED, grouped(8, -1, 32))
    else:
        raise ValueError("load_in_4bit")
    return title, lambda module: None if skipped and skipped.share(module) == 1 else found(module)


def hqq(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """A 16-bit scale and zero point for each group."""
    config = c.get("quant_config", c)
    by_layer = {
        k: v["weight_quant_params"] for k, v in config.items() if isinstance(v, Mapping) and "weight_quant_params" in v
    }
    own = config.get("weight_quant_params") or (None if by_layer else c)
    if own is None:
        rules = [(NamePatterns([name]), grouped(v["nbits"], v.get("group_size"), 32)) for name, v in by_layer.items()]
        return "HQQ by layer", lambda m: next(
            (b(m) for names, b in rules if m.kind in QUANTIZED and names.share(m)), None
        )
    width, group = own["nbits"], own.get("group_size", 64)
    return f"HQQ int{width} (groups of {group})", only(QUANTIZED, grouped(width, group, 32))


def mlx(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """Embeddings, output head and routers too; a 16-bit scale and bias for each group, or 8-bit scales in fp modes."""
    own = {name: value for name, value in c.items() if isinstance(value, (Mapping, bool)) and name != "quantization"}
    rules = [(NamePatterns([name]), value) for name, value in own.items()]

    def bits(settings: Mapping[str, Any]) -> Callable[[Module], float]:
        extra = 32 if str(settings.get("mode", "affine")) == "affine" else 8
        return grouped(settings.get("bits", c["bits"]), settings.get("group_size", c.get("group_size", 64)), extra)

    whole = bits(c)

    def find(module: Module) -> float | None:
        if module.kind is Kind.rest and not module.fan_in:
            return None
        for names, value in rules:
            if names.share(module):
                return None if value is False else (bits(value) if isinstance(value, Mapping) else whole)(module)
        return whole(module)

    return f"MLX {c.get('mode', 'affine')} int{_width(c)} (groups of {c.get('group_size', 64)})", find


def exl(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """ExLlama: a mean number of bits, and another for the output head."""
    width, head = float(_width(c)), float(c.get("head_bits", 16))
    return (
        f"{c['quant_method']} {width:g} bits",
        lambda m: head if m.kind is Kind.head else in_layers(lambda _: width)(m),
    )


def torchao(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """By the name of the quantization, in the two ways that transformers writes it."""
    kind = c["quant_type"]
    kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
    data = kind.get("_data", {}) if isinstance(kind, Mapping) else c.get("quant_type_kwargs") or {}
    if "fqn_to_config" in str(list(data)):
        by_name = next(v for k, v in data.items() if "fqn_to_config" in k)
        by_name = by_name.get("_data", by_name) if isinstance(by_name, Mapping) and "_data" in by_name else by_name
        rules = [
            (n, None if v is None else _torchao_bits(str(v["_type"]), v.get("_data", {}))) for n, v in by_name.items()
        ]
        rest = next((b for n, b in rules if n == "_default"), None)
        named = [(NamePatterns([n]), b) for n, b in rules if n != "_default"]

        def find(module: Module) -> float | None:
            for names, own in named:
                if module.kind is not Kind.rest and names.share(module):
                    head = 0.0  # a tied one is written out beside the embeddings
                    if module.kind is Kind.embedding and c.get("untie_embedding_weights"):
                        head = 16.0 if rest is None else rest(module)
                    return (16.0 if own is None else own(module)) + head if head or own is not None else None
            return rest(module) if rest is not None and module.kind in QUANTIZED else None

        return "torchao by module", find
    name = str(kind["_type"] if isinstance(kind, Mapping) else kind)
    kinds = (*QUANTIZED, Kind.embedding, Kind.head) if c.get("include_input_output_embeddings") else QUANTIZED
    return f"torchao {name}", only(kinds, _torchao_bits(name, data))


def _torchao_bits(name: str, data: Mapping[str, Any]) -> Callable[[Module], float]:
    low = name.lower().replace("_", "")
    group = data.get("group_size")
    granularity = data.get("granularity") or data.get("weight_granularity")
    if group is None and isinstance(granularity, Mapping):
        group = granularity.get("_data", {}).get("group_size", -1)
    if "intx" in low or "uintx" in low:
        dtype = data.get("weight_dtype") or data.get("dtype") or {}
        text = str(dtype.get("_data", dtype) if isinstance(dtype, Mapping) else dtype)
        return grouped(int("".join(filter(str.isdigit, text))[-1]), 32 if group is None else group, 16, 8)
    if "nvfp4" in low:
        return grouped(4, 16, 8)
    if "mxfp4" in low or ("mx" in low and "fp4" in str(data).lower()):
        return grouped(4, 32, 8)
    if "mxfp8" in low:
        return grouped(8, 32, 8)
    if (
        "int4weight" in low.replace("only", "")
        or "int4weightonly" in low
        or low.startswith("float8dynamicactivationint4")
    ):
        return grouped(4, 128 if group is None else group, 16, 16)
    if "int8dynamicactivationint4" in low:
        return grouped(4, 32 if group is None else group, 32)
    if "int8" in low or "float8" in low:
        return grouped(8, -1, 32)
    raise ValueError(f"torchao {name}")


def quark(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """A scheme for all layers, and others by the names of layers."""
    rules = [(NamePatterns([name]), _quark_bits(own)) for name, own in (c.get("layer_quant_config") or {}).items()]
    whole, label = _quark_bits(c["global_quant_config"]), _quark_weight(c["global_quant_config"])
    title = "quark " + (str(label.get("dtype")) if label else "16 bits")

    def find(module: Module) -> float | None:
        if module.kind not in (*QUANTIZED, Kind.head):
            return None
        return next((own(module) for names, own in rules if names.share(module)), whole(module))

    return title, find


def _quark_weight(scheme: Any) -> Mapping[str, Any] | None:
    weight = scheme.get("weight") if isinstance(scheme, Mapping) else None
    weight = weight[-1] if isinstance(weight, list) and weight else weight
    return weight if isinstance(weight, Mapping) else None


def _quark_bits(scheme: Any) -> Callable[[Module], float]:
    weight = _quark_weight(scheme)
    if weight is None:
        return lambda module: 16.0
    name = str(weight["dtype"])
    width = int(next(d for d in name.replace("uint", "int").removeprefix("mx_") if d.isdigit()))
    if name.startswith(("bfloat16", "float16", "float32")):
        return lambda module: 16.0
    group = weight.get("group_size") if "group" in str(weight.get("qscheme")) else -1
    small = name.startswith(("fp4", "mx", "fp6")) or "e8m0" in str(weight.get("scale_format"))
    return grouped(width, group, 8 if small else 16, 0 if small or weight.get("symmetric", True) else width)


def aqlm(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """Codes into codebooks, which each module has of its own."""
    codes, width, group = c["num_codebooks"], c["nbits_per_codebook"], c["in_group_size"] * c.get("out_group_size", 1)
    books, skipped = codes * 2**width * group * 16, NamePatterns(names_in(c.get("linear_weights_not_to_quantize")))

    def find(module: Module) -> float | None:
        if skipped and skipped.share(module):
            return None
        return in_layers(lambda m: codes * width / group + books * max(1, m.members) / m.size)(module)

    return f"AQLM {codes} x {width} bits for {group}", find


def quanto(c: Mapping[str, Any]) -> tuple[str, Bits]:
    name = str(c["weights"])
    width = int("".join(filter(str.isdigit, name)))
    return f"quanto {name}", only(QUANTIZED, grouped(width, 128 if width < 8 else -1, 16, 16 if width < 8 else 0))


def fixed(
    title: str, width: float, group: int = -1, scale: float = 16
) -> Callable[[Mapping[str, Any]], tuple[str, Bits]]:
    """A method with one format."""
    return lambda c: (title, only(QUANTIZED, grouped(width, group, scale)))


def fp_quant(c: Mapping[str, Any]) -> tuple[str, Bits]:
    nv = "nv" in str(c.get("forward_dtype", "mxfp4"))
    return (
        ("FP-Quant nvfp4", only(QUANTIZED, grouped(4, 16, 8)))
        if nv
        else ("FP-Quant mxfp4", only(QUANTIZED, grouped(4, 32, 8)))
    )


def higgs(c: Mapping[str, Any]) -> tuple[str, Bits]:
    """`p` values share a code of as many times `bits`; a scale for each group."""
    return f"HIGGS int{_width(c)}", only(QUANTIZED, grouped(_width(c), c.get("group_size", 256), 16))
