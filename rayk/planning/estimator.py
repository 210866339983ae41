"""MemoryEstimator: what is left for the KV cache, and whether a length and a batch size fit, by the rules of MAX 26.5.

All sizes are bytes summed over the devices. Configs are duck-typed; the attributes that are read are named in each
method. Results are written into the configs, as callers of the reference expect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from rayk.params import KVCacheParams, require, require_at_least
from rayk.planning.budget import (
    GIB,
    SIGNAL_BUFFER_BYTES,
    Room,
    compute_max_seq_len_fitting_in_cache,
    estimated_memory_size,
    log,
)
from rayk.planning.errors import CacheProtocolError, MemoryPlanError
from rayk.quantity import show_bytes

DEFAULT_BATCH_SIZE = 512
DEFAULT_BATCH_INPUT_TOKENS = 8192
COMPILE_ONLY_BUDGET = 1 << 40
NEAR = 0.95  # of the free memory: beyond this, fragmentation and what other libraries take may not fit
VISION_SHARE = 5  # the vision cache gets at most a fifth of what the KV cache could have
SMALLER = "Run a smaller model, use a smaller precision, or a device with more memory."


class MemoryEstimator:
    """Estimates before anything is loaded. All methods are class methods; nothing is kept."""

    @classmethod
    def free_memory(cls, devices: Sequence[Any]) -> int:
        """Free bytes of all devices (`.stats["free_memory"]`), or their total where none of them is reported free."""
        try:
            free = sum(int(device.stats["free_memory"]) for device in devices)
            return free or sum(int(device.stats.get("total_memory", 0)) for device in devices)
        except Exception as error:  # whatever a driver raises; the caller decides what it means
            log.warning("The devices' memory cannot be read: %r", error)
            raise

    @classmethod
    def static_memory_size(
        cls, model_weights_size: int, activation_memory_size: int, signal_buffer_size: int = 0
    ) -> int:
        """Everything but the KV cache."""
        return model_weights_size + activation_memory_size + signal_buffer_size

    @classmethod
    def available_kv_cache_memory(
        cls,
        model_weights_size: int,
        activation_memory_size: int,
        model_config: Any,
        devices: Sequence[Any],
        signal_buffer_size: int = 0,
    ) -> int:
        """free x `.kv_cache.device_memory_utilization` - static, rounded down; negative when even that is too much."""
        static = cls.static_memory_size(model_weights_size, activation_memory_size, signal_buffer_size)
        return int(cls.free_memory(devices) * _utilization(model_config) - static)

    @classmethod
    def max_supported_sequence_length(
        cls,
        model_weights_size: int,
        activation_memory_size: int,
        model_config: Any,
        devices: Sequence[Any],
        arch_config: Any,
        signal_buffer_size: int = 0,
    ) -> int | None:
        """The longest request, in tokens, that one replica can hold: what was estimated before, else all that is left.

        None without a KV cache (no `arch_config.get_kv_params`) and on virtual devices.
        """
        params = _kv_params(arch_config)
        if params is None or _compile_only(devices):
            return None
        budget = model_config.kv_cache._available_cache_memory
        if budget is None:
            budget = cls.available_kv_cache_memory(
                model_weights_size, activation_memory_size, model_config, devices, signal_buffer_size
            )
        return compute_max_seq_len_fitting_in_cache(params, budget)

    @classmethod
    def estimate_memory_footprint(
        cls,
        pipeline_config: Any,
        model_config: Any,
        arch_config: Any,
        devices: Sequence[Any],
        model_weights_size: int,
        activation_memory_size: int,
        signal_buffer_size: int = 0,
        arch: Any = None,
    ) -> None:
        """Settle `runtime.max_batch_size`, `max_length` and the cache's budget, or raise MemoryPlanError with advice.

        A length that the user did not set is lowered, with a warning, when it does not fit; one that the user set is
        not touched. For `pipeline_config.draft_model` only the budget is written. Virtual devices, and devices whose
        memory cannot be read, are taken to be large enough.
        """
        runtime = pipeline_config.runtime
        given = {"max_batch_size": runtime.max_batch_size, "max_length": model_config.max_length}
        require_at_least(1, **{name: value for name, value in given.items() if value is not None})
        require_at_least(0, weights=model_weights_size, activations=activation_memory_size, signals=signal_buffer_size)
        if _compile_only(devices):
            _settle(pipeline_config, model_config, arch_config, COMPILE_ONLY_BUDGET)
            return
        try:
            free = cls.free_memory(devices)
        except Exception:  # logged there; without numbers there is nothing to check
            _settle(pipeline_config, model_config, arch_config, None)
            return
        static = cls.static_memory_size(model_weights_size, activation_memory_size, signal_buffer_size)
        parts = {"weights": model_weights_size, "activations": activation_memory_size, "signals": signal_buffer_size}
        budget = _budget(parts, static, free, _utilization(model_config))
        params = _kv_params(arch_config)
        if params is None:
            runtime.max_batch_size = _batch_size(runtime, default=1)
            model_config.max_length = arch_config.get_max_seq_len()
            model_config.kv_cache._available_cache_memory = 0
            _warn_if_near(static, free)
            return
        layers = params.num_layers if getattr(params, "per_layer_buffers", False) else 1
        budget = min(budget, layers * sum(_largest_allocation(device) for device in devices))
        vision = _vision_cache(pipeline_config, model_config, arch_config, arch, len(devices), budget)
        room = Room(params, budget - vision, free - static - vision)
        on_host = len(devices) == 1 and devices[0].is_host
        batch = _batch_size(runtime, default=1 if on_host else DEFAULT_BATCH_SIZE)
        if pipeline_config.draft_model is not None and model_config is pipeline_config.draft_model:
            if runtime.max_batch_size is None:
                raise MemoryPlanError("A draft model is estimated after its target: set max_batch_size.", 0, free, [])
            length = arch_config.get_max_seq_len()
            kv = estimated_memory_size(params, room.budget, batch, length)
            _check_total(room, kv, batch, length, free, length_is_set=True)
        else:
            runtime.max_batch_size = batch
            kv = _settle_length(room, model_config, arch_config, batch, free)
        model_config.kv_cache._available_cache_memory = kv


def _settle_length(room: Room, model_config: Any, arch_config: Any, batch: int, free: int) -> int:
    """Write the maximal length; the cache's bytes for it."""
    is_set = model_config.max_length is not None
    length = model_config.max_length = arch_config.get_max_seq_len()
    kv = estimated_memory_size(room.params, room.budget, batch, length)
    if kv > room.left and not is_set:
        shorter = room.longest(batch, length)
        if shorter is not None:
            fewer = room.largest_batch(length, batch)
            log.warning(
                "max_length lowered from the model's %d to %d: %d requests of that length need more than the %s left%s",
                length,
                shorter,
                batch,
                show_bytes(room.left),
                f"; max_batch_size={fewer} would keep it" if fewer else "",
            )
            length = model_config.max_length = shorter
            kv = room.size(batch, length)
    _check_total(room, kv, batch, length, free, is_set)
    return kv


