"""A model from numbers typed by hand: `layers=32 kv-heads=8 head-dim=128 weights=15GiB max-length=131072`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rayk.errors import ConfigError
from rayk.planning.model import CachedLayers, Model
from rayk.planning.weights import WEIGHT_BITS, Kind, Module, Weights, plain_bits
from rayk.quantity import parse_size

_COUNTS = ("layers", "kv-heads", "head-dim", "latent-dim", "query-heads", "max-length")
KEYS = (*_COUNTS, "weights", "parameters", "dtype")
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`a=1 b=2` or `b=2,c=3`, in any number of texts; a comma without a new key belongs to the value."""
    pairs: dict[str, str] = {}
    for word in (w for text in texts for w in re.split(r"[\s,]+(?=[A-Za-z][\w-]*=)|\s+", text.strip()) if w):
        key, equals, value = word.partition("=")
        key = key.strip().lower().replace("_", "-")
        if not equals or not value:
            raise ConfigError(f"{flag}: {word!r} is not of the form name=value")
        if key in pairs:
            raise ConfigError(f"{flag}: {key} is given twice")
        pairs[key] = value.strip()
    return pairs


def model_by_hand(texts: Sequence[str]) -> Model:
    """The model that --params describes; ConfigError names what is missing, unknown or makes no sense.

    A latent cache (MLA) has latent-dim instead of kv-heads and head-dim. The weights are a size, or a number of
    parameters in `dtype`.
    """
    given = parse_pairs(texts, "--params")
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise ConfigError(f"--params: {unknown[0]!r} is not one of {', '.join(KEYS)}")
    latent = "latent-dim" in given
    if latent and ("kv-heads" in given or "head-dim" in given):
        raise ConfigError("--params: latent-dim stands in place of kv-heads and head-dim; give one or the other")
    needed = ("layers", "latent-dim") if latent else ("layers", "kv-heads", "head-dim")
    missing = [key for key in needed if key not in given]
    if "weights" not in given and "parameters" not in given:
        missing.append("weights (such as 15GiB) or parameters (such as 8.03B)")
    if missing:
        raise ConfigError(f"--params: missing {', '.join(missing)}")
    numbers = {
        key: parse_tokens(given[key], "--params: max-length") if key == "max-length" else _count(key, given[key])
        for key in _COUNTS
        if key in given
    }
    dtype = given.get("dtype", "bfloat16")
    bits = plain_bits(dtype)
    parameters = _parameters(given["parameters"]) if "parameters" in given else None
    weights = None if parameters is None else Weights((Module("parameters", Kind.linear, parameters),))
    size = parse_size(given["weights"], 0) if "weights" in given else (weights or Weights(())).num_bytes(bits)
    if size < 1:
        raise ConfigError(f"--params: weights={given.get('weights')} is no size; write 15GiB or a number of bytes")
    layers, dim = numbers["layers"], numbers["latent-dim" if latent else "head-dim"]
    numbered = tuple(range(layers))
    cached = (
        CachedLayers(numbered, 1, dim, 0, latent=True)
        if latent
        else CachedLayers(numbered, numbers["kv-heads"], dim, dim)
    )
    return Model(
        name="model by hand",
        cached=(cached,),
        num_layers=layers,
        query_heads=numbers.get("query-heads"),
        max_length=numbers.get("max-length"),
        weights=weights,
        stored_bytes=size,
        dtype=dtype if WEIGHT_BITS[dtype] >= 16 else "bfloat16",
    )


def parse_tokens(text: str, flag: str) -> int:
    """A number of tokens: 131072, 128k (of 1024) or 1m."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text.strip().replace("_", "").replace(",", ""))
    factor = {"": 1, "k": 1 << 10, "m": 1 << 20}
    count = int(match[1]) * factor[match[2].lower()] if match else 0
    if not 1 <= count < 1 << 31:
        raise ConfigError(f"{flag} must be a number of tokens of at least 1, such as 131072 or 128k; got {text!r}")
    return count


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 31:
        raise ConfigError(f"--params: {key} must be a whole number of at least 1, got {text!r}")
    return int(text)


def _parameters(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.upper())
    if match is None or not 1 <= float(match[1]) * _FACTORS[match[2]] < 1e15:
        raise ConfigError(f"--params: parameters={text} is no number of parameters; write 8.03B or 8030261248")
    return int(float(match[1]) * _FACTORS[match[2]]) if match[2] else int(float(match[1]))
