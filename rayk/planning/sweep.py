"""Variants of one question, compared: `tp=1,2,4 page-size=16,128`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayk.errors import ConfigError, RaykError
from rayk.planning.manual_model import parse_pairs, parse_tokens
from rayk.planning.nodes import ClusterMemoryPlan
from rayk.planning.plan_request import PlanQuestion

MOST_VARIANTS = 256
_READ: dict[str, Callable[[str], Any]] = {
    "tp": int,
    "dp": int,
    "pp": int,
    "attention_dp": int,
    "page_size": int,
    "max_length": lambda text: parse_tokens(text, "--sweep: max-length"),
    "max_batch_tokens": lambda text: parse_tokens(text, "--sweep: max-batch-tokens"),
    "max_batch_size": int,
    "utilization": float,
    "kv_dtype": str,
    "weights_dtype": str,
    "gpu": str,
}


@dataclass(frozen=True)
class Variant:
    """One combination and its plan; or the error that says why it has none."""

    changes: tuple[tuple[str, Any], ...]
    plan: ClusterMemoryPlan | None
    error: str | None = None


def parse_sweep(texts: Sequence[str]) -> list[tuple[tuple[str, Any], ...]]:
    """All combinations of the values, the last name varying fastest. ConfigError for names or values that are none."""
    axes = []
    for key, text in parse_pairs(texts, "--sweep").items():
        name = key.replace("-", "_")
        if name not in _READ:
            raise ConfigError(f"--sweep: {key!r} is not one of {', '.join(n.replace('_', '-') for n in _READ)}")
        try:
            axes.append([(name, _READ[name](value)) for value in text.split(",") if value])
        except ValueError:
            raise ConfigError(f"--sweep: {key}={text} has a value that is no number") from None
    count = 1
    for axis in axes:
        count *= len(axis)
    if not axes or count > MOST_VARIANTS:
        raise ConfigError(f"--sweep: {count if axes else 0} variants; write 1 to {MOST_VARIANTS}, as in tp=1,2,4")
    return list(itertools.product(*axes))


def sweep(question: PlanQuestion, variants: Sequence[tuple[tuple[str, Any], ...]]) -> list[Variant]:
    """Each variant planned; one that is refused keeps its reason."""
    if question.gpu is None and any(name == "gpu" for changes in variants for name, _ in changes):
        raise ConfigError("--sweep gpu=..: this plan is made for measured GPUs; name one with --gpu to compare others")
    found = []
    for changes in variants:
        try:
            found.append(Variant(changes, question.changed(changes).plan()))
        except RaykError as error:
            found.append(Variant(changes, None, str(error)))
    return found