def _check_total(room: Room, kv: int, batch: int, length: int, free: int, length_is_set: bool) -> None:
    total = free - room.left + kv
    if kv > room.left:
        raise MemoryPlanError(
            f"Model and KV cache need {show_bytes(total)} with max_length {length} and max_batch_size {batch}, "
            f"{show_bytes(free)} are free.",
            total,
            free,
            room.suggestions(batch, length, length_is_set),
        )
    _warn_if_near(total, free)


def _warn_if_near(total: int, free: int) -> None:
    if total > NEAR * free:
        log.warning(
            "Model and KV cache take %s of %s free: other allocations may fail", show_bytes(total), show_bytes(free)
        )


def _budget(parts: dict[str, int], static: int, free: int, utilization: float) -> int:
    """Bytes that the utilization leaves for caches, at least 1."""
    listed = ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items())
    if static > free:
        raise MemoryPlanError(
            f"The model does not fit: {listed}, {show_bytes(free)} are free. {SMALLER}", static, free, []
        )
    budget = int(free * utilization - static)
    if budget <= 0:
        raise MemoryPlanError(
            f"No room for a KV cache: {listed}; {utilization:g} of {show_bytes(free)} free may be used. {SMALLER}",
            static,
            int(free * utilization),
            [],
        )
    return budget


def _batch_size(runtime: Any, default: int) -> int:
    """The user's batch size or the default, at most one request per token of a forward."""
    batch = default if runtime.max_batch_size is None else int(runtime.max_batch_size)
    most = int(getattr(runtime, "max_batch_input_tokens", DEFAULT_BATCH_INPUT_TOKENS))
    if batch > most:
        log.info("max_batch_size lowered from %d to max_batch_input_tokens, %d", batch, most)
    return min(batch, most)


