"""The cache on a CUDA device: contents, copies between replicas, tables, and a replica actor that holds a GPU."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import rayk

PAGE, DEVICE = 16, "cuda:0"


def params(replicas: int = 1, **changes: Any) -> rayk.MHAKVCacheParams:
    defaults: dict[str, Any] = {"dtype": "bfloat16", "n_kv_heads": 4, "head_dim": 64, "num_layers": 3}
    return rayk.MHAKVCacheParams(
        **{**defaults, **changes},
        page_size=PAGE,
        devices=[DEVICE] * replicas,
        data_parallel_degree=replicas,
        enable_prefix_caching=True,
    )


def write_positions(inputs: Any, batch: Any) -> int:
    """Fill the active window with (token + position) % 200, on the device, from the device's own table."""
    for shard in inputs.shards:
        assert shard.lookup_table.device == shard.kv_blocks.device
        assert shard.cache_lengths.tolist() == [ctx.tokens.processed_length for ctx in batch]
        for row, ctx in enumerate(batch):
            window = ctx.tokens
            at = torch.arange(window.processed_length, window.processed_length + window.active_length)
            tokens = torch.from_numpy(np.array(window.active)).long()
            values = ((tokens + at) % 200).to(shard.kv_blocks.device, shard.kv_blocks.dtype)
            pages = shard.lookup_table[row, (at // PAGE).to(shard.lookup_table.device)].long()
            shard.kv_blocks[pages, :, :, (at % PAGE).to(pages.device)] = values[:, None, None, None, None]
    return len(batch)


def check(manager: rayk.PagedKVCacheManager, ctx: rayk.TextContext, replica: int) -> None:
    count = ctx.tokens.processed_length
    want = (torch.from_numpy(np.array(ctx.tokens.all[:count])).long() + torch.arange(count)) % 200
    for pages in manager.read_pages(manager.get_req_blocks(ctx.request_id, replica), replica):
        slots = pages.movedim(3, 1).flatten(0, 1).flatten(1)[:count].float()
        assert (slots == want[:, None]).all()


@pytest.fixture
def session() -> Iterator[rayk.InferenceSession]:
    with rayk.InferenceSession() as open_session:
        yield open_session


def serve(manager: rayk.PagedKVCacheManager, ctxs: list[rayk.TextContext], replica: int, steps: int = 20) -> None:
    batches: list[list[rayk.TextContext]] = [[] for _ in range(manager.params.data_parallel_degree)]
    batches[replica] = ctxs
    for ctx in ctxs:
        manager.claim(ctx.request_id, replica)
    for step in range(steps):
        for ctx in ctxs:
            manager.alloc(ctx, replica)
        manager.execute(batches, write_positions)
        for ctx in ctxs:
            ctx.update(step)
        manager.step(batches)
    for ctx in ctxs:
        check(manager, ctx, replica)


def context(name: str, seed: int, own: int = 40) -> rayk.TextContext:
    shared = np.arange(1000, 1100)
    return rayk.TextContext(name, np.concatenate([shared, np.random.default_rng(seed).integers(0, 500, own)]), 4096)


def test_contents_survive_sharing_eviction_and_reuse(session: rayk.InferenceSession) -> None:
    with rayk.PagedKVCacheManager(params(), session, 48, 0, True, max_batch_size=8) as manager:
        for round_ in range(6):
            ctxs = [context(f"{round_}-{i}", 10 * round_ + i) for i in range(3)]
            serve(manager, ctxs, 0)
            for ctx in ctxs:
                manager.release(ctx.request_id, 0)
        metrics = manager.get_metrics_aggregated()
        assert metrics.cache_tokens > 0 and metrics.evicted_blocks > 0
        assert manager.num_free_blocks() == 48


def test_pages_are_copied_between_replicas_on_the_device(session: rayk.InferenceSession) -> None:
    with rayk.PagedKVCacheManager(params(2), session, 64, 0, True, max_batch_size=8) as manager:
        first, again = context("first", 1), context("again", 1)
        serve(manager, [first], 0)
        serve(manager, [again], 1)
        assert again.cached_prefix_length == 128
        assert manager.get_metrics_aggregated().cross_replica_blocks_copied == 8


def test_tables_of_one_call_are_whole_when_the_next_is_staged(session: rayk.InferenceSession) -> None:
    """The pinned staging array is not overwritten while its copy to the device may still be under way."""
    with rayk.PagedKVCacheManager(params(), session, 512, max_batch_size=64) as manager:
        ctxs = [context(f"r{i}", i) for i in range(32)]
        for ctx in ctxs:
            manager.claim(ctx.request_id, 0)
            manager.alloc(ctx, 0)
        want = [manager.get_req_blocks(ctx.request_id, 0) for ctx in ctxs]
        busy = torch.randn(4096, 4096, device=DEVICE)
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
            kept = manager.runtime_inputs([ctxs])[0].shards[0].lookup_table.clone()
            manager.runtime_inputs([ctxs[::-1]])
            assert [row[: len(pages)] for row, pages in zip(kept.tolist(), want, strict=True)] == want


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn", "int8"])
def test_every_dtype_reads_back_what_was_written(session: rayk.InferenceSession, dtype: str) -> None:
    with rayk.PagedKVCacheManager(params(dtype=dtype), session, 32, max_batch_size=8) as manager:
        buffer = manager.get_device_buffer(0).all_buffers[0]
        assert buffer.is_cuda
        raw = torch.randint(0, 100, buffer.shape, dtype=torch.int8, device=DEVICE)
        buffer.copy_(raw.to(buffer.dtype))
        [pages] = manager.read_pages([5, 3, 32], 0)
        assert torch.equal(pages.float(), raw[[5, 3, 32]].to(buffer.dtype).float().cpu())


@pytest.mark.ray
def test_a_replica_actor_holds_its_gpu_and_serves_from_it() -> None:
    ray = pytest.importorskip("ray", reason="no Ray here: the rest of this file needs none")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import a test module
    with rayk.InferenceSession(runtime="ray", address="local") as session:
        manager = rayk.PagedKVCacheManager(params(), session, None, max_batch_size=8)
        ctxs = [context(f"ray-{i}", i) for i in range(4)]
        serve(manager, ctxs, 0)
        devices = manager.execute([ctxs], lambda inputs, batch: str(inputs.shards[0].kv_blocks.device))
        assert devices == [DEVICE]
        assert ray.available_resources().get("GPU", 0) == ray.cluster_resources()["GPU"] - 1
