"""rayk: a paged KV cache for LLM serving, as a Ray component.

The names here are the public surface. They are loaded on first use: importing rayk imports neither Ray nor
torch, so that the scheduler, the planning tasks and `rayk --help` start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayk.cluster import Cluster, attach
    from rayk.context import TextContext
    from rayk.dispatch.output import Handle, Output, Update
    from rayk.errors import InsufficientBlocksError, RaykError, ReplicaLostError
    from rayk.kvcache.context_batch import ContextBatch
    from rayk.kvcache.metrics import KVCacheMetrics
    from rayk.kvcache.runtime_inputs import BatchCharacteristics
    from rayk.kvcache.tick import Admission, HitCounts, PrefixCacheReset, Tick, TickResult
    from rayk.manager.async_manager import AsyncPagedKVCacheManager
    from rayk.manager.manager import PagedKVCacheManager
    from rayk.params import (
        KVCacheQuantizationConfig,
        KVConnectorConfig,
        MHAKVCacheParams,
        MLAKVCacheParams,
        MultiKVCacheParams,
    )
    from rayk.planning import (
        SIGNAL_BUFFER_BYTES,
        MemoryEstimator,
        MemoryPlanError,
        MemoryPlanner,
        PagedMemoryPlanner,
        compute_max_seq_len_fitting_in_cache,
        compute_num_device_blocks,
        compute_num_host_blocks,
        estimated_memory_size,
        spec_decode_cache_slack,
    )
    from rayk.protocol.admission import AdmissionPolicy, TenantQuota
    from rayk.protocol.kv_events import KVEventsConfig
    from rayk.protocol.lines import PathState
    from rayk.request_errors import (
        ForwardError,
        QueueFullError,
        RequestCancelledError,
        RequestError,
        RequestTimeoutError,
    )
    from rayk.sampling import SamplingParams
    from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad, ScalePolicy, desired_replicas
    from rayk.session import InferenceSession

__version__ = "0.1.0"

_HOMES = {
    "scheduler.admission.queue": ["AdmissionPolicy", "TenantQuota"],
    "cluster": ["Cluster", "attach"],
    "protocol.kv_events": ["KVEventsConfig"],
    "request_errors": [
        "ForwardError",
        "QueueFullError",
        "RequestCancelledError",
        "RequestError",
        "RequestTimeoutError",
    ],
    "dispatch.output": ["Handle", "Output", "Update"],
    "sampling": ["SamplingParams"],
    "kvcache.context_batch": ["ContextBatch"],
    "manager.async_manager": ["AsyncPagedKVCacheManager"],
    "context": ["TextContext"],
    "errors": ["InsufficientBlocksError", "RaykError", "ReplicaLostError"],
    "kvcache.runtime_inputs": ["BatchCharacteristics"],
    "protocol.lines": ["PathState"],
    "manager.manager": ["PagedKVCacheManager"],
    "planning": [
        "SIGNAL_BUFFER_BYTES",
        "MemoryEstimator",
        "MemoryPlanError",
        "MemoryPlanner",
        "PagedMemoryPlanner",
        "compute_max_seq_len_fitting_in_cache",
        "compute_num_device_blocks",
        "compute_num_host_blocks",
        "estimated_memory_size",
        "spec_decode_cache_slack",
    ],
    "kvcache.metrics": ["KVCacheMetrics"],
    "params": [
        "KVCacheQuantizationConfig",
        "KVConnectorConfig",
        "MHAKVCacheParams",
        "MLAKVCacheParams",
        "MultiKVCacheParams",
    ],
    "scheduler.scaling": ["Drained", "Removed", "ReplicaLoad", "ScalePolicy", "desired_replicas"],
    "session": ["InferenceSession"],
    "kvcache.tick": ["Admission", "HitCounts", "PrefixCacheReset", "Tick", "TickResult"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SIGNAL_BUFFER_BYTES",
    "Admission",
    "AdmissionPolicy",
    "AsyncPagedKVCacheManager",
    "BatchCharacteristics",
    "Cluster",
    "ContextBatch",
    "Drained",
    "ForwardError",
    "Handle",
    "HitCounts",
    "InferenceSession",
    "InsufficientBlocksError",
    "KVCacheMetrics",
    "KVCacheQuantizationConfig",
    "KVConnectorConfig",
    "KVEventsConfig",
    "MHAKVCacheParams",
    "MLAKVCacheParams",
    "MemoryEstimator",
    "MemoryPlanError",
    "MemoryPlanner",
    "MultiKVCacheParams",
    "Output",
    "PagedKVCacheManager",
    "PagedMemoryPlanner",
    "PathState",
    "PrefixCacheReset",
    "QueueFullError",
    "RaykError",
    "Removed",
    "ReplicaLoad",
    "ReplicaLostError",
    "RequestCancelledError",
    "RequestError",
    "RequestTimeoutError",
    "SamplingParams",
    "ScalePolicy",
    "TenantQuota",
    "TextContext",
    "Tick",
    "TickResult",
    "Update",
    "attach",
    "compute_max_seq_len_fitting_in_cache",
    "compute_num_device_blocks",
    "compute_num_host_blocks",
    "desired_replicas",
    "estimated_memory_size",
    "spec_decode_cache_slack",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rayk' has no attribute {name!r}")
    value = getattr(import_module(f"rayk.{_HOME[name]}"), name)
    globals()[name] = value
    return value
