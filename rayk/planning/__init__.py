"""Memory plans: how many pages fit beside a model, what length and batch that serves, and what to change if none do.

    budget.py ──> estimator.py                                    the reference's estimator and planners
    weights.py ──> float_formats.py, integer_formats.py ──> quantization.py      how checkpoints store weights
    fields.py, architectures.py, library.py, stand_ins.py, checkpoint.py ──> reading.py    a model (model.py) of files
    by_hand.py                                                    a model from numbers
    gpus.py, settings.py, overhead.py ──> plan.py ──> nodes.py, remedies.py      plans of replicas and nodes, what helps
    question.py ──> sweep.py, view.py, command.py                 `rayk plan`
    measure.py                                                    activations, by a forward

Nothing here imports Ray, and only library.py and measure.py torch, which are imported where they are needed. Nothing
but measure.py measures a machine: memory sizes come from the caller.
"""

from rayk.planning.budget import (
    SIGNAL_BUFFER_BYTES,
    compute_max_seq_len_fitting_in_cache,
    compute_num_device_blocks,
    compute_num_host_blocks,
    estimated_memory_size,
    spec_decode_cache_slack,
)
from rayk.planning.errors import CacheProtocolError, MemoryPlanError, ModelConfigError
from rayk.planning.estimator import MemoryEstimator, MemoryPlanner, PagedMemoryPlanner

__all__ = [
    "SIGNAL_BUFFER_BYTES",
    "CacheProtocolError",
    "MemoryEstimator",
    "MemoryPlanError",
    "MemoryPlanner",
    "ModelConfigError",
    "PagedMemoryPlanner",
    "compute_max_seq_len_fitting_in_cache",
    "compute_num_device_blocks",
    "compute_num_host_blocks",
    "estimated_memory_size",
    "spec_decode_cache_slack",
]
