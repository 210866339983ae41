"""Plain torch gives what the definition of attention gives. (FlexAttention: tests/attention, it takes seconds.)"""

import threading
from typing import Any

import pytest
import torch

from rayk.attention import Rules, attend
from rayk.attention.backend import Backend
from rayk.attention.sdpa import TorchSdpa, _padded_decode

from .cases import BATCHES, RULES, Case, make_case, rules_of


class Padded(TorchSdpa):
    """What TorchSdpa does on CUDA for rows of one token."""

    def attend(self, query: Any, keys: Any, values: Any, batch: Any, rules: Any) -> torch.Tensor:
        return _padded_decode(query, keys, values, batch, rules)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("page_size", [3, 16, 128])
def test_torch_sdpa(batch: str, rules: str, page_size: int) -> None:
    case = make_case(**BATCHES[batch], page_size=page_size)
    check(case, TorchSdpa(), rules_of(**RULES[rules]))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch", ["decode", "equal decodes"])
def test_padded_decode(batch: str, rules: str) -> None:
    check(make_case(**BATCHES[batch]), Padded(), rules_of(**RULES[rules]))


def check(case: Case, backend: Backend, rules: Rules, most: float = 2e-6) -> None:
    got = backend.attend(case.query, *case.views, case.batch, rules)
    want = case.expected(rules)
    assert got.shape == case.query.shape and got.dtype == case.query.dtype
    torch.testing.assert_close(got.double(), want, rtol=most, atol=most)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1), (1, 1)])
def test_any_number_of_heads_per_kv_head(heads: int, kv_heads: int) -> None:
    case = make_case([1, 9, 1], [40, 30, 41], heads=heads, kv_heads=kv_heads)
    check(case, TorchSdpa(), rules_of(sinks=torch.linspace(-1, 1, heads)))
    check(case, TorchSdpa(), rules_of(softcap=3.0))
    check(case, TorchSdpa(), rules_of())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_half_precision(dtype: torch.dtype, softcap: float | None) -> None:
    case = make_case([1, 20, 1], [50, 60, 200], dtype=dtype)
    check(case, TorchSdpa(), rules_of(softcap=softcap), most=2e-2)


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_pages(cache: torch.dtype, dtype: torch.dtype) -> None:
    """What is stored is exact: only the arithmetic differs."""
    most = 2e-6 if dtype == torch.float32 else 2e-2
    mixed = make_case([1, 20, 1], [50, 60, 200], dtype=dtype, cache_dtype=cache)
    check(mixed, TorchSdpa(), rules_of(window=30), most)
    decode = make_case([1, 1], [50, 60], dtype=dtype, cache_dtype=cache)
    check(decode, Padded(), rules_of(), most)


def test_many_short_rows_of_any_length() -> None:
    """They are gathered in groups, whose rows are padded to the longest."""
    lengths = [1 + 7 * i % 61 for i in range(90)]
    case = make_case([1 + 2 * (i % 9 == 4) for i in range(90)], [length + 2 for length in lengths], page_size=8)
    check(case, TorchSdpa(), rules_of())
    check(case, TorchSdpa(), rules_of(window=13, softcap=2.0))


def test_a_row_may_start_at_any_token() -> None:
    """Slots of 16 bytes and a row from token 16 on: what is kept for the batch is told apart by more than numbers."""
    check(make_case([16, 2], [16, 2], heads=1, kv_heads=1, dim=4), TorchSdpa(), rules_of(4))


def test_a_transposed_query_is_taken_as_it_is() -> None:
    """Models hand over `[1, heads, tokens, dim]` transposed."""
    case = make_case([1, 20, 1], [50, 60, 200])
    strided = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    for rules in (rules_of(), rules_of(softcap=2.0)):
        got = TorchSdpa().attend(strided, *case.views, case.batch, rules)
        torch.testing.assert_close(got.double(), case.expected(rules), rtol=2e-6, atol=2e-6)


def test_threads_share_a_backend() -> None:
    backend, rules = TorchSdpa(), rules_of()
    cases = [make_case([1] * 6, [200 + i + seed for i in range(6)], seed=seed) for seed in range(4)]
    wrong = []

    def work(case: Case) -> None:
        want = case.expected(rules)
        for _ in range(30):
            got = backend.attend(case.query, *case.views, case.batch, rules)
            if not torch.allclose(got.double(), want, atol=1e-5):
                wrong.append(case)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_attend_chooses_and_scales_by_itself() -> None:
    case = make_case([1, 5], [20, 30])
    want = case.expected(rules_of(16)).float()
    torch.testing.assert_close(attend(case.query, *case.views, case.batch), want)
    torch.testing.assert_close(attend(case.query, *case.views, case.batch, backend="torch-sdpa"), want)
    capped = attend(case.query, *case.views, case.batch, scale=0.5, window=7, softcap=1.0)
    torch.testing.assert_close(capped, case.expected(Rules(0.5, 7, 1.0)).float())
