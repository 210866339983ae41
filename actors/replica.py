"""The replica actor: a ReplicaService in a process of its own. It only translates."""

from __future__ import annotations

from typing import Any

from rayk.actors.runtime import RayRuntime
from rayk.params import KVCacheParams
from rayk.service import PageData, ReplicaService


class ReplicaActor:
    """Started by rayk.scheduler.cluster. Calls run one after the other; ping() has a lane of its own."""

    def __init__(
        self,
        params: KVCacheParams,
        replica: int,
        num_pages: int,
        max_batch_size: int,
        runtime_checks: bool,
        epoch: int,
    ) -> None:
        import torch

        from rayk.replica import ReplicaCore

        torch.set_num_threads(1)
        devices = _local_devices(params, replica)
        core = ReplicaCore(params, replica, num_pages, max_batch_size, devices, runtime_checks)
        self._service = ReplicaService(core, epoch, RayRuntime().dumps)

    def handle(self, wire: bytes, *attached: PageData) -> bytes:
        """Answer a message; `attached` is page data from other replicas."""
        return self._service.handle(wire, attached)[0]

    def handle_with_data(self, wire: bytes) -> tuple[bytes, PageData]:
        """Answer a message whose result comes with page data."""
        return self._service.handle(wire)

    def ping(self) -> int:
        """The epoch, at once, also while the data lane is busy."""
        return self._service.epoch


def _local_devices(params: KVCacheParams, replica: int) -> tuple[str, ...]:
    """This replica's devices as its own process numbers them: Ray shows an actor only the GPUs it was given."""
    devices = params.replica_devices(replica)
    return tuple(f"cuda:{i}" if d.startswith("cuda") else d for i, d in enumerate(devices))


def measure(node_id: str, host_name: str) -> Any:
    """The planning task: what the node it runs on offers."""
    from rayk.planning import measure_node

    return measure_node(node_id, host_name)
