"""What one benchmark run is asked to do, checked, and completed with defaults that suit the workload."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from rayk.bench.chaos.disk import check_folder
from rayk.bench.chaos.schedule import parse_chaos
from rayk.engine.tiers import LEAST_HOST_PAGES
from rayk.errors import ConfigError
from rayk.params import KVConnectorConfig, MHAKVCacheParams
from rayk.planning.node_plan import measure_node, planned_pages
from rayk.quantity import parse_size, show_bytes
from rayk.scheduler.router.policies import check_router
from rayk.workloads.request import Workload

VERIFY_BUDGET = 2048
"""Tokens of one forward on one replica with the verify model or a prefill rate, unless told otherwise."""

BATCHES_KEPT = 3
"""Default pages: room for this many average batches, so that a cache is worth having and still has to evict."""

ARRIVING_BATCH = 256
"""Rows of one forward when requests come as they arrive, unless told otherwise."""

FORWARDS = ("verify", "none", "hf")
RUNTIMES = ("ray", "inline")


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `pages` is per replica, `host_pages` and `disk_bytes` are per node.

    `token_budget` and `max_batch_size` are per replica and forward (None: no bound).
    """

    replicas: int = 2
    page_size: int = 128
    pages: int = 0
    concurrency: int = 16
    max_batch_size: int = 16
    router: str = "cost"
    forward: str = "verify"
    peer_copies: bool = True
    token_budget: int | None = VERIFY_BUDGET
    duration_s: float | None = None
    speed: float | None = None
    think_time: float | None = None
    warmup_s: float | None = None
    slo_ttft: float | None = None
    slo_itl: float | None = None
    prefill_rate: float | None = None
    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    dtype: str = "float32"
    tp: int = 1
    host_pages: int = 0
    disk_dir: str | None = None
    disk_bytes: int = 0
    seed: int = 0
    runtime: str = "ray"
    address: str | None = None
    model: str | None = None
    chaos: str | None = None
    nodes: int = 1
    source: dict[str, Any] = {}

    def __post_init__(self) -> None:
        check_router(self.router, "--")
        counts = ("replicas", "page_size", "concurrency", "max_batch_size", "token_budget")
        for name in (*counts, "layers", "kv_heads", "head_dim", "tp", "nodes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, at least 1 is needed")
        rates = {
            "speed": (self.speed, "times as fast as recorded"),
            "prefill-rate": (self.prefill_rate, "tokens a second"),
        }
        for name, (rate, unit) in rates.items():
            if rate is not None and not 0 < rate < math.inf:
                raise ConfigError(f"--{name} is {rate}, more than 0 {unit} is needed")
        for name, value, allowed in (("forward", self.forward, FORWARDS), ("runtime", self.runtime, RUNTIMES)):
            if value not in allowed:
                raise ConfigError(f"--{name} {value!r} is not one of {', '.join(allowed)}")
        if (self.model is not None) != (self.forward == "hf"):
            raise ConfigError("--forward hf needs --model DIR, and --model is for --forward hf")
        if self.prefill_rate is not None and self.forward != "none":
            raise ConfigError(f"--prefill-rate is for --forward none; --forward {self.forward} takes its own time")
        if self.think_time is not None and self.speed is not None:
            raise ConfigError("--think-time and --speed exclude each other: users who ask in turns, or as they arrive")
        if self.nodes > 1 and (self.runtime != "ray" or self.address is not None):
            raise ConfigError(
                "--nodes simulates nodes beside an embedded Ray: use it with --runtime ray, without --address"
            )

    @property
    def open_loop(self) -> bool:
        """Whether its source alone says when requests are sent."""
        return self.speed is not None or self.think_time is not None

    @property
    def faults(self) -> dict[str, float]:
        """Faults a second, by kind."""
        return parse_chaos(self.chaos) if self.chaos is not None else {}

    @property
    def shared(self) -> bool:
        """Whether other drivers attach to what is measured."""
        return "kill-driver" in self.faults

    @property
    def named(self) -> bool:
        """Whether the session has a name: for other drivers, or since a Cluster's scheduler is its own process then."""
        return self.shared or (self.forward == "hf" and "kill-scheduler" in self.faults)

    def manager_options(self) -> dict[str, Any]:
        """Of the manager that serves the run."""
        replace = self.chaos is not None
        return {"max_batch_size": self.max_batch_size, "router": self.router, "replace": replace}

    def params(self) -> MHAKVCacheParams:
        """The cache's parameters. ConfigError for shapes that do not fit together."""
        return MHAKVCacheParams(
            dtype=self.dtype,
            n_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_layers=self.layers,
            page_size=self.page_size,
            devices=["cpu"] * (self.replicas * self.tp),
            data_parallel_degree=self.replicas,
            enable_prefix_caching=True,
            enable_dp_cross_replica_prefix_copy=self.peer_copies,
            kv_hash_algo="xxh3_128",
            kv_connector=self.connector,
            kv_connector_config=KVConnectorConfig(
                disk_offload_dir=self.disk_dir, disk_offload_max_bytes=self.disk_bytes, model_id="rayk bench verify"
            ),
        )

    @property
    def connector(self) -> str:
        """The tiers below the device pages."""
        return "tiered" if self.disk_dir is not None else "local" if self.host_pages else "null"

    def as_config(self) -> dict[str, Any]:
        """These settings as plain values, for result.json; what is not bounded or given is left out."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


def check_chaos(settings: BenchSettings) -> None:
    """ConfigError for faults that what is measured cannot have, by name."""
    kinds = set(settings.faults)
    if not kinds:
        return
    on_disk = {kind for kind in kinds if kind.endswith("-disk")}

    def refuse(refused: set[str], why: str) -> None:
        if refused:
            raise ConfigError(f"--chaos {', '.join(sorted(refused))}: {why}")

    if settings.runtime == "inline":
        refuse(kinds - on_disk, "with --runtime inline there is no other process and no socket; use --runtime ray")
    refuse(
        kinds if settings.address is not None else set(),
        "processes are killed, so it starts a Ray of its own; leave out --address",
    )
    refuse(on_disk if settings.disk_dir is None else set(), "there is no disk tier; give --disk-dir and --disk-memory")
    refuse(
        kinds & {"kill-node"} if settings.nodes == 1 else set(),
        "there is one node, that of this driver; simulate more by --nodes 3",
    )
    if settings.disk_dir is not None:
        check_folder(Path(settings.disk_dir), kinds)


def free_bytes(settings: BenchSettings) -> int:
    """Bytes that the planner would give each replica of this machine; what a fraction as `--memory` refers to."""
    params = settings.params()
    return max(0, planned_pages(measure_node(), params, settings.replicas)) * params.bytes_per_page


def complete(
    settings: BenchSettings, workload: Workload, pages: int | None = None, memory: str | None = None
) -> BenchSettings:
    """`settings` with its pages: as given, from memory per replica, or a default that suits the workload.

    ConfigError for what cannot be had, RequestTooLargeError when one request of the workload cannot fit (not checked
    for a run of a fixed duration, which may never reach it). Whether the machine has that memory is the planner's
    question, when the manager is made.
    """
    if pages is not None and memory is not None:
        raise ConfigError("--pages and --memory exclude each other; both are per replica")
    if pages is not None and pages < 1:
        raise ConfigError(f"--pages is {pages}, at least 1 is needed")
    if memory is not None:
        pages = _pages("--memory", memory, free_bytes(settings), settings)
    elif pages is None:
        pages = default_pages(settings, workload)
    largest = max(workload.requests, key=lambda request: request.pages(settings.page_size))
    if settings.duration_s is None and (error := largest.too_large(settings.page_size, pages)) is not None:
        raise error
    return msgspec.structs.replace(settings, pages=pages)


def default_pages(settings: BenchSettings, workload: Workload) -> int:
    """Pages per replica for the largest request (an engine has a slot for its last token, too), or BATCHES_KEPT average
    batches if that is more."""
    sizes = [request.pages(settings.page_size) for request in workload.requests]
    batch = math.ceil(settings.concurrency / settings.replicas) * sum(sizes) / len(sizes)
    least = max(sizes) if settings.forward != "hf" else math.ceil(workload.longest / settings.page_size)
    return max(least, math.ceil(BATCHES_KEPT * batch))


def with_tiers(
    settings: BenchSettings, host_memory: str | None, disk_dir: Path | None, disk_memory: str | None
) -> BenchSettings:
    """`settings` with a host tier of `host_memory` and a disk tier of `disk_memory` in `disk_dir`, per node.

    Pages reach the disk through the host tier; without `host_memory` it gets an eighth of the disk's, at least
    LEAST_HOST_PAGES pages. ConfigError for what cannot be had.
    """
    if (disk_dir is None) != (disk_memory is None):
        raise ConfigError("--disk-dir and --disk-memory go together: a folder, and how much it may hold")
    page_bytes = settings.params().bytes_per_page
    disk_bytes = 0
    if disk_dir is not None and disk_memory is not None:
        disk_bytes = parse_size(disk_memory, measure_node(disk_dir=str(disk_dir)).disk_free or 0)
        if disk_bytes <= page_bytes:
            raise ConfigError(f"--disk-memory {disk_memory} does not hold a page of {show_bytes(page_bytes)}")
    pages = 0
    if host_memory is not None:
        pages = _pages("--host-memory", host_memory, measure_node().host_free, settings)
    elif disk_dir is not None:
        pages = max(LEAST_HOST_PAGES, disk_bytes // 8 // page_bytes)
    return msgspec.structs.replace(
        settings,
        host_pages=pages,
        disk_dir=str(disk_dir.resolve()) if disk_dir is not None else None,
        disk_bytes=disk_bytes,
    )


def _pages(flag: str, text: str, free: int, settings: BenchSettings) -> int:
    """Whole pages in the memory that a flag names; ConfigError when that is none."""
    size, page_bytes = parse_size(text, free), settings.params().bytes_per_page
    if size < page_bytes:
        raise ConfigError(f"{flag} {text} is {show_bytes(size)}, one page takes {show_bytes(page_bytes)}; give more")
    return size // page_bytes
