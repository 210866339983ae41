"""Parameters: page bytes, shapes per device, and everything that cannot work."""

import pytest

from rayk import (
    InferenceSession,
    KVCacheQuantizationConfig,
    KVConnectorConfig,
    MHAKVCacheParams,
    MLAKVCacheParams,
    MultiKVCacheParams,
    PagedKVCacheManager,
)
from rayk.errors import ConfigError, RaykError


def mha(tp: int = 1, dp: int = 1, **kwargs) -> MHAKVCacheParams:
    given = {"dtype": "bfloat16", "n_kv_heads": 8, "head_dim": 128, "num_layers": 32, "page_size": 128, **kwargs}
    return MHAKVCacheParams(devices=["cpu"] * tp * dp, data_parallel_degree=dp, **given)


def mla(tp: int = 1, **kwargs) -> MLAKVCacheParams:
    given = {"dtype": "bfloat16", "num_q_heads": 128, "head_dim": 576, "num_layers": 61, "page_size": 128, **kwargs}
    return MLAKVCacheParams(devices=["cpu"] * tp, **given)


# -- bytes and shapes: published examples ---------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_page_bytes_of_heads_split_over_shards(tp: int) -> None:
    assert mha(tp).bytes_per_page == 16 * 2**20
    assert mha(tp).heads_per_device == 8 // tp


def test_page_bytes_count_scales() -> None:
    quantised = mha(dtype="float8_e4m3fn", kvcache_quant_config=KVCacheQuantizationConfig(quantization_granularity=128))
    assert quantised.bytes_per_page == 8_650_752


@pytest.mark.parametrize(("tp", "page_bytes"), [(1, 8_994_816), (8, 8 * 8_994_816)])
def test_page_bytes_of_a_latent_cache_are_copied_to_every_shard(tp: int, page_bytes: int) -> None:
    assert mla(tp).bytes_per_page == page_bytes
    assert (mla(tp).kv_dim, mla(tp).heads_per_device) == (1, 1)


def test_page_bytes_do_not_depend_on_replicas() -> None:
    assert mha(dp=4).bytes_per_page == mha().bytes_per_page
    assert mha(tp=2, dp=4).tensor_parallel_degree == 2
    assert mha(tp=2, dp=4).replica_devices(3) == ("cpu", "cpu")


def test_more_shards_than_heads_copy_heads_when_allowed() -> None:
    copied = mha(tp=16, allow_kv_head_replication=True)
    assert copied.heads_per_device == 1
    assert copied.bytes_per_page == 2 * 16 * 2**20


@pytest.mark.parametrize(
    ("dtype", "scale", "quantised"),
    [
        ("float8_e4m3fn", "float32", True),
        ("float8_e4m3fnuz", "float8_e8m0fnu", True),
        ("int8", "float16", True),
        ("int8", "bfloat16", False),
        ("bfloat16", "float32", False),
    ],
)
def test_only_quantised_values_have_scales(dtype: str, scale: str, quantised: bool) -> None:
    params = mha(dtype=dtype, kvcache_quant_config=KVCacheQuantizationConfig(scale_dtype=scale))
    assert params.quantized is quantised
    assert (params.layout.scale_shape == (2, 32, 128, 8, 1)) is quantised


def test_a_dtype_may_come_from_torch() -> None:
    import torch

    assert mha(dtype=torch.bfloat16) == mha()


# -- several caches --------------------------------------------------------------------------------------


def test_caches_share_a_page_and_add_up_their_bytes() -> None:
    both = MultiKVCacheParams.from_params({"target": mha(), "draft": mha(num_layers=2)})
    assert both.bytes_per_page == 17 * 2**20
    assert list(both.leaves) == ["target", "draft"]


def test_caches_may_nest() -> None:
    inner = MultiKVCacheParams.from_params({"a": mha(), "b": mha(num_layers=2)})
    both = MultiKVCacheParams.from_params({"x": inner, "y": mha()})
    assert list(both.leaves) == ["x.a", "x.b", "y"]
    assert both.bytes_per_page == 33 * 2**20


