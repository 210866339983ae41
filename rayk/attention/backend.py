"""What an attention backend is, what it may be asked for, and the one function that calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from rayk.attention.batch import PagedBatch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Rules:
    """How scores are made and which keys a query sees; causal always.

    scale: factor of query times key. window: keys that a query sees, itself included; None for all before it.
    softcap: scores become softcap * tanh(score / softcap). sinks: `[query heads]`, one more score per head that takes
    weight and has no value (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """What a model asks of a backend, known before the first call."""

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    page_size: int
    softcap: bool = False
    sinks: bool = False


class Backend(Protocol):
    """One way to attend over pages."""

    @property
    def name(self) -> str:
        """How it is chosen by hand and shown."""

    def unfit(self, needs: Needs) -> str | None:
        """Why it cannot do that here, or None."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
    ) -> torch.Tensor:
        """Shapes as in rayk.attention.attend(). Called only with needs that unfit() had nothing against."""
