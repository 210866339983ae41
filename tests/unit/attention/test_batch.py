"""Where tokens stand and where their keys and values are written."""

from typing import Any

import pytest
import torch

from rayk.attention import AttentionError, PagedPool, attend, pack

from .cases import make_case

NULL = 9


def table(*rows: list[int]) -> torch.Tensor:
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [NULL] * (width - len(row)) for row in rows], dtype=torch.int32)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_positions_slots_and_bounds() -> None:
    batch = pack(table([3, 5], [0], [7, 1, 2]), lengths(3, 0, 8), [4, 1, 2], page_size=4)
    assert batch.positions.tolist() == [3, 4, 5, 6, 0, 8, 9]
    assert batch.slots.tolist() == [15, 20, 21, 22, 0, 8, 9]
    assert batch.starts.tolist() == [0, 4, 5, 7] and batch.last.tolist() == [3, 4, 6]
    assert batch.kv_lengths.tolist() == [7, 1, 10]
    assert (batch.max_query, batch.max_kv, batch.tokens, batch.rows) == (4, 10, 7, 3)
    assert [t.dtype for t in (batch.starts, batch.kv_lengths)] == [torch.int32] * 2
    assert [t.dtype for t in (batch.positions, batch.slots, batch.last)] == [torch.int64] * 3
    assert not batch.is_decode


def test_decode_is_the_same_batch_made_without_the_host() -> None:
    rows, cached = table([3, 5], [0], [7, 1, 2]), lengths(7, 0, 10)
    batch = pack(rows, cached, [1, 1, 1], page_size=4)
    assert batch.is_decode
    assert batch.positions.tolist() == [7, 0, 10] and batch.slots.tolist() == [23, 0, 10]
    assert batch.starts.tolist() == [0, 1, 2, 3] and batch.last.tolist() == [0, 1, 2]
    assert batch.kv_lengths.tolist() == [8, 1, 11]


def test_a_dummy_writes_to_the_null_page() -> None:
    batch = pack(table([2], []), lengths(1, 0), [1, 1], page_size=4)
    assert batch.slots.tolist() == [9, NULL * 4]


@pytest.mark.parametrize(
    ("counts", "cached", "says"),
    [
        ([1], (0, 0), r"2 row\(s\), 1 count"),
        ([1, 1], (0,), r"1 cache length"),
        ([1, 0], (0, 0), r"at least one token.*\[1, 0\]"),
        ([1, -2], (0, 0), r"at least one token"),
        ([1, 9], (0, 0), r"\[1, 9\] tokens do not fit the 2 page\(s\) of 4"),
        ([1, 1], (0, 8), r"\[1, 9\] tokens do not fit"),
        ([1, 1], (0, -1), r"do not fit"),
    ],
)
def test_what_cannot_be(counts: list[int], cached: tuple[int, ...], says: str) -> None:
    with pytest.raises(AttentionError, match=says):
        pack(table([1], [2]), lengths(*cached), counts, page_size=4)


def test_no_rows() -> None:
    with pytest.raises(AttentionError, match="at least one token"):
        pack(torch.zeros((0, 3), dtype=torch.int32), lengths(), [], 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_writes_change_their_slots_and_nothing_else(dtype: torch.dtype) -> None:
    stored = torch.zeros((10, 3, 2, 4, 2, 8)).to(dtype)
    pool = PagedPool(stored.transpose(1, 2))
    batch = pack(table([3, 5], [0]), lengths(3, 0), [3, 1], page_size=4)
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    for layer in (2, 0):
        pool.write(layer, key + layer, value - layer, batch)
    want = torch.zeros(stored.shape).to(dtype)
    for token, (page, offset) in enumerate([(3, 3), (5, 0), (5, 1), (0, 0)]):
        for layer in (2, 0):
            want[page, layer, 0, offset] = (key[token] + layer).to(dtype)
            want[page, layer, 1, offset] = (value[token] - layer).to(dtype)
    assert torch.equal(stored.view(torch.uint8), want.view(torch.uint8))


def test_float8_keeps_the_largest_value_instead_of_nan() -> None:
    stored = torch.zeros((3, 1, 2, 4, 1, 8)).to(torch.float8_e4m3fn)
    batch = pack(torch.tensor([[0, 2]], dtype=torch.int32), lengths(0), [1], page_size=4)
    PagedPool(stored.transpose(1, 2)).write(0, torch.full((1, 1, 8), 1e6), torch.full((1, 1, 8), -1e6), batch)
    assert (stored[0, 0, 0, 0].float() == 448).all() and (stored[0, 0, 1, 0].float() == -448).all()


@pytest.mark.parametrize(
    "blocks",
    [torch.zeros(4, 2, 3, 8, 2, 4), torch.zeros(4, 2, 3, 8, 2, 4).transpose(1, 2), torch.zeros(4, 8, 2, 4)],
    ids=["kv-major", "three of a token", "one layer"],
)
def test_only_page_major_pools_of_keys_and_values(blocks: torch.Tensor) -> None:
    with pytest.raises(AttentionError, match="page-major buffer"):
        PagedPool(blocks)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"query": torch.zeros(5, 4, 16)}, "for 6 tokens"),
        ({"query": torch.zeros(6, 4, 8)}, "for 6 tokens"),
        ({"query": torch.zeros(6, 3, 16)}, "3 query heads"),
        ({"window": 0}, "window of 0"),
        ({"backend": "flash"}, "unknown; use one of vllm-flash-attn-3, .*torch-sdpa"),
        ({"backend": "torch-flex"}, "needs a CUDA device"),
    ],
)
def test_attend_refuses(changes: dict[str, Any], says: str) -> None:
    case = make_case([1, 5], [20, 30])
    keys, values = case.views
    arguments = {"query": case.query, "keys": keys, "values": values, "batch": case.batch, **changes}
    with pytest.raises(AttentionError, match=says):
        attend(**arguments)
