"""The replica actor: a ReplicaService in a process of its own. It only translates.

torch is imported when a replica starts, not with this module: planning tasks and the scheduler do without.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from rayk.actors.chunks import joined
from rayk.actors.interface import SocketAddress
from rayk.actors.listener import Listener, listening
from rayk.actors.process import freeze_startup_objects
from rayk.actors.report import start_reporting
from rayk.metrics.reading import Labels, Reading
from rayk.params import KVCacheParams
from rayk.planning.node_plan import NodeMemory, measure_node
from rayk.scheduler.recovery import ClaimSeen

if TYPE_CHECKING:
    from rayk.protocol.kv_events import KVEventsConfig
    from rayk.transport.line import PageData

BEHIND_SECONDS = 60.0  # for which a call waits for messages that were sent before it by a socket


DOOR_SECONDS = 1.0  # for which a scheduler that began anew waits for a message that is being carried out


class ReplicaFacts(msgspec.Struct, frozen=True):
    """What a replica took, in bytes: its pages, what is left on its devices, and the most that it ever had.

    On the host `peak` is the resident memory of its process. `started_at` is in seconds since the epoch.
    """

    replica: int
    pid: int
    devices: tuple[str, ...]
    allocated: int
    free: int
    peak: int
    started_at: float


class ReplicaActor:
    """Started by rayk.actors.scale_out. Messages are answered one after the other, those that come by sockets, too;
    ping() has a lane of its own."""

    def __init__(
        self,
        params: KVCacheParams,
        replica: int,
        num_pages: int,
        max_batch_size: int,
        runtime_checks: bool,
        epoch: int,
        host_pages: int = 0,
        pool: str | None = None,
        journal: bool = False,
        kv_events: KVEventsConfig | None = None,
    ) -> None:
        import torch

        from rayk.kvcache.progress import Progress
        from rayk.kvcache.replica import ReplicaCore
        from rayk.replica.kv_event_publisher import publish_events
        from rayk.replica.service import ReplicaService
        from rayk.tiers.opening import open_connector

        self._started_at = time.time()
        self._door = threading.Lock()
        self._progress = Progress()
        self._listener: Listener | None = None
        self._torch = torch
        torch.set_num_threads(1)
        devices = _local_devices(params, replica)
        shared = params.shares_memory
        core = ReplicaCore(params, replica, num_pages, max_batch_size, devices, runtime_checks, shared_memory=shared)
        if params.kv_connector != "null":
            core.connect(open_connector(params, core.buffers.all_bytes, host_pages, pool))
        publish_events(core, kv_events)
        from rayk.actors.runtime import RayRuntime

        runtime = RayRuntime()
        self._service = ReplicaService(core, epoch, runtime.dumps, journal=journal, address=runtime.address())
        start_reporting(runtime, self._read)
        freeze_startup_objects()

    def __repr__(self) -> str:  # how Ray's dashboard and logs call it
        return f"rayk replica {self._service.core.replica}"

    def _read(self, labels: Labels) -> list[Reading]:
        with self._door:
            return self._service.read(labels | {"replica_idx": str(self._service.core.replica)})

    def handle(self, first: Any, *rest: Any) -> bytes:
        """Answer a message, see rayk.actors.chunks; what comes after it is page data from other replicas."""
        return self.handle_with_data(first, *rest)[0]

    def handle_with_data(self, first: Any, *rest: Any) -> tuple[bytes, PageData]:
        """Answer a message whose result comes with page data. What begins with a pair waits for so many messages of
        that connection."""
        if isinstance(first, tuple):
            if self._listener is not None:
                self._listener.handled(first[0], first[1], BEHIND_SECONDS)
            first, *rest = rest  # type: ignore[assignment]  # a list or a tuple
        return self._handle(*(joined(first, rest) if isinstance(first, int) else (first, rest)))

    def _by_socket(self, wire: bytes) -> bytes:
        return self._handle(wire)[0]

    def _handle(self, wire: Any, attached: Sequence[PageData] = ()) -> tuple[bytes, PageData]:
        with self._door:
            self._progress.begin()
            try:
                return self._service.handle(wire, attached)
            finally:
                self._progress.end()

    def listen(self) -> SocketAddress | None:
        """Take messages from a socket, too, from now on."""
        if self._listener is None:
            from rayk.actors.runtime import RayRuntime

            self._listener = listening(self._by_socket, RayRuntime().address())
        return self._listener.address if self._listener is not None else None

    def close(self) -> None:
        """Finish transfers and let go of the tiers; the last thing that is asked of a replica."""
        if self._listener is not None:
            self._listener.close()
        with self._door:
            self._service.port.close()
            self._service.core.shutdown()

    def ping(self) -> int:
        """The epoch, at once, also while the data lane is busy."""
        return self._service.epoch

    def take_over(self, schedulers: Sequence[str]) -> list[ClaimSeen]:
        """Do nothing any more that those schedulers say, of which another one has taken the place; what is claimed
        here. A message that is being carried out is waited for, unless it takes long."""
        service = self._service
        waited = self._door.acquire(timeout=DOOR_SECONDS)
        try:
            service.fenced.update(schedulers)
            return [
                ClaimSeen(i, request.client, request.generation, request.slot_capacity)
                for i, request in list(service.core.requests.items())
            ]
        finally:
            if waited:
                self._door.release()

    def vitals(self) -> tuple[float, str]:
        """Seconds for which a message was being answered and did not get on, and why this replica is unfit; at once,
        as ping()."""
        return self._progress.stalled(), self._service.poison.reason

    def facts(self) -> ReplicaFacts:
        """What this replica really uses, to be compared with its plan."""
        core = self._service.core
        allocated = sum(t.nbytes for t in core.buffers.all_buffers)
        gpus = sorted({t.device for t in core.buffers.all_buffers if t.is_cuda}, key=str)
        if gpus:
            allocated = sum(self._torch.cuda.memory_allocated(d) for d in gpus)
            free = min(self._torch.cuda.mem_get_info(d)[0] for d in gpus)
            peak = sum(self._torch.cuda.max_memory_allocated(d) for d in gpus)
        else:
            free, peak = measure_node().host_free, psutil.Process().memory_info().rss
        names = tuple(self._torch.cuda.get_device_name(d) for d in gpus) or ("cpu",)
        return ReplicaFacts(core.replica, os.getpid(), names, allocated, free, peak, self._started_at)


def _local_devices(params: KVCacheParams, replica: int) -> tuple[str, ...]:
    """This replica's devices as its own process numbers them: Ray shows an actor only the GPUs it was given."""
    devices = params.replica_devices(replica)
    return tuple(f"cuda:{i}" if d.startswith("cuda") else d for i, d in enumerate(devices))


def measure(node_id: str, host_name: str, memory_limit: int | None, disk_dir: str | None) -> NodeMemory:
    """The planning task: what the node it runs on offers, host memory up to a limit in bytes."""
    return measure_node(node_id, host_name, memory_limit, disk_dir)
