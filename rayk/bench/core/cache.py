"""The cache that the workloads run on, and the tokens that they ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import rayk
from rayk.context import IntArray, TextContext
from rayk.kvcache.page_hash import PageHash, RootKey
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.replica import ReplicaCore
from rayk.manager.local import LocalCalls
from rayk.manager.manager import PagedKVCacheManager
from rayk.params import MHAKVCacheParams

PAGE_SIZE = 16
POOL = 100_000
VOCABULARY = 150_000
ROOM = 1024  # tokens that a request may still grow by


def core_params(hashing: str = "sha256") -> MHAKVCacheParams:
    """As small as tensors get, so that bookkeeping is all there is; prefix caching on. `hashing` names pages."""
    return MHAKVCacheParams(
        dtype="float32",
        n_kv_heads=1,
        head_dim=4,
        num_layers=1,
        page_size=PAGE_SIZE,
        devices=["cpu"],
        enable_prefix_caching=True,
        kv_hash_algo=hashing,
    )


class Listener:
    """Counts the pages that it hears of; with one attached, a core hashes each page that it caches."""

    def __init__(self) -> None:
        self.stored_pages = self.removed_pages = 0

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        """These pages are cached now."""
        self.stored_pages += len(hashes)

    def removed(self, hashes: Sequence[PageHash]) -> None:
        """These are not any more."""
        self.removed_pages += len(hashes)


def make_manager(pages: int = POOL, max_batch_size: int = 256, hashing: str | None = None) -> PagedKVCacheManager:
    """One replica in this process: metrics and validation on, runtime checks off.

    With `hashing` (sha256 or xxh3_128) somebody listens, so that pages are hashed when they are committed.
    """
    params = core_params(hashing or "sha256")
    manager = rayk.PagedKVCacheManager(params, rayk.InferenceSession(), pages, max_batch_size=max_batch_size)
    if hashing is not None:
        replica_core(manager).listen(Listener())
    return manager


def replica_core(manager: PagedKVCacheManager) -> ReplicaCore:
    """The core of an inline manager's only replica."""
    calls = manager._calls
    assert isinstance(calls, LocalCalls)
    return calls.core(0)


def random_prompts(count: int, length: int, seed: int = 0) -> list[IntArray]:
    """`count` prompts of `length` uniform tokens, [length] int32 each."""
    return list(np.random.default_rng(seed).integers(0, VOCABULARY, (count, length), np.int32))


def make_contexts(prompts: Sequence[IntArray], name: str = "r") -> list[TextContext]:
    """A fresh context for each prompt."""
    return [TextContext(f"{name}{i}", prompt, len(prompt) + ROOM) for i, prompt in enumerate(prompts)]
