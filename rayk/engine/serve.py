"""Engines of one model on several replicas: in this process, or behind whatever carries their commands.

`Replicas` is what a Cluster needs of them; `InlineReplicas` has them all here, one thread and one model for all.
rayk.actors.engine has the other one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from socket import gethostname
from typing import Any, Protocol

from rayk.engine.engine import Engine
from rayk.engine.forward import Model
from rayk.engine.graphs import with_graphs
from rayk.engine.host import EngineHost
from rayk.engine.settings import EngineSettings, EngineStats
from rayk.engine.wire import Command, Report
from rayk.errors import ConfigError
from rayk.params import KVCacheParams, require, require_at_least
from rayk.planning import NodeMemory, ReplicaPlan, measure_node, plan_replica
from rayk.replica import ReplicaCore

HASH_ALGORITHM = "xxh3_128"  # of pages, for routing only: a stale or wrong entry costs a miss


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a replica's model comes from: a checkpoint folder, or a function that makes one."""

    folder: Path | None = None
    make: Callable[[str], Any] | None = None
    dtype: str = "auto"
    attention: str | None = None

    def load(self, device: str) -> Any:
        """The model on that device."""
        if self.make is not None:
            return self.make(device)
        assert self.folder is not None
        from rayk.models import load_model

        return load_model(self.folder, dtype=self.dtype, device=device, attention=self.attention)

    def __str__(self) -> str:
        return str(self.folder) if self.folder is not None else getattr(self.make, "__name__", "a model")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How replicas of one model are served. `pages` is per replica; None takes what fits and what can be used.

    longest: tokens of the longest request that will come, for that; the model's limit when None.
    """

    replicas: int = 1
    page_size: int = 128
    pages: int | None = None
    max_batch_size: int = 64
    device: str = "auto"
    prefix_caching: bool = True
    utilization: float | None = None
    longest: int | None = None
    hash_seed: bytes | None = None  # of pages' hashes, where engines report them
    graphs: bool = True  # decode steps as CUDA graphs
    threads: int = 1  # of torch, in each process
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        require_at_least(
            1,
            replicas=self.replicas,
            page_size=self.page_size,
            max_batch_size=self.max_batch_size,
            threads=self.threads,
            **({} if self.pages is None else {"pages": self.pages}),
        )
        require(
            self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:"),
            f"device {self.device!r} is not 'auto', 'cpu' or 'cuda'",
        )


class Replicas(Protocol):
    """Engines that take commands and report. `facts[r]` tells what replica r is; `tokenizer` where it is at hand."""

    facts: Sequence[ReplicaFacts]
    tokenizer: Any

    def post(self, replica: int, command: Command) -> None: ...
    def reports(self, replica: int) -> Iterator[Report]: ...
    def stats(self, replica: int) -> EngineStats: ...
    def drop(self, replica: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ReplicaFacts:
    """One replica as it was started."""

    replica: int
    node: str
    device: str
    backend: str
    pages: int
    page_bytes: int
    max_length: int
    vocab_size: int
    has_tokenizer: bool


def cache_params(model: Any, settings: ServeSettings, device: str) -> KVCacheParams:
    """The parameters of one replica's cache for that model."""
    params = model.cache_params(
        page_size=settings.page_size,
        devices=[device],
        data_parallel_degree=1,
        enable_prefix_caching=settings.prefix_caching,
        kv_hash_algo=HASH_ALGORITHM,
        kv_hash_seed=settings.hash_seed,
    )
    assert isinstance(params, KVCacheParams)
    return params


def plan_pages(
    model: Any, params: KVCacheParams, settings: ServeSettings, sharing: int, node: NodeMemory | None = None
) -> ReplicaPlan:
    """The pages of one of `sharing` replicas on a node, after the model was loaded there; PlanError if none fit.

    Without a wish: what fits, and no more than a full batch of the longest requests can use.
    """
    node = node or measure_node()
    plan = plan_replica(node, params, settings.pages, sharing, settings.utilization)
    if settings.pages is not None:
        return plan
    longest = min(model.max_length, settings.longest or model.max_length)
    useful = settings.max_batch_size * -(-(longest + 1) // settings.page_size)
    return plan_replica(node, params, min(plan.pages, useful), sharing, settings.utilization)


def make_engine(
    model: Model, params: KVCacheParams, settings: ServeSettings, replica: int, pages: int, device: str
) -> Engine:
    """One replica's engine over a new cache; on CUDA its decode steps are captured."""
    core = ReplicaCore(params, replica, pages, settings.max_batch_size, [device])
    rules = replace(settings.engine, report_pages=settings.hash_seed is not None)
    return Engine(core, with_graphs(model, core) if settings.graphs else model, rules)


class InlineReplicas:
    """All replicas in this process: one model for each device, one thread for all engines."""

    def __init__(self, source: ModelSource, settings: ServeSettings) -> None:
        import torch

        devices = [self._device(settings, replica) for replica in range(settings.replicas)]
        sharing, models = Counter(devices), {}
        for device in sharing:
            if device.startswith("cuda") and not torch.cuda.is_available():
                raise ConfigError("this process sees no CUDA device; use device='cpu'")
            models[device] = source.load(device)
        engines = []
        node = measure_node(host_name=gethostname())
        for replica, device in enumerate(devices):
            model = models[device]
            params = cache_params(model, settings, device)
            plan = plan_pages(model, params, settings, sharing[device], node)
            engines.append(make_engine(model, params, settings, replica, plan.pages, device))
        self.facts: Sequence[ReplicaFacts] = [
            facts_of(engine, devices[replica], node.host_name) for replica, engine in enumerate(engines)
        ]
        self.tokenizer = engines[0].model.tokenizer
        self._host = EngineHost(engines).start()

    @staticmethod
    def _device(settings: ServeSettings, replica: int) -> str:
        if settings.device != "cuda":
            return settings.device
        import torch

        return f"cuda:{replica % max(1, torch.cuda.device_count())}"

    def post(self, replica: int, command: Command) -> None:
        self._host.post(replica, command)

    def reports(self, replica: int) -> Iterator[Report]:
        return self._host.reports(replica)

    def stats(self, replica: int) -> EngineStats:
        return self._host.stats(replica)

    def drop(self, replica: int) -> None:
        """It is lost, and with it all others: they share a thread."""

    def close(self) -> None:
        self._host.stop()


def facts_of(engine: Engine, device: str, node: str) -> ReplicaFacts:
    """What an engine's replica is."""
    core = engine.core
    return ReplicaFacts(
        core.replica,
        node,
        device,
        str(getattr(engine.model, "backend", "")),
        core.num_pages,
        core.params.bytes_per_page,
        engine.model.max_length,
        engine.model.vocab_size,
        engine.limits.has_tokenizer,
    )
