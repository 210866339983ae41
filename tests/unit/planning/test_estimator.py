"""MemoryEstimator and the planners beyond what the recorded cases ask."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import SIGNAL_BUFFER_BYTES, MemoryEstimator, MemoryPlanError, MemoryPlanner, PagedMemoryPlanner
from rayk.errors import ConfigError, RaykError

GIB = 1 << 30
MIB = 1 << 20
Make = Callable[..., tuple[Any, Any, Any]]
Device = Callable[..., Any]


def estimate(
    made: tuple[Any, Any, Any], devices: list[Any], weights: int = 16 * GIB, arch: Any = None
) -> tuple[int, int, int]:
    pipeline, model, config = made
    MemoryEstimator.estimate_memory_footprint(pipeline, model, config, devices, weights, 0, 0, arch)
    return pipeline.runtime.max_batch_size, model.max_length, model.kv_cache._available_cache_memory


@pytest.mark.parametrize(
    ("batch", "length"), [(64, 8192), (None, 8192), (4, 131_072), (1, 131_072), (4000, 131_072), (4000, 1)]
)
def test_suggestions_fit_when_they_are_followed(pipeline: Make, device: Device, batch: int | None, length: int) -> None:
    devices = [device(80 * GIB)]
    with pytest.raises(MemoryPlanError) as caught:  # 1.5 x 80 GiB may be used, 13 GiB are left beside the weights
        estimate(pipeline(batch, length, utilization=1.5), devices, weights=67 * GIB)
    assert caught.value.suggestions and caught.value.needed > caught.value.available == 80 * GIB
    for suggestion in caught.value.suggestions:
        assert all(str(value) in str(caught.value) for value in suggestion.values())
        tried = {"batch": batch, "length": length} | {
            {"max_batch_size": "batch", "max_length": "length"}[name]: value for name, value in suggestion.items()
        }
        _, _, kv = estimate(pipeline(**tried, utilization=1.5), devices, weights=67 * GIB)
        assert kv + 67 * GIB <= 80 * GIB


@settings(max_examples=200)
@given(
    weights=st.integers(0, 90),
    free=st.integers(1, 100),
    utilization=st.floats(0.1, 3.0),
    batch=st.none() | st.integers(1, 10_000),
    length=st.none() | st.integers(1, 200_000),
)
def test_whatever_is_settled_or_suggested_fits(
    pipeline: Make,
    device: Device,
    weights: int,
    free: int,
    utilization: float,
    batch: int | None,
    length: int | None,
) -> None:
    def total(batch: int | None, length: int | None) -> int:
        made = pipeline(batch, length, utilization=utilization)
        return weights * GIB + estimate(made, [device(free * GIB)], weights=weights * GIB)[2]

    try:
        assert total(batch, length) <= free * GIB
    except MemoryPlanError as error:
        for suggestion in error.suggestions:
            tried = total(suggestion.get("max_batch_size", batch), suggestion.get("max_length", length))
            assert tried <= free * GIB


def test_a_suggested_length_is_the_longest(pipeline: Make, device: Device) -> None:
    with pytest.raises(MemoryPlanError) as caught:
        estimate(pipeline(64, 8192, utilization=1.5), [device(80 * GIB)], weights=67 * GIB)
    shorter = next(s["max_length"] for s in caught.value.suggestions if "max_length" in s)
    with pytest.raises(MemoryPlanError):
        estimate(pipeline(64, shorter + 1, utilization=1.5), [device(80 * GIB)], weights=67 * GIB)


def test_only_a_default_length_is_lowered(pipeline: Make, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="rayk")
    batch, length, kv = estimate(pipeline(64, None, utilization=1.5), [device(80 * GIB)], weights=67 * GIB)
    assert (batch, length) == (64, 13 * 128) and kv + 67 * GIB <= 80 * GIB
    assert "lowered from the model's 131072 to 1664" in caplog.text


def test_settings_that_fit_say_nothing(pipeline: Make, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rayk")
    assert estimate(pipeline(), [device(80 * GIB)]) == (512, 131_072, 56 * GIB)
    assert not caplog.records


def test_the_largest_allocation_of_the_devices_caps_the_cache(pipeline: Make, device: Device) -> None:
    devices = [device(80 * GIB, max_single_alloc_size=4 * GIB)]
    assert estimate(pipeline(), devices)[2] == 4 * GIB


def test_a_vision_cache_gets_at_most_a_fifth(pipeline: Make, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    class Vision(PagedMemoryPlanner):
        def estimate_vision_cache_entry_bytes(self, huggingface_config: Any) -> int:
            return GIB

    arch = SimpleNamespace(memory_planner=Vision)
    made = pipeline(max_vision_cache_entries=4)
    assert estimate(made, [device(80 * GIB)], arch=arch)[2] == 52 * GIB
    assert made[0].runtime.max_vision_cache_entries == 4 and not caplog.records
    made = pipeline(max_vision_cache_entries=100)
    assert estimate(made, [device(80 * GIB)], arch=arch)[2] == 45 * GIB
    assert made[0].runtime.max_vision_cache_entries == 11 and "from 100 to 11" in caplog.text
    made = pipeline(max_vision_cache_entries=100)
    assert estimate(made, [device(24 * GIB)], arch=arch)[0] == 512
    assert made[0].runtime.max_vision_cache_entries == 1
    assert estimate(pipeline(max_vision_cache_entries=9), [device(20 * GIB)], arch=arch)[2] == 2 * GIB
    assert "so it is off" in caplog.text


def test_a_draft_model_only_gets_its_budget(pipeline: Make, device: Device) -> None:
    target, model, arch = pipeline(8, 4096)
    target.draft_model = model
    MemoryEstimator.estimate_memory_footprint(target, model, arch, [device(80 * GIB)], GIB, 0)
    assert model.kv_cache._available_cache_memory == 8 * 32 * 16 * MIB
    assert (target.runtime.max_batch_size, model.max_length) == (8, 4096)
    target.runtime.max_batch_size = None
    with pytest.raises(MemoryPlanError, match="max_batch_size"):
        MemoryEstimator.estimate_memory_footprint(target, model, arch, [device(80 * GIB)], GIB, 0)


def test_virtual_devices_have_a_tebibyte(pipeline: Make, device: Device) -> None:
    made, devices = pipeline(), [device(0, is_virtual=True)]
    assert estimate(made, devices) == (1, 131_072, 1 << 40)
    assert MemoryEstimator.max_supported_sequence_length(0, 0, made[1], devices, made[2]) is None


def test_devices_that_cannot_be_asked_are_trusted(
    pipeline: Make, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @property
        def stats(self) -> dict[str, int]:
            raise OSError("driver gone")

    assert estimate(pipeline(), [Broken()]) == (1, 131_072, None)
    assert "driver gone" in caplog.text
    with pytest.raises(OSError, match="driver gone"):
        MemoryEstimator.free_memory([Broken()])


def test_the_longest_request_comes_from_what_was_estimated(pipeline: Make, device: Device) -> None:
    made, devices = pipeline(1, 4096), [device(80 * GIB)]
    before = MemoryEstimator.max_supported_sequence_length(16 * GIB, 0, made[1], devices, made[2])
    estimate(made, devices)
    after = MemoryEstimator.max_supported_sequence_length(16 * GIB, 0, made[1], devices, made[2])
    assert (before, after) == (56 * GIB // (16 * MIB) * 128, 4096)


@pytest.mark.parametrize("wrong", [0, -0.5, float("nan"), float("inf"), None, "0.9"])
def test_a_utilization_must_be_above_zero(pipeline: Make, device: Device, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="utilization"):
        estimate(pipeline(utilization=wrong), [device(80 * GIB)])


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": -5}])
def test_settings_below_one_are_refused(pipeline: Make, device: Device, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        estimate(pipeline(**wrong), [device(80 * GIB)])


def test_negative_sizes_are_refused(pipeline: Make, device: Device) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        estimate(pipeline(), [device(80 * GIB)], weights=-1)


def test_a_planner_needs_a_config_with_a_cache() -> None:
    with pytest.raises(TypeError, match="get_kv_params") as caught:
        PagedMemoryPlanner(SimpleNamespace(devices=[]))
    assert isinstance(caught.value, RaykError)
    assert MemoryPlanner(SimpleNamespace()).estimate_activation_memory(None, None) == 0


def test_a_reservation_can_be_specialised_again() -> None:
    config = SimpleNamespace(devices=[], get_kv_params=lambda: None)
    first = PagedMemoryPlanner.with_activation_reservation(15 * GIB)
    second = first.with_activation_reservation(2 * GIB, always_signal_buffers=True)
    assert issubclass(second, first) and second.__name__ == "PagedMemoryPlanner(2GiB)"
    one = SimpleNamespace(
        model=SimpleNamespace(device_specs=[None]), estimate_signal_buffer_memory=lambda arch_config: 0
    )
    assert first(config).estimate_activation_memory(None, None) == 15 * GIB
    assert first(config).estimate_signal_buffer_memory(one) == 0
    assert second(config).estimate_activation_memory(None, None) == 2 * GIB
    assert second(config).estimate_signal_buffer_memory(one) == SIGNAL_BUFFER_BYTES
    with pytest.raises(ConfigError):
        PagedMemoryPlanner.with_activation_reservation(-1)
