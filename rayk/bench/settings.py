"""What one benchmark run is asked to do, checked, and completed with defaults that suit the workload."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from rayk.bench.capacity import check_fits
from rayk.bench.loop import LoopSettings
from rayk.bench.quantity import parse_size, show_bytes
from rayk.bench.request import Workload
from rayk.errors import ConfigError
from rayk.params import MHAKVCacheParams
from rayk.planning import measure_node, planned_pages

VERIFY_BUDGET = 2048
"""Tokens of one forward on one replica with the verify model, unless told otherwise."""

BATCHES_KEPT = 3
"""Default pages: room for this many average batches, so that a cache is worth having and still has to evict."""

ROUTERS = ("round-robin", "least-loaded")
FORWARDS = ("verify", "none")
RUNTIMES = ("ray", "inline")


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `pages` is per replica, `token_budget` and `max_batch_size` per replica and forward (None: no bound)."""

    replicas: int = 2
    page_size: int = 128
    pages: int = 0
    concurrency: int = 16
    max_batch_size: int = 16
    router: str = "least-loaded"
    forward: str = "verify"
    peer_copies: bool = True
    token_budget: int | None = VERIFY_BUDGET
    duration_s: float | None = None
    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    dtype: str = "float32"
    tp: int = 1
    seed: int = 0
    runtime: str = "ray"
    address: str | None = None
    source: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for name in ("replicas", "page_size", "concurrency", "max_batch_size", "layers", "kv_heads", "head_dim", "tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, at least 1 is needed")
        if self.token_budget is not None and self.token_budget < 1:
            raise ConfigError(f"--token-budget is {self.token_budget}, at least 1 is needed")
        for name, value, allowed in (
            ("router", self.router, ROUTERS),
            ("forward", self.forward, FORWARDS),
            ("runtime", self.runtime, RUNTIMES),
        ):
            if value not in allowed:
                raise ConfigError(f"--{name} {value!r} is not one of {', '.join(allowed)}")

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
        )

    def loop(self) -> LoopSettings:
        """What the driver loop needs of this."""
        return LoopSettings(
            replicas=self.replicas,
            page_size=self.page_size,
            pages=self.pages,
            concurrency=self.concurrency,
            max_batch_size=self.max_batch_size,
            round_robin=self.router == "round-robin",
            verify=self.forward == "verify",
            token_budget=self.token_budget,
            duration_s=self.duration_s,
        )

    def as_config(self) -> dict[str, Any]:
        """These settings as plain values, for result.json; what is not bounded or given is left out."""
        plain = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in plain.items() if value is not None}


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
    page_bytes = settings.params().bytes_per_page
    if memory is not None:
        size = parse_size(memory, free_bytes(settings))
        pages = size // page_bytes
        if not pages:
            shown = f"--memory {memory} is {show_bytes(size)}"
            raise ConfigError(f"{shown}, one page takes {show_bytes(page_bytes)}; give more")
    elif pages is None:
        pages = default_pages(settings, workload)
    if settings.duration_s is None:
        check_fits(workload, settings.page_size, pages)
    return msgspec.structs.replace(settings, pages=pages)


def default_pages(settings: BenchSettings, workload: Workload) -> int:
    """Pages per replica for the largest request, or BATCHES_KEPT average batches if that is more."""
    sizes = [request.pages(settings.page_size) for request in workload.requests]
    batch = math.ceil(settings.concurrency / settings.replicas) * sum(sizes) / len(sizes)
    return max(max(sizes), math.ceil(BATCHES_KEPT * batch))
