"""Small managers, and the model that the tests forward with: a slot's value depends on all tokens up to it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rayk


def values(tokens) -> torch.Tensor:
    """[len(tokens)] float32."""
    found, value = [], 1
    for token in tokens:
        value = (31 * value + int(token) + 7) % 2039  # exact in float16 too
        found.append(value)
    return torch.tensor(found, dtype=torch.float32)


def write_window(inputs: Any, batch) -> int:
    """What a forward pass does to the cache: the active window's slots, found through the lookup table."""
    leaves = inputs.values() if isinstance(inputs, dict) else [inputs]
    for shard in [shard for leaf in leaves for shard in leaf.shards]:
        size = shard.kv_blocks.shape[3]
        for row, ctx in zip(shard.lookup_table, batch, strict=True):
            slots = values(ctx.tokens.all)
            for p in range(ctx.tokens.processed_length, ctx.tokens.processed_length + ctx.tokens.active_length):
                shard.kv_blocks[int(row[p // size]), :, :, p % size] = slots[p].to(shard.kv_blocks.dtype)
    return len(batch)


class Cache:
    """A manager with the steps of a driver loop, one request at a time."""

    def __init__(self, manager: rayk.PagedKVCacheManager) -> None:
        self.manager = manager

    def batches(self, ctx: rayk.TextContext, r: int = 0) -> list[list[rayk.TextContext]]:
        return [[ctx] if i == r else [] for i in range(self.manager.params.data_parallel_degree)]

    def start(self, name: str, tokens, r: int = 0, **kwargs: Any) -> rayk.TextContext:
        """Claimed and allocated."""
        ctx = rayk.TextContext(name, tokens, 10_000, **kwargs)
        self.manager.claim(name, r)
        self.manager.alloc(ctx, r)
        return ctx

    def turn(self, ctx: rayk.TextContext, token: int = 99, r: int = 0) -> None:
        """Forward the active window, sample `token`, commit."""
        self.manager.execute(self.batches(ctx, r), write_window)
        ctx.update(token)
        self.manager.step(self.batches(ctx, r))

    def serve(self, name: str, tokens, r: int = 0, keep: bool = False, **kwargs: Any) -> rayk.TextContext:
        """A request that was prefilled, and released unless `keep`."""
        ctx = self.start(name, tokens, r, **kwargs)
        self.turn(ctx, r=r)
        if not keep:
            self.manager.release(name, r)
        return ctx

    def hits(self, tokens, **kwargs: Any) -> list[int]:
        """Leading pages cached per replica of a prompt that goes on after `tokens`."""
        ctx = rayk.TextContext("question", [*tokens, 0], 10_000, **kwargs)
        return [counts.device_blocks for counts in self.manager.get_prefix_cache_hit_counts(ctx)]

    def wrong_slots(self, ctx: rayk.TextContext, r: int = 0) -> int:
        """Processed slots that do not hold what the tokens say, over all buffers."""
        pages, count = self.manager.get_req_blocks(ctx.request_id, r), ctx.tokens.processed_length
        want, wrong = values(ctx.tokens.all[:count]), 0
        for buffer in self.manager.read_pages(pages, r):
            slots = buffer.movedim(3, 1).flatten(0, 1).flatten(1)[:count]
            wrong += int((slots != want[:, None].to(slots.dtype)).any(dim=1).sum())
        return wrong


@pytest.fixture(scope="session")
def session() -> Iterator[rayk.InferenceSession]:
    with rayk.InferenceSession("inline") as session:
        yield session


@pytest.fixture
def make(session: rayk.InferenceSession) -> Iterator[Callable[..., Cache]]:
    """make(pages, replicas=1, tp=1, ...params) -> Cache; checked for integrity at every step and at the end."""
    made: list[rayk.PagedKVCacheManager] = []

    def make(pages: int = 8, *, replicas: int = 1, tp: int = 1, max_batch_size: int = 8, **kwargs: Any) -> Cache:
        common: dict[str, Any] = {
            "dtype": "float32",
            "head_dim": 2,
            "num_layers": 1,
            "page_size": 4,
            "devices": ["cpu"] * replicas * tp,
            "data_parallel_degree": replicas,
            "enable_prefix_caching": True,
        }
        params = kwargs.pop("params", None)
        router = kwargs.pop("router", "least-loaded")
        if params is None:
            params = rayk.MHAKVCacheParams(n_kv_heads=tp, **{**common, **kwargs})
        manager = rayk.PagedKVCacheManager(
            params, session, pages, 0, True, max_batch_size=max_batch_size, router=router
        )
        made.append(manager)
        return Cache(manager)

    yield make
    for manager in made:
        if manager._open:
            manager.check_integrity()
        manager.shutdown()


@pytest.fixture(autouse=True)
def nobody_starts_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of drivers without Ray say themselves when a thread of theirs would do something."""
    monkeypatch.setattr("rayk.manager.starter.Starter.keep", lambda self: None)
