"""Whose pages: fingerprints and seeds."""

from dataclasses import replace
from pathlib import Path

import pytest

import rayk
from rayk.errors import ConfigError, PlanError
from rayk.kvcache.buffers import PageBuffers
from rayk.tiers.identity import fingerprint, keep_seed, named, read_seed
from rayk.tiers.opening import equal_buffers, open_connector

BASE = rayk.MHAKVCacheParams(
    dtype="float32", n_kv_heads=2, head_dim=4, num_layers=1, page_size=8, devices=["cpu"], enable_prefix_caching=True
)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float16"},
        {"n_kv_heads": 4},
        {"head_dim": 8},
        {"num_layers": 2},
        {"page_size": 16},
        {"devices": ["cpu"] * 2},
        {"kv_hash_algo": "xxh3_128"},
        {"kv_hash_seed": bytes(32)},
        {"kv_connector_config": rayk.KVConnectorConfig(model_id="another")},
    ],
    ids=str,
)
def test_whatever_changes_the_bytes_changes_the_fingerprint(change: dict) -> None:
    assert fingerprint(replace(BASE, **change)) != fingerprint(BASE)


def test_what_does_not_change_them_does_not(tmp_path: Path) -> None:
    more = replace(
        BASE,
        devices=["cpu"] * 2,
        data_parallel_degree=2,
        kv_connector_config=rayk.KVConnectorConfig(disk_offload_dir=tmp_path, disk_offload_max_bytes=9),
    )
    assert fingerprint(more) == fingerprint(BASE)


def test_the_first_seed_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert read_seed(folder) is None
    assert keep_seed(folder, b"a" * 32) == b"a" * 32
    assert keep_seed(folder, b"b" * 32) == b"a" * 32
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "seed"]
    (folder / "seed").write_bytes(b"short")
    assert keep_seed(folder, b"b" * 32) == b"b" * 32


def test_only_shards_of_a_replicated_cache_are_one() -> None:
    common = {"dtype": "int8", "head_dim": 4, "num_layers": 1, "page_size": 8, "devices": ["cpu"] * 2}
    scaled = rayk.KVCacheQuantizationConfig(scale_dtype="float32", quantization_granularity=4)
    mla = rayk.MLAKVCacheParams(num_q_heads=2, kvcache_quant_config=scaled, **common)
    mha = rayk.MHAKVCacheParams(n_kv_heads=2, **common)
    both = rayk.MultiKVCacheParams.from_params({"target": mla, "draft": mha})
    assert equal_buffers(both) == [2, 2, 1, 1]
    assert sum(equal_buffers(both)) == len(PageBuffers(both, 2, ["cpu"] * 2).all_bytes)


def test_no_tiers_were_asked_for() -> None:
    connector = open_connector(BASE, [], 0, None)
    assert connector.count() == (0, 0, 0, 0, "")


def test_a_pool_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    params = replace(BASE, kv_connector="local")
    with pytest.raises(PlanError, match="fewer host pages"):
        open_connector(params, PageBuffers(params, 2, ["cpu"]).all_bytes, 1 << 40, None)


def test_a_model_without_a_name_gets_one_for_this_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = rayk.KVConnectorConfig(disk_offload_dir=tmp_path, disk_offload_max_bytes=1 << 20)
    params = replace(BASE, kv_connector="tiered", kv_connector_config=config)
    assert len({fingerprint(named(params)) for _ in range(3)}) == 3
    assert len(caplog.records) == 3 and "model_id" in caplog.text
    ours = replace(params, kv_connector_config=replace(config, model_id="m"))
    assert named(ours) is ours and named(BASE) is BASE


@pytest.mark.parametrize("changes", [{}, {"disk_offload_max_bytes": 1 << 20}, {"disk_offload_dir": "/tmp"}, None])
def test_a_disk_tier_without_a_disk_is_refused(changes: dict | None) -> None:
    config = None if changes is None else rayk.KVConnectorConfig(model_id="m", **changes)
    params = replace(BASE, kv_connector="tiered", kv_connector_config=config)
    with pytest.raises(ConfigError, match="disk_offload_dir"):
        rayk.PagedKVCacheManager(params, rayk.InferenceSession("inline"), 4, 4, max_batch_size=1)