@pytest.mark.parametrize(
    "other",
    [
        {"page_size": 64},
        {"enable_prefix_caching": True},
        {"enable_dp_cross_replica_prefix_copy": False},
        {"kv_hash_algo": "xxh3_128"},
        {"kv_hash_seed": b"s" * 32},
        {"speculative_method": "eagle"},
        {"num_draft_tokens": 2},
        {"tp": 2},
        {"tp": 1, "dp": 2},
    ],
    ids=str,
)
def test_caches_that_differ_in_what_they_share_are_refused(other) -> None:
    with pytest.raises(ConfigError, match=r"'target' and 'draft' differ in"):
        MultiKVCacheParams.from_params({"target": mha(), "draft": mha(**other)})


def test_no_caches_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MultiKVCacheParams.from_params({})


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"dtype": "float64"}, "'float64' is not one of"),
        ({"dtype": "float33"}, "'float33'"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_layers": -1}, "num_layers must be an integer of at least 1, got -1"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": 1.5}, "page_size"),
        ({"page_size": True}, "page_size"),
        ({"dp": 0}, "data_parallel_degree"),
        ({"num_draft_tokens": -1}, "num_draft_tokens"),
        ({"tp": 3}, "8 KV heads cannot be split over 3"),
        ({"tp": 16}, "allow_kv_head_replication=True"),
        ({"tp": 12, "allow_kv_head_replication": True}, "8 KV heads cannot be split over 12"),
        ({"kv_hash_algo": "md5"}, "md5"),
        ({"kv_hash_seed": b"short"}, "32 bytes"),
        ({"kv_hash_seed": "s" * 32}, "32 bytes"),
        ({"speculative_method": "guess"}, "guess"),
        ({"kv_connector": "cloud"}, "cloud"),
        ({"kv_connector": "local"}, "needs enable_prefix_caching=True"),
        (
            {"dtype": "int8", "kvcache_quant_config": KVCacheQuantizationConfig(quantization_granularity=48)},
            "48 does not divide head_dim 128",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_the_numbers(bad, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        mha(**bad)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("devices", "dp", "says"),
    [([], 1, "at least one device"), (["cpu"] * 3, 2, "2 does not divide the 3"), ("cpu", 1, r"\['cpu'\]")],
)
def test_devices_that_cannot_be_shared_out_are_refused(devices, dp: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MHAKVCacheParams(
            dtype="float32", n_kv_heads=3, head_dim=1, num_layers=1, devices=devices, data_parallel_degree=dp
        )


def test_query_heads_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ConfigError, match="128 query heads cannot be split over 3"):
        mla(3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KVCacheQuantizationConfig(quantization_granularity=0),
        lambda: KVCacheQuantizationConfig(scale_dtype="complex64"),
        lambda: KVConnectorConfig(disk_offload_max_bytes=-1),
        lambda: KVConnectorConfig(num_disk_workers=0),
    ],
)
def test_small_configs_are_validated_too(make) -> None:
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("pages", "host", "batch", "error"),
    [
        (0, 0, 1, ConfigError),
        (-4, 0, 1, ConfigError),
        (2.5, 0, 1, ConfigError),
        (4, -1, 1, ConfigError),
        (4, 0, 0, ConfigError),
        (4, 0, -1, ConfigError),
        (4, 8, 1, ConfigError),
    ],
)
def test_a_manager_refuses_sizes_that_cannot_work(
    session: InferenceSession, pages, host: int, batch: int, error: type[RaykError]
) -> None:
    with pytest.raises(error) as caught:
        PagedKVCacheManager(mha(num_layers=1, page_size=1), session, pages, host, max_batch_size=batch)
    assert isinstance(caught.value, ValueError)


def test_a_tier_without_a_size_is_refused_and_one_of_gigabytes_is_counted_in_pages(session: InferenceSession) -> None:
    tiered = {"num_layers": 1, "page_size": 1, "enable_prefix_caching": True, "kv_connector": "local"}
    with pytest.raises(ConfigError, match="needs total_num_host_pages or host_kvcache_swap_space_gb"):
        PagedKVCacheManager(mha(**tiered), session, 4, max_batch_size=1)
    params = mha(**tiered, host_kvcache_swap_space_gb=0.001)
    with PagedKVCacheManager(params, session, 4, max_batch_size=1) as manager:
        assert manager.get_num_host_pages(0) == int(0.001 * 2**30) // params.bytes_per_page


def test_an_unknown_router_is_refused_by_name(make) -> None:
    with pytest.raises(ConfigError, match="'random' is not one of cost, round-robin, least-loaded, prefix, session"):
        make(4, router="random")
