"""How many pages fit: what one node offers, and what a replica may take of it.

Pure arithmetic over NodeMemory; measure_node() reads it off the machine. A page count that the caller chose
is checked against the plan, None takes the planned number.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from rayk.errors import PlanError
from rayk.params import KVCacheParams, require

GPU_UTILIZATION = 0.9  # of a GPU's free memory; the reference's default
HOST_UTILIZATION = 0.5  # of a node's free memory: pages on the host share it with Ray's object store and the user


TOLERANCE = 0.03  # of the planned bytes; a component that is further off is worth a warning


class Component(msgspec.Struct, frozen=True):
    """Bytes of one part of a replica's memory, as planned and as taken."""

    component: str
    planned: int
    taken: int

    @property
    def is_off(self) -> bool:
        """Whether more or less than TOLERANCE beside the plan was taken."""
        return abs(self.taken - self.planned) > TOLERANCE * self.planned

    def __str__(self) -> str:
        off = f"{100 * (self.taken / self.planned - 1):+.1f} %" if self.planned else "nothing was planned"
        return f"{self.component}: {self.taken} bytes taken, {self.planned} planned ({off})"


class GpuUser(msgspec.Struct, frozen=True):
    """A process that has memory on a GPU; bytes, 0 where the driver does not tell."""

    pid: int
    name: str
    bytes: int


class DeviceMemory(msgspec.Struct, frozen=True):
    """One GPU of a node; bytes."""

    index: int
    name: str
    total: int
    free: int
    users: tuple[GpuUser, ...] = ()


class NodeMemory(msgspec.Struct, frozen=True):
    """What a node offers, in bytes. `gpus` is empty without NVML.

    `host_free` respects the container's limit and the memory that Ray was told of; `disk_free` is at the disk tier's
    folder, None without one; `measured_at` is in seconds since the epoch.
    """

    node_id: str
    host_name: str
    host_total: int
    host_free: int
    gpus: tuple[DeviceMemory, ...] = ()
    disk_free: int | None = None
    measured_at: float = 0.0


class ReplicaPlan(msgspec.Struct, frozen=True):
    """Pages of one replica on that node, and the bytes that they take there, the null page included.

    `bound` says what limits `pages`: "memory", "asked" for a number that the caller chose, "uniform" for the smallest
    number of all replicas. One request can have at most `max_length` tokens.
    """

    node_id: str
    pages: int
    bytes: int
    planned: int  # pages that would fit
    host_name: str = ""
    bound: str = "memory"
    max_length: int = 0


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
            name, users = str(pynvml.nvmlDeviceGetName(handle)), pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            found.append(DeviceMemory(index, name, int(memory.total), int(memory.free), tuple(_gpu_users(users))))
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def _gpu_users(processes: Iterable[Any]) -> Iterator[GpuUser]:
    for process in processes:
        try:
            name = psutil.Process(process.pid).name()
        except psutil.Error:
            name = "?"  # of another container
        yield GpuUser(int(process.pid), name, int(process.usedGpuMemory or 0))


def _disk_free(folder: Path) -> int:
    """Bytes free where the folder is or will be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return int(psutil.disk_usage(str(folder)).free)


def measure_node(
    node_id: str = "", host_name: str = "localhost", memory_limit: int | None = None, disk_dir: str | None = None
) -> NodeMemory:
    """Read this machine's memory now. `memory_limit`: bytes of host memory that may be planned with at most."""
    memory = psutil.virtual_memory()
    limits = [int(memory.available), _cgroup_free(), memory_limit]
    return NodeMemory(
        node_id,
        host_name,
        int(memory.total),
        min(limit for limit in limits if limit is not None),
        _gpus(),
        _disk_free(Path(disk_dir)) if disk_dir is not None else None,
        time.time(),
    )


def uses_cuda(params: KVCacheParams) -> bool:
    """Whether the replicas' devices are CUDA ones."""
    return any(device.startswith("cuda") for device in params.devices)


def replicas_that_fit(node: NodeMemory, params: KVCacheParams) -> int:
    """How many replicas have their devices on that node: by GPUs on CUDA, any number on the host."""
    return len(node.gpus) // params.tensor_parallel_degree if uses_cuda(params) else params.data_parallel_degree


