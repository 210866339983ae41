"""How many pages fit: what one node offers, and what a replica may take of it.

Pure arithmetic over NodeMemory; measure_node() reads it off the machine. A page count that the caller chose
is checked against the plan, None takes the planned number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from rayk.errors import PlanError, RaykError
from rayk.params import KVCacheParams

GPU_UTILIZATION = 0.9  # of a GPU's free memory; the reference's default
HOST_UTILIZATION = 0.5  # of a node's free memory: pages on the host share it with Ray's object store and the user


class DeviceMemory(msgspec.Struct, frozen=True):
    """One GPU of a node; bytes."""

    index: int
    name: str
    total: int
    free: int


class NodeMemory(msgspec.Struct, frozen=True):
    """What a node offers, in bytes. `host_free` respects the container's limit. `gpus` is empty without NVML."""

    node_id: str
    host_name: str
    host_total: int
    host_free: int
    gpus: tuple[DeviceMemory, ...] = ()


class ReplicaPlan(msgspec.Struct, frozen=True):
    """Pages of one replica on that node, and the bytes that they take there."""

    node_id: str
    pages: int
    bytes: int
    planned: int  # pages that would fit


def _cgroup_free() -> int | None:
    """Bytes left under this process's cgroup limit (v2, else v1), or None without a limit."""
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit_file, usage_file in pairs:
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < 1 << 60:
            return max(0, int(limit) - int(usage))
    return None


def _gpus() -> tuple[DeviceMemory, ...]:
    """GPUs by NVML, which needs no CUDA context; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                DeviceMemory(index, str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))
            )
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def measure_node(node_id: str = "", host_name: str = "localhost") -> NodeMemory:
    """Read this machine's memory now."""
    memory = psutil.virtual_memory()
    limit = _cgroup_free()
    free = int(memory.available) if limit is None else min(int(memory.available), limit)
    return NodeMemory(node_id, host_name, int(memory.total), free, _gpus())


def uses_cuda(params: KVCacheParams) -> bool:
    """Whether the replicas' devices are CUDA ones."""
    return any(device.startswith("cuda") for device in params.devices)


def replicas_that_fit(node: NodeMemory, params: KVCacheParams) -> int:
    """How many replicas have their devices on that node: by GPUs on CUDA, any number on the host."""
    return len(node.gpus) // params.tensor_parallel_degree if uses_cuda(params) else params.data_parallel_degree


def planned_pages(node: NodeMemory, params: KVCacheParams, sharing: int) -> int:
    """Pages per replica when `sharing` of them share one memory, the null page already taken off; may be below 1.

    CUDA: the TP shards of a replica take equal shares of a page, so the GPU with the least free memory decides.
    Host: all replicas of the node share one memory.
    """
    free, part, page = _offer(node, params)
    return int(free * part) // max(1, sharing) // page - 1


def _offer(node: NodeMemory, params: KVCacheParams) -> tuple[int, float, int]:
    """Free bytes of the memory that decides, the part of them that rayk takes, and a page's bytes there."""
    if uses_cuda(params):
        shard_bytes = -(-params.bytes_per_page // params.tensor_parallel_degree)
        return min((g.free for g in node.gpus), default=0), GPU_UTILIZATION, shard_bytes
    return node.host_free, HOST_UTILIZATION, params.bytes_per_page


def plan_replica(node: NodeMemory, params: KVCacheParams, wanted: int | None, sharing: int) -> ReplicaPlan:
    """The plan of one of `sharing` replicas in that memory; PlanError when `wanted` pages, or one, do not fit."""
    fits = planned_pages(node, params, sharing)
    pages = fits if wanted is None else wanted
    if pages > fits or fits < 1:
        free, part, page = _offer(node, params)
        remedy = f"ask for at most {fits} pages" if fits >= 1 else "use smaller pages, fewer layers or a larger node"
        raise PlanError(
            f"{max(pages, 1)} page(s) of {page} bytes (and the null page) do not fit on node {node.host_name}: "
            f"{free} bytes are free, of which rayk takes {part:.0%} for {sharing} replica(s); {remedy}"
        )
    return ReplicaPlan(node.node_id, pages, (pages + 1) * params.bytes_per_page, fits)


def plan_here(params: KVCacheParams, wanted: int | None) -> int:
    """Pages per replica when all of them live in this process; CUDA devices may be shared."""
    node, sharing = measure_node(), params.data_parallel_degree
    if uses_cuda(params):
        named = Counter(params.devices)
        if len(named) > len(node.gpus):
            raise PlanError(f"{len(named)} CUDA devices are named, this machine has {len(node.gpus)}")
        sharing = max(named.values())
    return plan_replica(node, params, wanted, sharing).pages


def refused_nodes(nodes: Sequence[NodeMemory], params: KVCacheParams, wanted: int | None) -> dict[str, str]:
    """Node id -> why not even one replica fits there."""
    reasons = {}
    for node in nodes:
        if replicas_that_fit(node, params) < 1:
            reasons[node.node_id] = (
                f"{node.host_name} has {len(node.gpus)} GPU(s), a replica needs {params.tensor_parallel_degree}"
            )
            continue
        try:
            plan_replica(node, params, wanted, 1)
        except RaykError as error:
            reasons[node.node_id] = str(error)
    return reasons
