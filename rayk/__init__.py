"""rayk: a paged KV cache for LLM serving, as a Ray component.

The names here are the public surface. They are loaded on first use: importing rayk imports neither Ray nor
torch, so that the scheduler, the planning tasks and `rayk --help` start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayk.admission import AdmissionPolicy, TenantQuota
    from rayk.async_manager import AsyncPagedKVCacheManager
    from rayk.batch import ContextBatch
    from rayk.cluster import Cluster
    from rayk.context import TextContext
    from rayk.engine.errors import (
        ForwardError,
        QueueFullError,
        RequestCancelledError,
        RequestError,
        RequestTimeoutError,
    )
    from rayk.engine.output import Handle, Output, Update
    from rayk.engine.sampling import SamplingParams
    from rayk.errors import InsufficientBlocksError, RaykError, ReplicaLostError
    from rayk.inputs import BatchCharacteristics
    from rayk.lanes import LaneState
    from rayk.manager import PagedKVCacheManager
    from rayk.memory import (
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
    from rayk.metrics import KVCacheMetrics
    from rayk.params import (
        KVCacheQuantizationConfig,
        KVConnectorConfig,
        MHAKVCacheParams,
        MLAKVCacheParams,
        MultiKVCacheParams,
    )
    from rayk.session import InferenceSession
    from rayk.ticks import Admission, HitCounts, PrefixCacheReset, Tick, TickResult

__version__ = "0.1.0"

_HOMES = {
    "admission": ["AdmissionPolicy", "TenantQuota"],
    "cluster": ["Cluster"],
    "engine.errors": [
        "ForwardError",
        "QueueFullError",
        "RequestCancelledError",
        "RequestError",
        "RequestTimeoutError",
    ],
    "engine.output": ["Handle", "Output", "Update"],
    "engine.sampling": ["SamplingParams"],
    "batch": ["ContextBatch"],
    "async_manager": ["AsyncPagedKVCacheManager"],
    "context": ["TextContext"],
    "errors": ["InsufficientBlocksError", "RaykError", "ReplicaLostError"],
    "inputs": ["BatchCharacteristics"],
    "lanes": ["LaneState"],
    "manager": ["PagedKVCacheManager"],
    "memory": [
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
    "metrics": ["KVCacheMetrics"],
    "params": [
        "KVCacheQuantizationConfig",
        "KVConnectorConfig",
        "MHAKVCacheParams",
        "MLAKVCacheParams",
        "MultiKVCacheParams",
    ],
    "scaling": ["Drained", "Removed", "ReplicaLoad", "ScalePolicy", "desired_replicas"],
    "session": ["InferenceSession"],
    "ticks": ["Admission", "HitCounts", "PrefixCacheReset", "Tick", "TickResult"],
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
    "LaneState",
    "MHAKVCacheParams",
    "MLAKVCacheParams",
    "MemoryEstimator",
    "MemoryPlanError",
    "MemoryPlanner",
    "MultiKVCacheParams",
    "Output",
    "PagedKVCacheManager",
    "PagedMemoryPlanner",
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
