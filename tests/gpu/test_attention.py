"""Attention over pages on a CUDA device: every backend against float64, decode bandwidth, and a captured step."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk.attention import BACKENDS, Backend, Needs, PagedPool, Rules, choose, pack
from rayk.attention.fused import find_write
from rayk.models import load_model

from ..unit.attention.cases import BATCHES, Case, make_case, rules_of  # noqa: TID252  # tests are no package
from ..unit.models.checkpoints import Rows, write  # noqa: TID252  # tests are no package

DEVICE, DIM = "cuda:0", 64
pytestmark = [
    # torch's compiler, behind FlexAttention, imports a deprecated module of torch's own, and advises on the device.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def needs(**changes: Any) -> Needs:
    dtype = torch.bfloat16
    return replace(Needs(torch.device(DEVICE), dtype, dtype, DIM, 16), **changes)


def backend_or_skip(name: str, asked: Needs) -> Backend:
    backend = BACKENDS[name]()
    reason = backend.unfit(asked)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return backend


def on_device(case: Case, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The same case on the device. Foreign slots keep their content."""
    stored, batch = case.stored.to(DEVICE, dtype), case.batch
    moved = pack(batch.table.to(DEVICE), batch.cached.to(DEVICE), batch.counts, batch.page_size, batch.max_kv)
    query = case.query.to(DEVICE, torch.bfloat16 if dtype.itemsize == 1 else dtype)
    return Case(PagedPool(stored.transpose(1, 2)), stored, moved, query, case.layer)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rules", [{}, {"window": 24}, {"softcap": 2.0}, {"sinks": [1.0, 0.0, -1.0, 2.0]}], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("name", BACKENDS)
def test_correct(name: str, page_size: int, batch: str, rules: dict[str, Any]) -> None:
    if name == "torch-flex" and batch not in ("decode", "mixed"):
        pytest.skip("every shape is compiled, which takes seconds; tests/attention has them all")
    asked = needs(page_size=page_size, softcap="softcap" in rules, sinks="sinks" in rules)
    backend = backend_or_skip(name, asked)
    case = make_case(**BATCHES[batch], page_size=page_size, dim=DIM)
    case.stored.nan_to_num_(100.0)
    moved = on_device(case)
    chosen = rules_of(DIM, **{k: torch.tensor(v, device=DEVICE) if k == "sinks" else v for k, v in rules.items()})
    got = backend.attend(moved.query, *moved.views, moved.batch, chosen)
    assert error(got, moved.expected(chosen)) < 1e-2


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_in_foreign_slots_is_not_read(name: str) -> None:
    """What another request left behind in the rest of a page."""
    backend = backend_or_skip(name, needs(page_size=128))
    moved = on_device(make_case(**BATCHES["mixed"], page_size=128, dim=DIM))
    got = backend.attend(moved.query, *moved.views, moved.batch, rules_of(DIM))
    if name in ("torch-flex", "torch-varlen", "vllm-flash-attn-2", "vllm-flash-attn-3") and not got.isfinite().all():
        pytest.xfail(f"{name} multiplies foreign values by zero weights: a NaN there spreads")
    assert error(got, moved.expected(rules_of(DIM))) < 1e-2


