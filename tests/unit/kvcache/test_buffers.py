"""The tensors: public shapes, page bytes, and page copies that keep every bit in every dtype."""

import numpy as np
import pytest
import torch

from rayk import KVCacheQuantizationConfig, MHAKVCacheParams, MLAKVCacheParams, MultiKVCacheParams
from rayk.errors import ConfigError
from rayk.kvcache.buffers import PageBuffers
from rayk.params import DTYPE_BYTES, KVCacheParams


def mha(dtype: str = "float32", tp: int = 1, scales: str | None = None, **kwargs) -> MHAKVCacheParams:
    quant = KVCacheQuantizationConfig(scale_dtype=scales, quantization_granularity=4) if scales else None
    given = {"n_kv_heads": 2, "head_dim": 8, "num_layers": 3, "page_size": 4, "kvcache_quant_config": quant, **kwargs}
    return MHAKVCacheParams(dtype=dtype, devices=["cpu"] * tp, **given)


CACHES: dict[str, KVCacheParams] = {
    **{dtype: mha(dtype) for dtype in DTYPE_BYTES},
    "tp2": mha(tp=2),
    "mla tp2": MLAKVCacheParams(
        dtype="bfloat16", num_q_heads=2, head_dim=6, num_layers=2, page_size=4, devices=["cpu"] * 2
    ),
    "fp8 and float32 scales": mha("float8_e4m3fn", scales="float32"),
    "int8 and e8m0 scales, tp2": mha("int8", tp=2, scales="float8_e8m0fnu"),
    "two caches": MultiKVCacheParams.from_params(
        {"target": mha("bfloat16"), "draft": mha("float8_e4m3fn", scales="float16", num_layers=1)}
    ),
    "one token a page": mha(page_size=1),
}


@pytest.fixture(params=CACHES)
def params(request: pytest.FixtureRequest) -> KVCacheParams:
    return CACHES[request.param]


def filled(params: KVCacheParams, pages: int) -> PageBuffers:
    """Every byte of every page different from its neighbours."""
    buffers = PageBuffers(params, pages, params.devices)
    ids = range(pages + 1)
    shapes = [raw.shape[1] for raw in buffers.read_bytes(list(ids))]
    generator = torch.Generator().manual_seed(0)
    buffers.write_bytes(
        list(ids),
        [torch.randint(0, 256, (pages + 1, n), generator=generator, dtype=torch.uint8) for n in shapes],
    )
    return buffers


def raw(tensors) -> list[bytes]:
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


def test_public_shapes_and_page_bytes(params: KVCacheParams) -> None:
    buffers = PageBuffers(params, 5, params.devices).all_buffers
    expected = []
    for leaf in params.leaves.values():
        layout = leaf.layout
        expected += [(layout.dtype, (6, *layout.shape))] * len(params.devices)
        if layout.scale_shape is not None:
            expected += [(layout.scale_dtype, (6, *layout.scale_shape))] * len(params.devices)
    assert [(str(b.dtype).removeprefix("torch."), tuple(b.shape)) for b in buffers] == expected
    assert sum(b[0].numel() * b.element_size() for b in buffers) == params.bytes_per_page


def test_pages_are_zero_at_first(params: KVCacheParams) -> None:
    assert all(not any(data) for data in raw(PageBuffers(params, 2, params.devices).all_buffers))


def test_a_page_is_one_run_of_bytes(params: KVCacheParams) -> None:
    for buffer in PageBuffers(params, 2, params.devices).all_buffers:
        page = buffer[0].transpose(0, 1)  # layers first, as stored
        assert page.is_contiguous() and buffer.stride(0) == page.numel()