def _vision_cache(
    pipeline_config: Any, model_config: Any, arch_config: Any, arch: Any, devices: int, budget: int
) -> int:
    """Bytes of the vision cache on all devices; `runtime.max_vision_cache_entries` is lowered to what fits."""
    runtime = pipeline_config.runtime
    entries: int = getattr(runtime, "max_vision_cache_entries", 0) or 0
    planner = getattr(arch, "memory_planner", None)
    if entries <= 0 or planner is None:
        return 0
    entry = planner(arch_config).estimate_vision_cache_entry_bytes(model_config.huggingface_config) * max(1, devices)
    if entry <= 0:
        return 0
    most = budget // VISION_SHARE // entry
    if entries > most:
        log.warning(
            "max_vision_cache_entries lowered from %d to %d: the vision cache gets a fifth of the %s for caches%s",
            entries,
            most,
            show_bytes(budget),
            "" if most else ", so it is off",
        )
        entries = runtime.max_vision_cache_entries = most
    return int(entries * entry)


def _settle(pipeline_config: Any, model_config: Any, arch_config: Any, budget: int | None) -> None:
    """Take the settings as they are, with defaults for what is missing."""
    runtime = pipeline_config.runtime
    runtime.max_batch_size = runtime.max_batch_size or 1
    model_config.max_length = arch_config.get_max_seq_len()
    if budget is not None:
        model_config.kv_cache._available_cache_memory = budget


def _kv_params(arch_config: Any) -> KVCacheParams | None:
    """The cache's parameters, None for an architecture without one."""
    get = getattr(arch_config, "get_kv_params", None)
    params: KVCacheParams | None = None if get is None else get()
    return params


def _utilization(model_config: Any) -> float:
    value = model_config.kv_cache.device_memory_utilization
    known = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    require(known, f"device_memory_utilization must be above 0, got {value!r}")
    return float(value)


def _largest_allocation(device: Any) -> int:
    """Bytes of the largest single allocation on that device; no limit where it names none."""
    return int(getattr(device, "max_single_alloc_size", 1 << 62))


def _compile_only(devices: Sequence[Any]) -> bool:
    """Whether all devices are virtual (`.is_virtual`): there is no memory to ask for."""
    return bool(devices) and all(getattr(device, "is_virtual", False) for device in devices)


class MemoryPlanner:
    """For a model without a KV cache. Sizes are bytes over all devices, vision cache entries on one device."""

    always_signal_buffers: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def estimate_weights_size(self, pipeline_config: Any) -> int:
        """What `pipeline_config.model.weights_size()` says."""
        size: int = pipeline_config.model.weights_size()
        return size

    def estimate_activation_memory(self, pipeline_config: Any, huggingface_config: Any) -> int:
        """Nothing is reserved."""
        return 0

    def estimate_vision_cache_entry_bytes(self, huggingface_config: Any) -> int:
        """No vision cache."""
        return 0

    def estimate_signal_buffer_memory(self, pipeline_config: Any) -> int:
        """The pipeline's own estimate; one device's buffers if a single device has them too (always_signal_buffers)."""
        if self.always_signal_buffers and len(pipeline_config.model.device_specs) == 1:
            return SIGNAL_BUFFER_BYTES
        size: int = pipeline_config.estimate_signal_buffer_memory(arch_config=self.config)
        return size


class PagedMemoryPlanner(MemoryPlanner):
    """For a model with a paged KV cache: `config` has `devices` and `get_kv_params`, else CacheProtocolError."""

    activation_reservation: ClassVar[int] = 0

    def __init__(self, config: Any) -> None:
        missing = [name for name in ("devices", "get_kv_params") if not hasattr(config, name)]
        if missing:
            raise CacheProtocolError(type(self).__name__, type(config).__name__, missing)
        super().__init__(config)

    def estimate_activation_memory(self, pipeline_config: Any, huggingface_config: Any) -> int:
        """The reservation that with_activation_reservation() was given."""
        return self.activation_reservation

    @classmethod
    def with_activation_reservation(cls, activation_bytes: int, always_signal_buffers: bool = False) -> type[Self]:
        """A subclass that reserves so many bytes for activations; it can be specialised again.

        `always_signal_buffers`: buffers for collectives are reserved on a single device as well.
        """
        require_at_least(0, activation_bytes=activation_bytes)
        name = f"{cls.__name__.partition('(')[0]}({activation_bytes / GIB:.0f}GiB)"
        own = {
            "activation_reservation": activation_bytes,
            "always_signal_buffers": always_signal_buffers,
            "__module__": cls.__module__,
            "__doc__": f"{cls.__name__} with {activation_bytes} bytes reserved for activations.",
        }
        return type(name, (cls,), own)
