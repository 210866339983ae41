"""Projections of the same input as one product: q, k and v of an attention, gate and up of an MLP.

Their matrices lie one below the other, and each module's own is a view of its part, so that weights may still be
changed in place. The first of them that is called with an input computes all, the others take what is theirs. Done on
CUDA alone: on a CPU it costs a percent or two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Product(threading.local):
    """The product of several projections with an input, until each has taken its part; for each thread its own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int]) -> None:
        self._weight = weight
        self._bias = bias
        self._sizes = list(sizes)
        self._input: torch.Tensor | None = None
        self._found: list[torch.Tensor | None] = [None] * len(sizes)

    def take(self, number: int, given: torch.Tensor) -> torch.Tensor:
        """Projection `number` of the input."""
        found = self._found[number] if self._input is given else None
        if found is None:
            parts = torch.split(nn.functional.linear(given, self._weight, self._bias), self._sizes, dim=-1)
            self._input, self._found, found = given, list(parts), parts[number]
        self._found[number] = None
        if not any(part is not None for part in self._found):
            self._input = None
        return found


def fuse(model: Any) -> bool:
    """Fuse what can be in a model that stays where it is; whether there was any."""
    groups = list(_groups(model))
    for parts in groups:
        weight = torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        sizes = [part.out_features for part in parts]
        product = _Product(weight, bias, sizes)
        for number, part in enumerate(parts):
            part.weight = nn.Parameter(torch.split(weight, sizes)[number], requires_grad=False)
            if bias is not None:
                part.bias = nn.Parameter(torch.split(bias, sizes)[number], requires_grad=False)
            part.forward = partial(product.take, number)  # type: ignore[method-assign]  # a module's forward is looked up on it
    return bool(groups)


def part_again(model: Any) -> None:
    """Take fuse() back: each projection by itself."""
    for parts in _groups(model, fused=True):
        for part in parts:
            del part.forward


def _groups(model: Any, fused: bool = False) -> Iterator[list[nn.Linear]]:
    """Projections that are fused, or can be: plain layers over the same features, alike in dtype, place and bias."""
    for module in model.modules():
        for names in GROUPS:
            found = [getattr(module, name, None) for name in names]
            parts = [part for part in found if type(part) is nn.Linear and (_is_fused(part) if fused else _plain(part))]
            kinds = {(part.in_features, part.weight.dtype, part.weight.device, part.bias is None) for part in parts}
            if len(parts) == len(names) and len(kinds) == 1:
                yield parts


def _plain(part: nn.Linear) -> bool:
    return "forward" not in vars(part) and type(part.weight) is nn.Parameter and part.weight.is_floating_point()


def _is_fused(part: nn.Linear) -> bool:
    forward = vars(part).get("forward")
    return isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), _Product)
