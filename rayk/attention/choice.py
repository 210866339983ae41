"""Which backend attends: the first that has nothing against the needs, in the order below, or the one named."""

from __future__ import annotations

from collections.abc import Callable

from rayk.attention.backend import Backend, Needs
from rayk.attention.flash import VllmFlashAttention
from rayk.attention.flex import TorchFlex
from rayk.attention.sdpa import TorchSdpa
from rayk.attention.varlen import TorchVarlen
from rayk.errors import AttentionError

BACKENDS: dict[str, Callable[[], Backend]] = {
    "vllm-flash-attn-3": lambda: VllmFlashAttention(3),
    "vllm-flash-attn-2": lambda: VllmFlashAttention(2),
    "torch-varlen": TorchVarlen,
    "torch-flex": TorchFlex,
    "torch-sdpa": TorchSdpa,
}
"""By name, fastest first."""


def choose(needs: Needs, name: str | None = None) -> Backend:
    """A new backend for these needs. AttentionError if the named one, or every one, is unfit; it says why."""
    if name is not None and name not in BACKENDS:
        raise AttentionError(f"attention {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    refused = []
    for candidate in BACKENDS if name is None else (name,):
        backend = BACKENDS[candidate]()
        reason = backend.unfit(needs)
        if reason is None:
            return backend
        refused.append(f"{candidate}: {reason}")
    if name is not None:
        raise AttentionError(f"{refused[0]}; leave the attention out to have one chosen")
    raise AttentionError(f"no attention backend fits: {'; '.join(refused)}")
