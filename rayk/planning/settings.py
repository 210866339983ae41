"""What a memory plan is made for: everything but the model and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayk.params import dtype_name, require, require_at_least
from rayk.planning.weights import plain_bits

MOST_DEVICES = 8192
GPUS_OF_A_NODE = 8
STATIC = -1  # as an activation reserve: only what stays allocated while nothing runs


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of a plan, validated when made. Sizes in bytes; None: not asked for.

    A replica has tp x pp GPUs. `attention_dp` groups of tp / attention_dp GPUs each have all attention weights and a
    cache of their own, while experts are spread over all tp of them. `kv_dtype` None: the checkpoint's own.
    `activation_reserve` is per GPU: None estimates it, STATIC leaves activations to what the utilization keeps free;
    `measured_activations` stand in place of the estimated ones.
    `largest_allocation` is a device's limit on one buffer. `max_batch_tokens` are those of the largest forward.
    `max_batch_size` together with a length caps the pages: more could not be used by running requests.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    attention_dp: int = 1
    page_size: int = 128
    kv_dtype: str | None = None
    weights_dtype: str | None = None
    mla: str = "latent"
    utilization: float = 0.9
    max_length: int | None = None
    max_batch_size: int | None = None
    max_batch_tokens: int = 8192
    activation_reserve: int | None = None
    measured_activations: int | None = None
    largest_allocation: int | None = None

    def __post_init__(self) -> None:
        require_at_least(
            1,
            tp=self.tp,
            dp=self.dp,
            pp=self.pp,
            attention_dp=self.attention_dp,
            page_size=self.page_size,
            max_batch_tokens=self.max_batch_tokens,
        )
        require(self.devices <= MOST_DEVICES, f"{self.devices} devices; at most {MOST_DEVICES} can be planned")
        require(
            self.tp % self.attention_dp == 0,
            f"attention_dp {self.attention_dp} must divide tp {self.tp}: it groups the GPUs that share experts",
        )
        reserve = self.activation_reserve
        require(reserve is None or reserve >= STATIC, f"activation_reserve must be at least 0, got {reserve}")
        optional = {n: getattr(self, n) for n in ("max_length", "max_batch_size", "largest_allocation")}
        require_at_least(1, **{name: value for name, value in optional.items() if value is not None})
        known = isinstance(self.utilization, (int, float)) and math.isfinite(self.utilization)
        require(
            known and 0 < self.utilization <= 1,
            f"utilization is a share of the memory, above 0 and at most 1; got {self.utilization!r}",
        )
        require(self.mla in ("latent", "expanded"), f"mla is latent or expanded, got {self.mla!r}")
        if self.kv_dtype is not None:
            named = None if self.kv_dtype == "auto" else dtype_name(self.kv_dtype)
            object.__setattr__(self, "kv_dtype", named)
        if self.weights_dtype is not None:
            plain_bits(self.weights_dtype)

    @property
    def gpus(self) -> int:
        """GPUs of a replica."""
        return self.tp * self.pp

    @property
    def devices(self) -> int:
        """GPUs in all."""
        return self.gpus * self.dp

    @property
    def attention_tp(self) -> int:
        """Shards of one token's keys and values."""
        return self.tp // self.attention_dp
