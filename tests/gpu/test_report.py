"""What `make gpu-report` prints: page copies and table staging against the device's own copy rate."""

import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch

import rayk

DEVICE, PAGES, BATCH, MIB = "cuda:0", 64, 128, 1 << 20


def seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """Median time of `work` on the device, by events, after three warm-up runs."""
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@pytest.fixture
def manager() -> rayk.PagedKVCacheManager:
    params = rayk.MHAKVCacheParams(
        dtype="bfloat16", n_kv_heads=8, head_dim=128, num_layers=32, page_size=128, devices=[DEVICE],
        enable_prefix_caching=True,
    )  # fmt: skip
    return rayk.PagedKVCacheManager(params, rayk.InferenceSession(), 4 * PAGES, max_batch_size=BATCH)


def test_report(manager: rayk.PagedKVCacheManager, capsys: pytest.CaptureFixture[str]) -> None:
    core = manager._calls.cores[0]  # type: ignore[attr-defined]  # measured below the public surface
    ids = np.random.default_rng(0).permutation(4 * PAGES)[:PAGES].astype(np.int32)
    data = core.buffers.read_bytes(ids)
    size = sum(d.numel() for d in data)
    plain = seconds(lambda: [d.clone() for d in data])
    gather = seconds(lambda: core.buffers.read_bytes(ids))
    scatter = seconds(lambda: core.buffers.write_bytes(ids, data))
    ctxs = [rayk.TextContext(f"r{i}", np.arange(200), 4096) for i in range(BATCH)]
    for ctx in ctxs:
        manager.claim(ctx.request_id, 0)
        manager.alloc(ctx, 0)
    tables = seconds(lambda: manager.runtime_inputs([ctxs]))
    with capsys.disabled():
        print(f"\ndevice            {torch.cuda.get_device_name(0)}")
        print(f"versions          torch {torch.__version__}, rayk {rayk.__version__}")
        print(f"page              {size // PAGES / MIB:.1f} MiB (8B Llama shape, 128 tokens, bfloat16)")
        for name, taken in (("plain copy", plain), ("gather pages", gather), ("scatter pages", scatter)):
            print(f"{name:17s} {2 * size / taken / 1e9:8.0f} GB/s read + write, {plain / taken:.2f} of the plain copy")
        print(f"runtime inputs    {tables * 1e6:8.0f} us for {BATCH} requests, tables on the device")
    assert gather < 4 * plain and scatter < 4 * plain