@pytest.mark.parametrize("name", ["vllm-flash-attn-3", "torch-sdpa"])
@pytest.mark.parametrize("page_size", [16, 128])
def test_float8_pages(name: str, page_size: int) -> None:
    backend = backend_or_skip(name, needs(page_size=page_size, cache_dtype=torch.float8_e4m3fn))
    case = make_case(**BATCHES["decode"], page_size=page_size, dim=DIM)
    case.stored.nan_to_num_(1.0)
    moved = on_device(case, torch.float8_e4m3fn)
    assert (
        error(backend.attend(moved.query, *moved.views, moved.batch, rules_of(DIM)), moved.expected(rules_of(DIM)))
        < 0.1
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_more_elements_than_int32_counts(name: str) -> None:
    backend = backend_or_skip(name, needs(page_size=128, head_dim=128))
    pages = 2**31 // (2 * 2 * 128 * 8 * 128) + 64
    stored = torch.zeros((pages + 1, 2, 2, 128, 8, 128), dtype=torch.bfloat16, device=DEVICE)
    assert stored.numel() > 2**31
    table = torch.tensor([[pages - 1, 0, pages - 2], [1, pages - 3, pages]], dtype=torch.int32, device=DEVICE)
    for page in (0, 1, pages - 3, pages - 2, pages - 1):
        stored[page].normal_()
    cached = torch.tensor([300, 200], dtype=torch.int32, device=DEVICE)
    query = torch.randn((2, 32, 128), dtype=torch.bfloat16, device=DEVICE)
    case = Case(PagedPool(stored.transpose(1, 2)), stored, pack(table, cached, [1, 1], 128, 384), query)
    got = backend.attend(query, *case.views, case.batch, rules_of(128))
    used = table.unique().long()
    small = stored[used]
    renamed = torch.searchsorted(used, table.long()).int()
    reference = Case(PagedPool(small.transpose(1, 2)), small, pack(renamed, cached, [1, 1], 128, 384), query)
    assert error(got, reference.expected(rules_of(128))) < 1e-2


@pytest.mark.parametrize("counts", [[1] * 5, [16, 7, 1, 1, 40]])
def test_writes(counts: list[int]) -> None:
    """Fused, where vLLM is installed, and not: the same slots, and nothing else."""
    case = make_case(counts, [100 + n for n in counts], dim=DIM)
    case.stored.nan_to_num_(0.0)
    moved = on_device(case)
    key, value = torch.randn((2, sum(counts), 2, DIM), device=DEVICE).bfloat16()
    want = moved.stored.clone()
    page, offset = moved.batch.slots // 16, moved.batch.slots % 16
    want[page, moved.layer, 0, offset], want[page, moved.layer, 1, offset] = key, value
    moved.pool.write(moved.layer, key, value, moved.batch)
    assert torch.equal(moved.stored, want)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_a_captured_decode_step_is_the_eager_one(tmp_path: Path, name: str) -> None:
    """The forward waits for nothing and copies nothing from the host, and replays with other rows and lengths."""
    model = load_model(write(tmp_path, name, head_dim=DIM), dtype="bfloat16", device=DEVICE)
    rows, longest = 8, 160
    host = Rows(model, rows, longest=longest)  # tables, and a pool that is not used
    stored = torch.zeros_like(host.blocks.transpose(1, 2).contiguous(), device=DEVICE)
    table = host.table.to(DEVICE)
    lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    tokens = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    bound = torch.tensor([longest], dtype=torch.int32)
    inputs = replace(
        host.inputs(range(rows), longest),
        kv_blocks=stored.transpose(1, 2),
        lookup_table=table,
        cache_lengths=lengths,
        max_cache_length=bound,
    )

    def step() -> torch.Tensor:
        return model.logits(inputs, tokens, [1] * rows)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        captured = step()
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    for _ in range(4):
        stored.normal_(generator=generator)
        lengths.copy_(torch.randint(1, longest, (rows,), generator=generator, device=DEVICE).int())
        tokens.copy_(torch.randint(3, 150, (rows,), generator=generator, device=DEVICE))
        before = stored.clone()
        graph.replay()
        got, pages = captured.clone(), stored.clone()
        stored.copy_(before)
        assert torch.equal(got, step()) and torch.equal(pages, stored)


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
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


LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 32, 8, 128  # of an 8B Llama; layers take turns, so that no cache holds them


def read_ceiling() -> float:
    """Bytes a second of reading 2 GiB once, by the best of a few simple kernels."""
    data = torch.zeros(1 << 29, device=DEVICE).normal_()
    rows = data.view(1 << 12, -1)
    works: list[Callable[[], object]] = [data.sum, data.amax, lambda: rows.sum(1), lambda: rows.amax(1)]
    return max(data.nbytes / seconds(work) for work in works)


def decode_rate(name: str, rows: int, context: int, page_size: int) -> float | str:
    """Bytes of keys and values a second, all layers of one step; or why the backend cannot."""
    backend = BACKENDS[name]()
    reason = backend.unfit(needs(page_size=page_size, head_dim=HEAD_DIM))
    if reason is not None:
        return reason
    columns = context // page_size
    shape = (rows * columns + 1, LAYERS, 2, page_size, KV_HEADS, HEAD_DIM)
    pool = PagedPool(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_().transpose(1, 2))
    table = torch.randperm(rows * columns, device=DEVICE).int().view(rows, columns)
    cached = torch.full((rows,), context - 1, dtype=torch.int32, device=DEVICE)
    query = torch.randn((rows, HEADS, HEAD_DIM), device=DEVICE).bfloat16()
    batch = pack(table, cached, [1] * rows, page_size, context)

    def layers() -> None:
        for layer in range(LAYERS):
            backend.attend(query, *pool.layer(layer), batch, Rules(HEAD_DIM**-0.5))

    replay = captured(layers) if name.startswith("vllm") else layers  # as the engine runs decode steps
    return LAYERS * kv_bytes(rows, context) / seconds(replay)


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph: what the device needs for it, without the host's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def kv_bytes(rows: int, context: int) -> int:
    """Keys and values of one layer."""
    return rows * context * 2 * KV_HEADS * HEAD_DIM * 2


@pytest.mark.parametrize(("rows", "context"), [(1, 32768), (32, 1024), (32, 8192), (128, 4096)])
def test_report_decode(rows: int, context: int, capsys: pytest.CaptureFixture[str]) -> None:
    ceiling, lines = read_ceiling(), []
    for page_size in (16, 128):
        for name in BACKENDS:
            rate = decode_rate(name, rows, context, page_size)
            torch.cuda.empty_cache()
            if isinstance(rate, str):
                lines.append(f"{name:18s} page {page_size:4d}: {rate}")
                continue
            taken = kv_bytes(rows, context) / rate * 1e6
            shown = f"{taken:7.1f} us a layer, {rate / 1e9:6.0f} GB/s, {rate / ceiling:.2f} of the read ceiling"
            how = "as a graph" if name.startswith("vllm") else "eager"
            lines.append(f"{name:18s} page {page_size:4d}: {shown}, {how}")
    with capsys.disabled():
        print(f"\ndecode, {rows} rows of {context} tokens, Llama-8B heads, bfloat16; ceiling {ceiling / 1e9:.0f} GB/s")
        print("\n".join(lines))


def test_report_writes(capsys: pytest.CaptureFixture[str]) -> None:
    stored = torch.zeros((512, LAYERS, 2, 128, KV_HEADS, HEAD_DIM), dtype=torch.bfloat16, device=DEVICE)
    pool = PagedPool(stored.transpose(1, 2))
    table = torch.randperm(511, device=DEVICE)[:32].int().view(32, 1)
    batch = pack(table, torch.zeros(32, dtype=torch.int32, device=DEVICE), [1] * 32, 128, 128)
    key = torch.randn((32, KV_HEADS, HEAD_DIM), device=DEVICE).bfloat16()
    taken = seconds(lambda: [pool.write(layer, key, key, batch) for layer in range(LAYERS)]) / LAYERS
    how = "vLLM's kernel" if find_write() is not None else "index_copy_"
    chosen = choose(needs(page_size=128)).name
    with capsys.disabled():
        print(f"\nwrites of 32 tokens {taken * 1e6:.1f} us a layer with {how}; attention chosen here: {chosen}")
