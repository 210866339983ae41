"""Which backend is taken, what is said when none can be, and torch's varlen_attn behind a fake."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen

from rayk.attention import BACKENDS, AttentionError, Needs, choose, fused, varlen
from rayk.attention.measure import paged_decode_cost
from rayk.attention.pool import PagedPool
from rayk.attention.varlen import TorchVarlen

from .cases import make_case, rules_of


def needs(device: str = "cpu", **changes: Any) -> Needs:
    common: dict[str, Any] = {"dtype": torch.bfloat16, "cache_dtype": torch.bfloat16, "head_dim": 64, "page_size": 16}
    return Needs(torch.device(device), **{**common, **changes})


def only(monkeypatch: pytest.MonkeyPatch, *fit: str) -> None:
    """Of the backends for CUDA, only those named have nothing against anything."""
    for name, make in list(BACKENDS.items()):
        backend = make()
        reason = None if name in fit else f"no {name} today"
        monkeypatch.setattr(type(backend), "unfit", lambda self, n: None if self.name in fit else f"no {self.name}")
        assert reason != ""


def test_names_are_those_of_the_backends() -> None:
    assert {name: make().name for name, make in BACKENDS.items()} == {name: name for name in BACKENDS}


def test_plain_torch_on_the_cpu() -> None:
    assert choose(needs()).name == "torch-sdpa"
    assert choose(needs(softcap=True, sinks=True, cache_dtype=torch.float8_e4m3fn)).name == "torch-sdpa"


@pytest.mark.parametrize(
    ("fit", "chosen"),
    [
        (("torch-sdpa", "torch-flex", "torch-varlen", "vllm-flash-attn-2", "vllm-flash-attn-3"), "vllm-flash-attn-3"),
        (("torch-sdpa", "torch-flex", "torch-varlen", "vllm-flash-attn-2"), "vllm-flash-attn-2"),
        (("torch-sdpa", "torch-flex", "torch-varlen"), "torch-varlen"),
        (("torch-sdpa", "torch-flex"), "torch-flex"),
    ],
)
def test_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch, fit: tuple[str, ...], chosen: str) -> None:
    only(monkeypatch, *fit)
    assert choose(needs("cuda:0")).name == chosen
    assert choose(needs("cuda:0"), "torch-sdpa").name == "torch-sdpa"


def test_refusals_say_why() -> None:
    with pytest.raises(AttentionError, match="'fast' is unknown; use one of vllm-flash-attn-3, vllm-flash-attn-2"):
        choose(needs(), "fast")
    with pytest.raises(AttentionError, match="vllm-flash-attn-3: it needs a CUDA device, not cpu; leave the attention"):
        choose(needs(), "vllm-flash-attn-3")
    with pytest.raises(AttentionError, match=r"no attention backend fits: vllm.*torch-sdpa: .*not torch.int8"):
        choose(needs(cache_dtype=torch.int8))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"page_size": 24}, "powers of two from 16"),
        ({"page_size": 8}, "powers of two from 16"),
        ({"head_dim": 8}, "at least 16"),
        ({"cache_dtype": torch.float8_e4m3fn}, "throughout"),
    ],
)
def test_flex_refuses(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if triton were installed
    with pytest.raises(AttentionError, match=says):
        choose(needs("cuda:0", **changes), "torch-flex")


def test_varlen_wants_fa3_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "activate_flash_attention_impl" in str(TorchVarlen().unfit(needs("cuda:0")))
    monkeypatch.setattr(varlen, "_active", lambda: "FA3")
    assert TorchVarlen().unfit(needs("cuda:0")) is None
    assert "soft caps" in str(TorchVarlen().unfit(needs("cuda:0", softcap=True)))
    assert "throughout" in str(TorchVarlen().unfit(needs("cuda:0", cache_dtype=torch.float8_e4m3fn)))
    monkeypatch.setattr(varlen, "_varlen", lambda: None)
    assert "no block tables" in str(TorchVarlen().unfit(needs("cuda:0")))


@pytest.mark.parametrize(("window", "sent"), [(None, (-1, 0)), (24, (23, 0))])
def test_varlen_is_called_as_torch_documents(monkeypatch: pytest.MonkeyPatch, window: int | None, sent: Any) -> None:
    case, seen = make_case([1, 9], [40, 30]), {}

    def varlen_attn(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **rest: Any):
        seen.update(rest, starts=cu_q, cu_seq_k=cu_k, most=(max_q, max_k), key=key)
        return query

    monkeypatch.setattr(varlen, "_varlen", lambda: varlen_attn)
    TorchVarlen().attend(case.query, *case.views, case.batch, rules_of(window=window))
    names = set(inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters)
    assert {"scale", "window_size", "enable_gqa", "seqused_k", "block_table"} <= names
    assert set(seen) - {"starts", "most", "key"} <= names
    assert seen["window_size"] == sent and seen["cu_seq_k"] is None and seen["most"] == (9, 40)
    assert seen["seqused_k"] is case.batch.kv_lengths and seen["block_table"] is case.batch.table and seen["enable_gqa"]


def test_the_fused_write_is_adapted() -> None:
    """vLLM's kernel takes layer views, slots, and scales that pages of the model's own dtype do not use."""
    calls = []
    write = fused._adapt(lambda *arguments: calls.append(arguments))
    case = make_case([1, 9], [40, 30])
    key, value = torch.randn(10, 2, 16), torch.randn(10, 2, 16)
    write(key, value, *case.views, case.batch.slots)
    (call,) = calls
    assert call[0] is key and call[4] is case.batch.slots and call[5] == "auto"
    assert call[6].dtype == torch.float32 and call[6].tolist() == [1.0]
    pages, offsets = call[4] // 16, call[4] % 16
    PagedPool(case.stored.transpose(1, 2)).write(case.layer, key, value, case.batch)
    assert torch.equal(call[2][pages, offsets], key) and torch.equal(call[3][pages, offsets], value)


def test_without_vllm_nothing_is_fused() -> None:
    assert fused.find_write() is None


def test_the_cost_of_pages_is_measured() -> None:
    cost = paged_decode_cost(4, 64, page_size=16, heads=4, kv_heads=2, head_dim=16, repeats=2)
    assert cost.paged_s > 0 and cost.dense_s > 0 and cost.ratio == cost.paged_s / cost.dense_s
