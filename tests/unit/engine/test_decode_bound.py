"""The accounts behind the report of decode steps against their bound, and the report of a tiny shape on a CPU."""

from __future__ import annotations

import pytest
import torch

from ...measure.decode_bound import SHAPES, Bench, Shape, group_of, report  # noqa: TID252  # tests are no package

TINY = Shape(2, 32, 48, 4, 2, 8, 64, 4)


def test_the_bytes_of_a_step() -> None:
    shape = SHAPES["8b"]
    assert shape.weight_bytes == 2 * (8_030_261_248 - 128_256 * 4096)  # all of Llama 3.1 8B but its embedding
    assert shape.token_bytes == 131_072
    assert shape.decode_bytes([1000, 3000]) == shape.weight_bytes + 4000 * 131_072
    assert shape.decode_bytes([1000, 3000], 896) == shape.weight_bytes + (104 + 2104 + 896) * 131_072


@pytest.mark.parametrize("cached", [0, 5])
def test_the_operations_of_a_prompt(cached: int) -> None:
    matrices = sum(2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) for _ in range(TINY.layers))
    attention = sum(2 * 2 * 32 * (at + 1) for _ in range(TINY.layers) for at in range(cached, cached + 7))
    assert TINY.prefill_flops(7, cached) == 7 * matrices + attention + 2 * 64 * 32


def test_kernels_have_groups() -> None:
    kernels = {
        "nvjet_tst_128x8_64x12_2x1_v_bz_TNT": "products",
        "void flash::flash_fwd_splitkv_kernel<..>": "attention",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "aten::argmax": "sampling",
        "void at::native::vectorized_elementwise_kernel<4, ..>": "norm, rope, activation, ...",
    }
    assert {name: group_of(name) for name in kernels} == kernels


def test_the_report_from_end_to_end() -> None:
    bench = Bench(TINY, torch.device("cpu"), 256, page_size=16)
    lines = list(report(bench, (1, 3), (64,), steps=6))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    decode = [row for row in rows if len(row) == 8][1:]
    assert [(row[0], row[2]) for row in decode] == [("1", "0"), ("3", "0"), ("1", "48"), ("3", "48")]
    for row in decode:
        step, bound, ratio, rate = map(float, row[3:7])
        assert step > bound >= 0 and ratio > 1 and rate == pytest.approx(int(row[0]) / step * 1e3, rel=0.05)
        assert "products" in row[7] and "idle and host" in row[7]
    [prefill] = [row for row in rows if len(row) == 4 and row[0] == "64"]
    assert float(prefill[2]) > 0
