"""The cache that the workloads run on, and the tokens that they ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import rayk
from rayk.context import IntArray, TextContext
from rayk.manager import PagedKVCacheManager
from rayk.params import MHAKVCacheParams

PAGE_SIZE = 16
POOL = 100_000
VOCABULARY = 150_000
ROOM = 1024  # tokens that a request may still grow by


def core_params() -> MHAKVCacheParams:
    """As small as tensors get, so that bookkeeping is all there is; prefix caching on."""
    return MHAKVCacheParams(
        dtype="float32",
        n_kv_heads=1,
        head_dim=4,
        num_layers=1,
        page_size=PAGE_SIZE,
        devices=["cpu"],
        enable_prefix_caching=True,
    )


def make_manager(pages: int = POOL, max_batch_size: int = 256) -> PagedKVCacheManager:
    """One replica in this process: metrics and validation on, runtime checks off."""
    return rayk.PagedKVCacheManager(core_params(), rayk.InferenceSession(), pages, max_batch_size=max_batch_size)


def random_prompts(count: int, length: int, seed: int = 0) -> list[IntArray]:
    """`count` prompts of `length` uniform tokens, [length] int32 each."""
    return list(np.random.default_rng(seed).integers(0, VOCABULARY, (count, length), np.int32))


def make_contexts(prompts: Sequence[IntArray], name: str = "r") -> list[TextContext]:
    """A fresh context for each prompt."""
    return [TextContext(f"{name}{i}", prompt, len(prompt) + ROOM) for i, prompt in enumerate(prompts)]