def test_bytes_survive_the_way_to_another_replica(params: KVCacheParams) -> None:
    source, target = filled(params, 5), PageBuffers(params, 3, params.devices)
    data = source.read_bytes([4, 0, 2])
    assert target.check_layout(data, 3) is None
    target.write_bytes([1, 2, 0], data)
    assert raw(target.read([1, 2, 0])) == raw(source.read([4, 0, 2]))
    assert raw(target.read_bytes([1])) == raw(source.read_bytes([4]))


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_are_copied_from_pool_to_pool(params: KVCacheParams, shared: bool) -> None:
    source, target = filled(params, 5), PageBuffers(params, 3, params.devices, shared)
    assert len(target.files) == (len(target.all_buffers) if shared else 0)
    assert target.copy_pages(np.array([1, 2, 0]), source.all_bytes, np.array([4, 5, 2])) is None
    assert raw(target.read([1, 2, 0])) == raw(source.read([4, 5, 2]))
    assert not any(raw(target.read([3]))[0])


def test_pools_that_do_not_fit_are_described_and_nothing_is_written() -> None:
    target = PageBuffers(mha(), 3, ["cpu"])
    ones = PageBuffers(mha(), 3, ["cpu"])
    for buffer in ones.all_buffers:
        buffer.fill_(1)
    for source, mine, theirs in (
        (PageBuffers(mha(head_dim=4), 3, ["cpu"]), [0], [0]),
        (ones, [0], [4]),
        (ones, [0], [-1]),
        (ones, [0, 1], [0]),
    ):
        assert target.copy_pages(np.array(mine), source.all_bytes, np.array(theirs)) is not None
    assert not any(any(data) for data in raw(target.read([0, 1, 2, 3])))


def test_what_was_read_does_not_change_with_the_page(params: KVCacheParams) -> None:
    buffers = filled(params, 2)
    copies = [buffers.read([0]), buffers.read_bytes([0])]
    before = [raw(copy) for copy in copies]
    buffers.write_bytes([0], buffers.read_bytes([1]))
    assert [raw(copy) for copy in copies] == before
    assert raw(buffers.read([0])) == raw(buffers.read([1]))


def test_read_gives_the_public_shape_in_the_order_asked(params: KVCacheParams) -> None:
    buffers = filled(params, 4)
    for got, buffer in zip(buffers.read([3, 1, 3]), buffers.all_buffers, strict=True):
        assert (got.dtype, got.shape) == (buffer.dtype, (3, *buffer.shape[1:]))
        assert raw([got]) == raw([torch.stack([buffer[i].view(buffer.dtype) for i in (3, 1, 3)])])


def test_reading_nothing_gives_empty_tensors(params: KVCacheParams) -> None:
    assert all(len(part) == 0 for part in PageBuffers(params, 2, params.devices).read([]))


def test_values_written_through_the_public_view_are_read_back() -> None:
    buffers = PageBuffers(mha(), 3, ["cpu"])
    (pool,) = buffers.all_buffers
    pool[2, :, :, 1] = 5.0
    (page,) = buffers.read([2])
    assert (page[0, :, :, 1] == 5.0).all() and page.sum() == 5.0 * 2 * 3 * 2 * 8


@pytest.mark.parametrize("ids", [[-1], [4], [0, 99]])
def test_page_ids_out_of_range_are_refused(ids: list[int]) -> None:
    buffers = PageBuffers(mha(), 3, ["cpu"])
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        buffers.read(ids)


def test_foreign_page_data_is_described_not_written() -> None:
    buffers = PageBuffers(mha(), 3, ["cpu"])
    other = PageBuffers(mha(head_dim=4), 3, ["cpu"]).read_bytes([0])
    assert "expected" in str(buffers.check_layout(other, 1))
    assert "expected" in str(buffers.check_layout(buffers.read_bytes([0]), 2))
    assert "expected" in str(buffers.check_layout([], 0))


def test_too_many_pages_say_how_large_they_are() -> None:
    with pytest.raises(ConfigError, match=r"pages of 6144 bytes cannot be allocated on cpu.*fewer pages"):
        PageBuffers(mha(n_kv_heads=8), 2**50, ["cpu"])
