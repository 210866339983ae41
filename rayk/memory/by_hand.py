"""A model from numbers typed by hand: `layers=32 kv-heads=8 head-dim=128 weights=15GiB max-length=131072`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rayk.bench.quantity import parse_size
from rayk.errors import ConfigError
from rayk.memory.model import Model
from rayk.memory.weights import WeightBits, Weights

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
    numbers = {key: _count(key, given[key]) for key in _COUNTS if key in given}
    dtype = given.get("dtype", "bfloat16")
    bits = WeightBits.of(dtype)
    parameters = _parameters(given["parameters"]) if "parameters" in given else None
    weights = None if parameters is None else Weights(linears=parameters)
    size = parse_size(given["weights"], 0) if "weights" in given else (weights or Weights()).num_bytes(bits)
    if size < 1:
        raise ConfigError(f"--params: weights={given.get('weights')} is no size; write 15GiB or a number of bytes")
    return Model(
        name="model by hand",
        layers=numbers["layers"],
        kv_heads=1 if latent else numbers["kv-heads"],
        head_dim=numbers["latent-dim" if latent else "head-dim"],
        query_heads=numbers.get("query-heads"),
        latent=latent,
        max_length=numbers.get("max-length"),
        weights=weights,
        weight_bytes=size,
        dtype=dtype if bits.linears >= 16 else "bfloat16",
    )


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 31:
        raise ConfigError(f"--params: {key} must be a whole number of at least 1, got {text!r}")
    return int(text)


def _parameters(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.upper())
    if match is None or not 1 <= float(match[1]) * _FACTORS[match[2]] < 1e15:
        raise ConfigError(f"--params: parameters={text} is no number of parameters; write 8.03B or 8030261248")
    return int(float(match[1]) * _FACTORS[match[2]]) if match[2] else int(float(match[1]))
