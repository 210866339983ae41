"""torch's own varlen_attn with block tables. It needs FA3 in torch's dispatcher, which only the user may put there."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch

from rayk.attention.backend import Needs, Rules
from rayk.attention.batch import PagedBatch


@lru_cache(maxsize=1)
def _varlen() -> Any:
    """torch's function, or None where it knows no block tables (torch 2.11 and older)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def _active() -> str | None:
    """The flash attention that was activated in torch, if any."""
    try:
        from torch.nn.attention import current_flash_attention_impl
    except ImportError:
        return None
    return current_flash_attention_impl()


class TorchVarlen:
    """Reads the pages in place, on CUDA only."""

    name = "torch-varlen"

    def unfit(self, needs: Needs) -> str | None:
        if needs.device.type != "cuda":
            return f"it needs a CUDA device, not {needs.device}"
        if _varlen() is None:
            return f"varlen_attn of torch {torch.__version__} has no block tables; 2.12 is the first that does"
        if _active() != "FA3":
            return "FA3 is not active in torch; call torch.nn.attention.activate_flash_attention_impl('FA3') first"
        if needs.dtype not in (torch.float16, torch.bfloat16) or needs.cache_dtype != needs.dtype:
            return f"it takes float16 or bfloat16 throughout, not {needs.dtype} and pages of {needs.cache_dtype}"
        if needs.softcap or needs.sinks:
            return "it has no soft caps and no attention sinks"
        if needs.head_dim > 256 or needs.head_dim % 8:
            return f"heads of {needs.head_dim} elements: at most 256, in multiples of 8"
        return None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
    ) -> torch.Tensor:
        out: torch.Tensor = _varlen()(
            query,
            keys,
            values,
            batch.starts,
            None,
            batch.max_query,
            batch.max_kv,
            scale=rules.scale,
            window_size=(-1 if rules.window is None else rules.window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=batch.kv_lengths,
            block_table=batch.table,
        )
        return out
