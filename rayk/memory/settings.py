"""What a memory plan is made for: everything but the model and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayk.memory.weights import WeightBits
from rayk.params import dtype_name, require, require_at_least

MOST_DEVICES = 8192


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of a plan, validated when made. Sizes in bytes; None: not asked for.

    `activation_reserve` is per GPU, as is `largest_allocation`, a device's limit on one buffer. `max_batch_size`
    together with a length caps the pages: more could not be used by running requests.
    """

    tp: int = 1
    dp: int = 1
    page_size: int = 128
    kv_dtype: str = "bfloat16"
    weights_dtype: str | None = None
    utilization: float = 0.9
    max_length: int | None = None
    max_batch_size: int | None = None
    activation_reserve: int = 0
    largest_allocation: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, tp=self.tp, dp=self.dp, page_size=self.page_size)
        devices = self.tp * self.dp
        require(devices <= MOST_DEVICES, f"tp x dp = {devices} devices; at most {MOST_DEVICES} can be planned")
        require_at_least(0, activation_reserve=self.activation_reserve)
        optional = {n: getattr(self, n) for n in ("max_length", "max_batch_size", "largest_allocation")}
        require_at_least(1, **{name: value for name, value in optional.items() if value is not None})
        known = isinstance(self.utilization, (int, float)) and math.isfinite(self.utilization)
        require(
            known and 0 < self.utilization <= 1,
            f"utilization is a share of the memory, above 0 and at most 1; got {self.utilization!r}",
        )
        object.__setattr__(self, "kv_dtype", dtype_name(self.kv_dtype))
        if self.weights_dtype is not None:
            WeightBits.of(self.weights_dtype)
