"""Pages, lengths and host pages of a number of bytes."""

import logging
import pickle
from typing import Any

import pytest

import rayk
from rayk import MHAKVCacheParams, MLAKVCacheParams
from rayk.errors import ConfigError, PlanError
from rayk.planning.budget import pages_for_length
from rayk.planning.errors import CacheProtocolError, MemoryPlanError, ModelConfigError

GIB = 1 << 30
MIB = 1 << 20


def speculating(**more: Any) -> MHAKVCacheParams:
    return MHAKVCacheParams(dtype="bfloat16", n_kv_heads=8, head_dim=128, num_layers=32, devices=["cpu"], **more)


def test_the_page_of_an_8b_model_has_16_mib(llama_page: MHAKVCacheParams) -> None:
    assert llama_page.bytes_per_page == 16 * MIB


@pytest.mark.parametrize(
    ("method", "drafts", "slack"), [(None, 0, 0), ("eagle", 3, 10), ("eagle", 1, 5), ("dflash", 7, 23)]
)
def test_slack_of_speculation(method: str | None, drafts: int, slack: int) -> None:
    assert rayk.spec_decode_cache_slack(speculating(speculative_method=method, num_draft_tokens=drafts)) == slack


def test_batch_times_length_caps_the_pages(llama_page: MHAKVCacheParams) -> None:
    assert rayk.compute_num_device_blocks(llama_page, GIB) == 64
    assert rayk.compute_num_device_blocks(llama_page, GIB, max_batch_size=4, max_seq_len=129) == 8
    assert rayk.estimated_memory_size(llama_page, GIB, max_batch_size=4, max_seq_len=129) == 8 * 16 * MIB


def test_not_one_page_is_an_error_with_numbers(llama_page: MHAKVCacheParams) -> None:
    for available in (16 * MIB - 1, 0, -(1 << 40)):
        with pytest.raises(MemoryPlanError, match=r"16\.00 MiB") as caught:
            rayk.compute_num_device_blocks(llama_page, available)
        assert caught.value.needed == 16 * MIB and caught.value.suggestions == []


def test_a_required_length_is_refused_with_the_longest_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    params = speculating(speculative_method="eagle", num_draft_tokens=3)
    with pytest.raises(RuntimeError) as caught:
        rayk.compute_num_device_blocks(params, GIB, 1, 131_072, require_max_seq_len_fits=True)
    [suggestion] = caught.value.suggestions  # type: ignore[attr-defined]  # RuntimeError is what callers catch
    longest = suggestion["max_length"]
    assert longest == 64 * 128 - 10 and str(longest) in str(caught.value)
    assert rayk.compute_num_device_blocks(params, GIB, 1, longest, require_max_seq_len_fits=True) == 64
    assert pages_for_length(params, longest + 1) > 64 and not caplog.records


def test_what_will_hurt_is_a_warning(llama_page: MHAKVCacheParams, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="rayk")
    rayk.compute_num_device_blocks(llama_page, GIB, max_batch_size=65, max_seq_len=10)
    rayk.compute_num_device_blocks(llama_page, GIB, max_batch_size=1, max_seq_len=8193)
    assert ["65 requests" in caplog.text, "8193 tokens" in caplog.text] == [True, True] and len(caplog.records) == 2


def test_longest_request_is_at_least_one_token() -> None:
    params = speculating(speculative_method="dflash", num_draft_tokens=60)
    assert rayk.compute_max_seq_len_fitting_in_cache(params, 16 * MIB) == 1


def test_host_pages() -> None:
    tiered = speculating(enable_prefix_caching=True, kv_connector="local", host_kvcache_swap_space_gb=1.0)
    assert rayk.compute_num_host_blocks(tiered) == 64
    assert rayk.compute_num_host_blocks(speculating()) == 0
    latent = MLAKVCacheParams(
        dtype="bfloat16", num_q_heads=128, head_dim=576, num_layers=61, devices=["cpu"] * 8,
        enable_prefix_caching=True, kv_connector="tiered", host_kvcache_swap_space_gb=1.0,
    )  # fmt: skip
    assert rayk.compute_num_host_blocks(latent) == GIB // (576 * 61 * 2 * 128)  # one copy, not eight
    for size in (None, 0.001, 0.0):
        small = speculating(enable_prefix_caching=True, kv_connector="local", host_kvcache_swap_space_gb=size)
        with pytest.raises(MemoryPlanError, match="host"):
            rayk.compute_num_host_blocks(small)


@pytest.mark.parametrize("wrong", [{"max_batch_size": 0}, {"max_seq_len": -1}, {"max_batch_size": 1.5}])
def test_absurd_numbers_are_refused(llama_page: MHAKVCacheParams, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        rayk.compute_num_device_blocks(llama_page, GIB, **wrong)


@pytest.mark.parametrize(
    "error",
    [
        MemoryPlanError("It is too much.", 10, 5, [{"max_length": 7}, {"max_length": 3, "max_batch_size": 2}]),
        ModelConfigError("is odd", "config.json", ["layers"]),
        CacheProtocolError("PagedMemoryPlanner", "dict", ["devices"]),
    ],
)
def test_errors_keep_type_and_fields_on_their_way(error: rayk.RaykError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and copy.args == error.args and str(copy) == str(error)


def test_the_error_names_its_suggestions() -> None:
    error = MemoryPlanError("Too much.", 10, 5, [{"max_length": 7}, {"max_length": 3, "max_batch_size": 2}])
    assert isinstance(error, PlanError)
    assert str(error) == "Too much. What fits: set max_length to 7, or max_length to 3 and max_batch_size to 2."
