"""The parameters of a model by the module that holds them, and the bytes that they take in a format."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from rayk.errors import ConfigError

# Bits of one parameter, its share of scales included: int4 as written by GPTQ and AWQ (groups of 128 with a 16-bit
# scale and a 4-bit zero point), mxfp4 by the OCP microscaling specification (blocks of 32 with an 8-bit scale), nvfp4
# with an 8-bit scale for each 16.
WEIGHT_BITS = {
    "float32": 32.0,
    "float16": 16.0,
    "bfloat16": 16.0,
    "float8_e4m3fn": 8.0,
    "float8_e5m2": 8.0,
    "int8": 8.0,
    "int4": 4 + 20 / 128,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
}


class Kind(StrEnum):
    """What quantization treats alike. `rest`: norms, biases, routers, convolutions."""

    linear = "linear"
    expert = "expert"
    embedding = "embedding"
    head = "head"
    rest = "rest"


class Module(NamedTuple):
    """The `size` parameters of one module, or of all the experts of a layer together.

    `name` is dotted, as in `model.layers.3.mlp.down_proj`; the experts of a layer are `..mlp.experts.down_proj`.
    `fan_in` is the number of columns that groups of a scale run along, 0 where unknown; `members` the number of
    experts.
    """

    name: str
    kind: Kind
    size: int
    fan_in: int = 0
    members: int = 0


LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)(?:\.|$)")
_TOWER = re.compile(r"(^|[._])(vision|visual|audio|vit|image|siglip|clip|encoder)")


def layer_of(module: Module) -> int | None:
    """The number of the text layer that the module belongs to; None for what is outside of them."""
    return _place(module.name)[0]


def in_tower(module: Module) -> bool:
    """Whether it belongs to an encoder of images or sound."""
    return _place(module.name)[1]


@lru_cache(1 << 14)
def _place(name: str) -> tuple[int | None, bool]:
    """Text layer and tower of a name. Plans that are compared ask for the same names again and again."""
    tower = _TOWER.search(name) is not None
    found = None if tower else LAYER.search(name)
    return (int(found[1]) if found else None), tower


@dataclass(frozen=True)
class Weights:
    """All modules of a model; what is tied counts once."""

    modules: tuple[Module, ...]

    @classmethod
    def of(cls, modules: Iterable[Module]) -> Weights:
        return cls(tuple(module for module in modules if module.size))

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(module.size for module in self.modules)

    def num_bytes(self, bits: Callable[[Module], float]) -> int:
        """Bytes in memory, rounded up."""
        return math.ceil(sum(module.size * bits(module) for module in self.modules) / 8)

    def share(self, wanted: Callable[[Module], bool], bits: Callable[[Module], float]) -> float:
        """The part of the bytes that is in the wanted modules."""
        total = sum(module.size * bits(module) for module in self.modules)
        return sum(module.size * bits(module) for module in self.modules if wanted(module)) / total if total else 0.0


def plain_bits(dtype: str) -> Callable[[Module], float]:
    """All in that dtype; below 16 bits only linear layers and experts are, the rest stays in 16."""
    if dtype not in WEIGHT_BITS:
        raise ConfigError(f"weights dtype {dtype!r} is not one of {', '.join(WEIGHT_BITS)}")
    bits = WEIGHT_BITS[dtype]
    if bits >= 16:
        return lambda module: bits
    return lambda module: bits if module.kind in (Kind.linear, Kind.expert) else 16.0


class NamePatterns:
    """Which modules a list of names means: parts of dotted names, globs, or regular expressions after `re:`.

    Names differ between a checkpoint and transformers in the prefixes `model.` and `language_model.`, which are not
    compared, and in the experts of a layer, which may be listed one by one.
    """

    def __init__(self, patterns: Iterable[object]) -> None:
        texts = [p.strip() for p in patterns if isinstance(p, str) and p.strip()]
        self._regular = [_compiled(p[3:]) for p in texts if p.startswith("re:")]
        self._globs = [_glob(p) for p in texts if not p.startswith("re:")]
        self._one_by_one = any(re.search(r"experts\.\d", p) for p in texts)

    def __bool__(self) -> bool:
        return bool(self._regular or self._globs)

    def share(self, module: Module) -> float:
        """The part of the module that is meant: 0, 1, or for experts in between."""
        if ".experts" not in module.name or not module.members:
            return float(self.names(module.name))
        experts = range(module.members if self._one_by_one else 1)
        meant = sum(any(map(self.names, _expert_names(module.name, n))) for n in experts)
        return max(meant / len(experts), float(self.names(module.name)))

    def names(self, name: str) -> bool:
        """Whether that name is meant."""
        short = _short(name)
        if any(pattern.search("." + short + ".") for pattern in self._globs):
            return True
        spelled = (name, short, f"model.{short}", f"language_model.model.{short}", f"model.language_model.{short}")
        return any(pattern.match(s) for pattern in self._regular for s in spelled)


def _short(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error:
        return re.compile(re.escape(text))


def _glob(pattern: str) -> re.Pattern[str]:
    """A run of whole parts of a dotted name; `*` stands for anything."""
    parts = re.escape(_short(pattern.strip(".").removesuffix(".weight"))).replace(r"\*", ".*")
    return re.compile(rf"\.{parts}\." if pattern[:1] != "*" else rf"{parts}\.")


def _expert_names(name: str, number: int) -> Sequence[str]:
    """The names that one expert's part of fused experts has in checkpoints."""
    before, _, what = name.partition(".experts")
    what = what.strip(".")
    projections = ("gate_proj", "up_proj") if "gate_up" in what else (what,)
    return [f"{before}.experts.{number}.{p}" for p in projections if p] or [f"{before}.experts.{number}"]


Bits = Callable[[Module], float | None]  # of a parameter; None: it stays as it was
QUANTIZED = (Kind.linear, Kind.expert)


def grouped(bits: float, group: Any, scale: float = 16, zero: float = 0) -> Callable[[Module], float]:
    """Bits of a parameter whose group of `group` shares a scale and a zero point; a row has one where group is -1."""
    if isinstance(group, bool) or not isinstance(group, int) or group <= 0:
        return lambda module: bits + ((scale + zero) / module.fan_in if module.fan_in else 0.0)
    return lambda module: bits + (scale + zero) / group


def only(kinds: tuple[Kind, ...], bits: Callable[[Module], float]) -> Bits:
    return lambda module: bits(module) if module.kind in kinds else None


def in_layers(bits: Callable[[Module], float], head: bool = False) -> Bits:
    """Linear layers and experts of the text model's layers, and its output head if `head`."""

    def find(module: Module) -> float | None:
        inside = module.kind in QUANTIZED and layer_of(module) is not None
        return bits(module) if inside or (head and module.kind is Kind.head) else None

    return find
