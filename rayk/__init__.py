"""rayk: a paged KV cache for LLM serving, as a Ray component.

The names here are the public surface. Importing rayk imports no Ray.
"""

from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError, RaykError, ReplicaLostError
from rayk.inputs import BatchCharacteristics
from rayk.manager import PagedKVCacheManager
from rayk.metrics import KVCacheMetrics
from rayk.params import (
    KVCacheQuantizationConfig,
    KVConnectorConfig,
    MHAKVCacheParams,
    MLAKVCacheParams,
    MultiKVCacheParams,
)
from rayk.session import InferenceSession
from rayk.ticks import Admission, HitCounts, Tick, TickResult

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "BatchCharacteristics",
    "HitCounts",
    "InferenceSession",
    "InsufficientBlocksError",
    "KVCacheMetrics",
    "KVCacheQuantizationConfig",
    "KVConnectorConfig",
    "MHAKVCacheParams",
    "MLAKVCacheParams",
    "MultiKVCacheParams",
    "PagedKVCacheManager",
    "RaykError",
    "ReplicaLostError",
    "TextContext",
    "Tick",
    "TickResult",
]
