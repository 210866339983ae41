"""vllm-flash-attn: FA3 on Hopper, FA2 from Ampere on. Reads the pages in place, on CUDA only."""

from __future__ import annotations

from typing import Any

import torch

from rayk.attention.backend import FP8, Needs, Rules
from rayk.attention.batch import PagedBatch
from rayk.attention.flash_library import FlashLibrary, find_flash

LARGEST_HEAD = 256


class VllmFlashAttention:
    """The adapter of one version, 2 or 3. `library` is found when first needed unless given."""

    def __init__(self, version: int, library: FlashLibrary | None = None) -> None:
        self.version = version
        self._library = library

    @property
    def name(self) -> str:
        return f"vllm-flash-attn-{self.version}"

    @property
    def library(self) -> FlashLibrary:
        """Where the kernels are from."""
        if self._library is None:
            self._library = find_flash()
        return self._library

    def unfit(self, needs: Needs) -> str | None:
        if needs.device.type != "cuda":
            return f"it needs a CUDA device, not {needs.device}"
        if needs.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 or bfloat16, not {needs.dtype}"
        fp8 = needs.cache_dtype in FP8
        if needs.cache_dtype != needs.dtype and not (self.version == 3 and needs.cache_dtype == torch.float8_e4m3fn):
            return f"it cannot read {needs.cache_dtype} pages" + (", FA3 reads float8_e4m3fn" if fp8 else "")
        if needs.head_dim > LARGEST_HEAD or needs.head_dim % 8:
            return f"heads of {needs.head_dim} elements: at most {LARGEST_HEAD}, in multiples of 8"
        if self.version == 2:
            if needs.page_size % 16:
                return f"pages of {needs.page_size} tokens: FA2 takes multiples of 16"
            if needs.sinks:
                return "FA2 has no attention sinks"
        if self.library.module is None:
            return self.library.reason
        return self._refused_by_library(needs.device)

    def _refused_by_library(self, device: torch.device) -> str | None:
        """By its flags: what it says of a device itself asks vLLM's platform module, which is not to be imported."""
        if not getattr(self.library.module, f"FA{self.version}_AVAILABLE", False):
            reason = getattr(self.library.module, f"FA{self.version}_UNAVAILABLE_REASON", None)
            return f"{self.library.origin} has no FA{self.version}" + (f": {reason}" if reason else "")
        capability = torch.cuda.get_device_capability(device)
        if self.version == 3 and capability[0] != 9:
            return f"FA3 needs compute capability 9.x, {device} has {capability[0]}.{capability[1]}"
        if capability[0] < 8:
            return f"FA2 needs compute capability 8 or later, {device} has {capability[0]}.{capability[1]}"
        return None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
    ) -> torch.Tensor:
        window = (-1, -1) if rules.window is None else (rules.window - 1, 0)
        dtype = query.dtype
        only_fa3 = self._fa3(query, keys, batch, rules, window) if self.version == 3 else {}
        if keys.dtype in FP8:
            most = torch.finfo(keys.dtype).max
            query = query.clamp(-most, most).to(keys.dtype)
        out: torch.Tensor = self.library.module.flash_attn_varlen_func(
            query,
            keys,
            values,
            batch.max_query,
            batch.starts,
            batch.max_kv,
            seqused_k=batch.kv_lengths,
            softmax_scale=rules.scale,
            causal=True,
            window_size=list(window),
            softcap=rules.softcap or 0.0,
            block_table=batch.table,
            fa_version=self.version,
            **only_fa3,
        )
        return out.to(dtype)

    def _fa3(
        self, query: torch.Tensor, keys: torch.Tensor, batch: PagedBatch, rules: Rules, window: tuple[int, int]
    ) -> dict[str, Any]:
        """Arguments that FA2 does not have; the schedule is made once per batch and kind of layer."""
        extra: dict[str, Any] = {}
        if rules.sinks is not None:
            extra["s_aux"] = rules.sinks.to(query.dtype)
        if keys.dtype in FP8:
            one = batch.once("descale", lambda: torch.ones((1, 1), device=query.device))
            scale = one.expand(batch.rows, keys.shape[2])
            extra |= {"q_descale": scale, "k_descale": scale, "v_descale": scale}
        schedule = getattr(self.library.module, "get_scheduler_metadata", None)
        if schedule is not None:
            capped = rules.softcap is not None
            extra["scheduler_metadata"] = batch.once(
                ("fa3", window, capped),
                lambda: schedule(
                    batch.rows,
                    batch.max_query,
                    batch.max_kv,
                    query.shape[1],
                    keys.shape[2],
                    query.shape[2],
                    batch.kv_lengths,
                    qkv_dtype=keys.dtype,
                    cu_seqlens_q=batch.starts,
                    page_size=batch.page_size,
                    causal=True,
                    window_size=window,
                    has_softcap=capped,
                ),
            )
        return extra
