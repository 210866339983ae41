"""Memory planners: what a model needs beside its KV cache."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from rayk.memory.budget import GIB, SIGNAL_BUFFER_BYTES
from rayk.memory.errors import CacheProtocolError
from rayk.params import require_at_least


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