def planned_pages(node: NodeMemory, params: KVCacheParams, sharing: int, utilization: float | None = None) -> int:
    """Pages per replica when `sharing` of them share one memory, the null page already taken off; may be below 1.

    CUDA: the TP shards of a replica take equal shares of a page, so the GPU with the least free memory decides.
    Host: all replicas of the node share one memory.
    """
    free, part, page = _offer(node, params, utilization)
    return int(free * part) // max(1, sharing) // page - 1


def _offer(node: NodeMemory, params: KVCacheParams, utilization: float | None) -> tuple[int, float, int]:
    """Free bytes of the memory that decides, the part of them that rayk takes, and a page's bytes there."""
    require(
        utilization is None or 0 < utilization <= 1,
        f"utilization is {utilization}, it must be above 0 and at most 1 (a share of the free memory)",
    )
    if uses_cuda(params):
        shard_bytes = -(-params.bytes_per_page // params.tensor_parallel_degree)
        return min((g.free for g in node.gpus), default=0), utilization or GPU_UTILIZATION, shard_bytes
    return node.host_free, utilization or HOST_UTILIZATION, params.bytes_per_page


def plan_replica(
    node: NodeMemory, params: KVCacheParams, wanted: int | None, sharing: int, utilization: float | None = None
) -> ReplicaPlan:
    """The plan of one of `sharing` replicas in that memory; PlanError when `wanted` pages, or one, do not fit.

    `utilization` is the part of the free memory to take: by default .9 of a GPU's, .5 of a host's.
    """
    fits = planned_pages(node, params, sharing, utilization)
    pages = fits if wanted is None else wanted
    if pages > fits or fits < 1:
        free, part, page = _offer(node, params, utilization)
        remedy = f"ask for at most {fits} pages" if fits >= 1 else "use smaller pages, fewer layers or a larger node"
        raise PlanError(
            f"{max(pages, 1)} page(s) of {page} bytes (and the null page) do not fit on node {node.host_name}: "
            f"{free} bytes are free, of which rayk takes {part:.0%} for {sharing} replica(s); {remedy}"
        )
    return ReplicaPlan(
        node.node_id,
        pages,
        (pages + 1) * params.bytes_per_page,
        fits,
        node.host_name,
        "memory" if wanted is None else "asked",
        pages * params.page_size,
    )


def plan_replicas(
    nodes: Sequence[NodeMemory],
    places: Sequence[str],
    params: KVCacheParams,
    wanted: int | None,
    uniform: bool = False,
    utilization: float | None = None,
) -> list[ReplicaPlan]:
    """The plans of replicas that are placed on `places` (node ids). Each gets what its node can give.

    With `uniform` all get what the one with the least gets. PlanError when one does not fit.
    """
    by_id, on_node = {node.node_id: node for node in nodes}, Counter(places)
    plans = [  # on CUDA every replica has GPUs of its own
        plan_replica(by_id[i], params, wanted, 1 if uses_cuda(params) else on_node[i], utilization) for i in places
    ]
    if uniform and wanted is None:
        pages = min(plan.pages for plan in plans)
        plans = [_trim(plan, pages, params) for plan in plans]
    return plans


def _trim(plan: ReplicaPlan, pages: int, params: KVCacheParams) -> ReplicaPlan:
    if plan.pages == pages:
        return plan
    size = (pages + 1) * params.bytes_per_page
    return msgspec.structs.replace(plan, pages=pages, bytes=size, bound="uniform", max_length=pages * params.page_size)


def plan_here(params: KVCacheParams, wanted: int | None, utilization: float | None = None) -> int:
    """Pages per replica when all of them live in this process; CUDA devices may be shared."""
    node, sharing = measure_node(), params.data_parallel_degree
    if uses_cuda(params):
        named = Counter(params.devices)
        if len(named) > len(node.gpus):
            raise PlanError(f"{len(named)} CUDA devices are named, this machine has {len(node.gpus)}")
        sharing = max(named.values())
    return plan_replica(node, params, wanted, sharing, utilization).pages


def refused_nodes(
    nodes: Sequence[NodeMemory], params: KVCacheParams, wanted: int | None, utilization: float | None = None
) -> dict[str, str]:
    """Node id -> why not even one replica fits there."""
    reasons = {}
    for node in nodes:
        if replicas_that_fit(node, params) < 1:
            reasons[node.node_id] = (
                f"{node.host_name} has {len(node.gpus)} GPU(s), a replica needs {params.tensor_parallel_degree}"
            )
            continue
        try:
            plan_replica(node, params, wanted, 1, utilization)
        except PlanError as error:
            reasons[node.node_id] = str(error)
    return reasons
