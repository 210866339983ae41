"""The adapter of vllm-flash-attn against a fake library with the signature of vLLM 0.27 to 0.32, loaded by its path."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk.attention import Needs
from rayk.attention.flash import VllmFlashAttention
from rayk.attention.flash_library import FlashLibrary, load_first, package_folders

from .cases import BATCHES, Case, make_case, rules_of

FAKE = """
import math
import torch
from . import kernels  # as the real one imports its shared objects

FA2_AVAILABLE = FA3_AVAILABLE = True
DEFAULT_FA_VERSION = 2
calls, schedules = [], []

def fa_version_unsupported_reason(fa_version):
    from vllm.platforms import current_platform  # as the real one does; nobody may call this
    return None

def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
    page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), has_softcap=False, num_splits=0,
    pack_gqa=None, sm_margin=0,
):
    assert causal and len(cache_seqlens) == batch_size and len(cu_seqlens_q) == batch_size + 1 and page_size
    schedules.append((window_size, has_softcap))
    return torch.tensor([len(schedules)], dtype=torch.int32)

def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
    q_descale=None, k_descale=None, v_descale=None, num_splits=0, fa_version=DEFAULT_FA_VERSION, s_aux=None,
    cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None,
):
    calls.append({**locals()})
    assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and causal and cu_seqlens_k is None
    assert q.dtype == k.dtype == v.dtype
    if fa_version == 2 and (scheduler_metadata is not None or s_aux is not None or q_descale is not None):
        raise NotImplementedError("FA2 does not support it")
    if k.dtype == torch.float8_e4m3fn:
        assert q_descale.shape == k_descale.shape == v_descale.shape == (len(seqused_k), k.shape[2])
    left = window_size[0]
    starts, parts = cu_seqlens_q.tolist(), []
    for row, length in enumerate(seqused_k.tolist()):
        own = q[starts[row]:starts[row + 1]].double()
        assert len(own) <= max_seqlen_q and length <= max_seqlen_k
        pages = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (
            x.float()[pages].flatten(0, 1)[:length].double().repeat_interleave(q.shape[1] // k.shape[2], 1)
            for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", own, keys) * softmax_scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        i = torch.arange(len(own))[:, None] + length - len(own)
        j = torch.arange(length)[None]
        seen = (j <= i) & ((j >= i - left) if left >= 0 else True)
        weights = scores.masked_fill(~seen, -math.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if s_aux is not None:
            total = total + s_aux.double().exp()[:, None, None]
        parts.append(torch.einsum("hqk,khd->qhd", weights / total, values))
    return torch.cat(parts).to(torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """install(top, sub, code) puts a package on the path whose own __init__ must never run; its interface's folder."""

    def install(top: str, sub: str, code: str = FAKE) -> Path:
        folder = tmp_path / "site" / top / sub
        folder.mkdir(parents=True)
        (tmp_path / "site" / top / "__init__.py").write_text("raise SystemExit('imported')\n")
        (folder / "flash_attn_interface.py").write_text(code)
        (folder / "kernels.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return folder

    return install


@pytest.fixture
def library(install: Callable[..., Path]) -> FlashLibrary:
    return load_first([install("vllm", "vllm_flash_attn")])


def check(case: Case, version: int, library: FlashLibrary, most: float = 2e-6, **rules: Any) -> dict[str, Any]:
    """What the library was called with."""
    backend, chosen = VllmFlashAttention(version, library), rules_of(**rules)
    got = backend.attend(case.query, *case.views, case.batch, chosen)
    assert got.dtype == case.query.dtype
    torch.testing.assert_close(got.double(), case.expected(chosen), rtol=most, atol=most)
    call: dict[str, Any] = library.module.calls[-1]
    assert call["fa_version"] == version
    return call


@pytest.mark.parametrize("rules", [{}, {"window": 24}, {"window": 1}, {"softcap": 2.0}, {"scale": 0.3}])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("version", [2, 3])
def test_calls(library: FlashLibrary, version: int, batch: str, rules: dict[str, Any]) -> None:
    call = check(make_case(**BATCHES[batch]), version, library, **rules)
    assert not call["k"].is_contiguous() and call["k"].data_ptr() != call["v"].data_ptr()  # the pool, not a copy


def test_sinks_are_for_fa3(library: FlashLibrary) -> None:
    check(make_case(**BATCHES["mixed"]), 3, library, sinks=torch.tensor([1.0, 0.0, -1.0, 2.0]))


def test_one_schedule_per_kind_of_layer(library: FlashLibrary) -> None:
    case = make_case(**BATCHES["mixed"])
    for rules in ({}, {"window": 8}, {}, {"window": 8}, {"softcap": 1.0}):
        call = check(case, 3, library, **rules)
        assert call["scheduler_metadata"] is not None
    assert library.module.schedules == [((-1, -1), False), ((7, 0), False), ((-1, -1), True)]


def test_float8_pages_are_read_with_scales_of_one(library: FlashLibrary) -> None:
    case = make_case([1, 9], [70, 30], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn)
    call = check(case, 3, library, most=8e-2)  # the query has three bits of mantissa too
    assert call["q"].dtype == torch.float8_e4m3fn
    assert all((call[f"{which}_descale"] == 1).all() for which in "qkv")


CUDA = torch.device("cuda:0")


def needs(**changes: Any) -> Needs:
    common: dict[str, Any] = {
        "device": CUDA,
        "dtype": torch.bfloat16,
        "cache_dtype": torch.bfloat16,
        "head_dim": 128,
        "page_size": 128,
    }
    return Needs(**{**common, **changes})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("version", [2, 3])
def test_it_takes_what_it_can_do(library: FlashLibrary, version: int) -> None:
    backend = VllmFlashAttention(version, library)
    assert backend.unfit(needs()) is None
    assert backend.unfit(needs(softcap=True, page_size=16, head_dim=256, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize(
    ("version", "changes", "says"),
    [
        (3, {"device": torch.device("cpu")}, "CUDA device, not cpu"),
        (3, {"dtype": torch.float32, "cache_dtype": torch.float32}, "float16 or bfloat16, not torch.float32"),
        (3, {"head_dim": 512}, "512 elements"),
        (3, {"head_dim": 100}, "100 elements"),
        (2, {"page_size": 24}, "multiples of 16"),
        (2, {"sinks": True}, "no attention sinks"),
        (2, {"cache_dtype": torch.float8_e4m3fn}, "float8_e4m3fn pages, FA3 reads"),
        (3, {"cache_dtype": torch.float8_e5m2}, "cannot read torch.float8_e5m2"),
        (3, {"cache_dtype": torch.int8}, "cannot read torch.int8"),
    ],
)
def test_it_refuses(library: FlashLibrary, version: int, changes: dict[str, Any], says: str) -> None:
    assert says in str(VllmFlashAttention(version, library).unfit(needs(**changes)))


@pytest.mark.usefixtures("hopper")
def test_fa3_takes_odd_pages_sinks_and_float8(library: FlashLibrary) -> None:
    changes = {"page_size": 24, "sinks": True, "cache_dtype": torch.float8_e4m3fn}
    assert VllmFlashAttention(3, library).unfit(needs(**changes)) is None


def test_what_the_library_or_the_device_refuses(library: FlashLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "FA3 needs compute capability 9.x, cuda:0 has 8.6" in str(VllmFlashAttention(3, library).unfit(needs()))
    assert VllmFlashAttention(2, library).unfit(needs()) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "FA2 needs compute capability 8" in str(VllmFlashAttention(2, library).unfit(needs()))
    monkeypatch.setattr(library.module, "FA3_AVAILABLE", False)
    monkeypatch.setattr(library.module, "FA3_UNAVAILABLE_REASON", "no such symbol", raising=False)
    assert str(VllmFlashAttention(3, library).unfit(needs())).endswith("has no FA3: no such symbol")


@pytest.mark.parametrize(("top", "sub"), [("vllm", "vllm_flash_attn"), ("vllm_flash_attn", "")])
def test_it_is_found_without_importing_the_package(install: Callable[..., Path], top: str, sub: str) -> None:
    folder = install(top, sub)
    found = load_first(package_folders(top, sub))
    assert found.origin == str(folder) and found.module.FA3_AVAILABLE
    assert top not in sys.modules


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("from . import _vllm_fa3_C", "ImportError: cannot import name '_vllm_fa3_C'"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12"),
        ("def flash_attn_varlen_func(q, k, v, max_seqlen_q): ...", "without block_table, fa_version, seqused_k"),
        ("x = 1", "without block_table"),
    ],
)
def test_what_does_not_load_is_a_reason(install: Callable[..., Path], code: str, says: str) -> None:
    broken = install("vllm", "vllm_flash_attn", code)
    found = load_first([broken])
    assert found.module is None and says in found.reason and str(broken) in found.reason
    assert says in str(VllmFlashAttention(3, found).unfit(needs()))
    working = install("vllm_flash_attn", "")
    assert load_first([broken, working]).origin == str(working)


def test_nothing_installed(tmp_path: Path) -> None:
    assert load_first([]).reason == "neither vllm nor vllm_flash_attn is installed"
    assert "has no flash_attn_interface.py" in load_first([tmp_path]).reason
    assert package_folders("no_such_package_anywhere", "") == []


def test_the_definition_agrees_with_itself() -> None:
    """The fake computes on its own; a mistake in both would have to be the same one."""
    case = make_case([2], [3], heads=1, kv_heads=1, dim=2)
    keys, values = (view[case.batch.table[0, :1].long()][0, :3, 0].double() for view in case.views)
    q = case.query[1, 0].double()
    weights = [math.exp(float(q @ keys[i]) * 0.5) for i in (1, 2)]
    want = (weights[0] * values[1] + weights[1] * values[2]) / sum(weights)
    torch.testing.assert_close(case.expected(rules_of(scale=0.5, window=2))[1, 0], want)
