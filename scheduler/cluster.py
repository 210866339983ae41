"""Starting a manager's actors in the one order that cannot fail late: plan, place, replicas, scheduler.

Nodes are listed; a task on each measures it; only then is a placement group asked for, and each replica gets
the pages that its node's plan allows. Whatever fails, nothing is left behind.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayk.actors.replica import ReplicaActor, ReplicaFacts, measure
from rayk.actors.runtime import Actor, ActorGoneError, ActorSpec, NameTakenError, Node, Placement, Runtime
from rayk.admission import AdmissionPolicy
from rayk.errors import ConfigError, PlanError, RaykError, SchedulerLostError
from rayk.params import KVCacheParams
from rayk.planning import ClusterPlan, NodeMemory, plan_cluster, refused_nodes, replicas_that_fit, uses_cuda
from rayk.scheduler.actor import LANES, SchedulerActor
from rayk.scheduler.desk import DeskSettings
from rayk.scheduler.policies import check_router
from rayk.tiers.identity import read_seed

log = logging.getLogger("rayk.scheduler")

START_SECONDS = 180.0
TOLERANCE = 0.03  # of the planned bytes; a replica that is further off is worth a warning
PLACE_SECONDS = 60.0
CLOSE_SECONDS = 30.0
SLIVER = 0.001  # of a CPU: Ray refuses an empty bundle, and many replicas must fit a small machine


@dataclass(frozen=True)
class ClusterConfig:
    """What a manager wants started."""

    params: KVCacheParams
    wanted_pages: int | None
    max_batch_size: int
    runtime_checks: bool
    router: str
    uniform: bool = False  # the same number of pages on all replicas
    utilization: float | None = None  # part of the free memory to take
    host_pages: int = 0  # of the host tier of each node
    admission: AdmissionPolicy | None = None  # how requests wait for room


@dataclass(frozen=True)
class Cluster:
    """Running actors of one manager. `epochs[r]`, `plan.replicas[r]` and `facts[r]` belong to replica r."""

    config: ClusterConfig
    plan: ClusterPlan
    placement: Placement
    replicas: tuple[Actor, ...] = ()
    epochs: tuple[int, ...] = ()
    facts: tuple[ReplicaFacts, ...] = ()
    scheduler: Actor | None = None
    scheduler_epoch: int = 0

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each replica."""
        return tuple(plan.pages for plan in self.plan.replicas)

    def stop(self, runtime: Runtime) -> None:
        """Kill all actors and give the placement back; returns when they are gone. Tiers are written out first."""
        if self.config.params.kv_connector != "null":
            closing = []
            for actor in self.replicas:
                with suppress(ActorGoneError):
                    closing.append(actor.call("close"))
            for ref in closing:
                with suppress(ActorGoneError, RaykError):  # a dead or hung replica's share is cleaned up by the next
                    runtime.get(ref, "a replica", CLOSE_SECONDS)
        scheduler = () if self.scheduler is None else (self.scheduler,)
        runtime.stop((*scheduler, *self.replicas), self.placement)


def desk_settings(config: ClusterConfig, pages: tuple[int, ...]) -> DeskSettings:
    """What the scheduler places requests by."""
    params = config.params
    return DeskSettings(
        config.router,
        pages,
        params.page_size,
        params.kv_hash_algo,
        params.kv_hash_seed or b"",
        params.enable_prefix_caching,
        config.admission,
    )


def start_cluster(runtime: Runtime, config: ClusterConfig, name: str | None) -> Cluster:
    """Start everything, or attach to what runs under `name`; PlanError or ConfigError otherwise."""
    check_router(config.router)  # a wrong name is refused before anything starts
    if name is not None:
        running = runtime.find(f"{name}/scheduler")
        if running is not None:
            return _attach(runtime, running, config, name)
        try:
            return _start(runtime, config, name)
        except NameTakenError:  # another driver starts it right now
            return _attach(runtime, _await_scheduler(runtime, name), config, name)
    return _start(runtime, config, name)


def _await_scheduler(runtime: Runtime, name: str) -> Actor:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        running = runtime.find(f"{name}/scheduler")
        if running is not None:
            return running
        time.sleep(0.05)
    raise PlanError(
        f"replicas of {name!r} exist, but no scheduler came up within {START_SECONDS:.0f} s: the driver that started "
        "them may have died half-way; kill those actors or use another name"
    )


def _start(runtime: Runtime, config: ClusterConfig, name: str | None) -> Cluster:
    if config.params.kv_hash_seed is None:
        config = replace(config, params=replace(config.params, kv_hash_seed=_seed(runtime, config.params)))
    disk = config.params.kv_connector_config
    nodes = measure_nodes(runtime, str(disk.disk_offload_dir) if disk and disk.disk_offload_dir else None)
    placement = _place(runtime, config, nodes)
    replicas: tuple[Actor, ...] = ()
    try:
        plan = plan_cluster(
            nodes,
            placement.node_ids,
            config.params,
            config.wanted_pages,
            config.max_batch_size,
            config.uniform,
            config.utilization,
        )
        cluster = _start_replicas(runtime, Cluster(config, plan, placement), name)
        replicas = cluster.replicas
        _compare(cluster)
        return _start_scheduler(runtime, cluster, name)
    except BaseException:
        runtime.stop(replicas, placement)
        raise


def measure_nodes(runtime: Runtime, disk_dir: str | None = None) -> list[NodeMemory]:
    """What every live node offers, measured on it by a task that holds none of it; the disk at `disk_dir` too."""
    refs = [(node, _measure(runtime, node, disk_dir)) for node in runtime.nodes()]
    try:
        return [runtime.get(ref, f"the planner on node {n.host_name}", START_SECONDS) for n, ref in refs]
    except ActorGoneError as error:
        raise PlanError(f"a node could not be measured: {error}") from None


def _seed(runtime: Runtime, params: KVCacheParams) -> bytes:
    """The seed that the nodes' tier directories were used with before, else a new one."""
    config = params.kv_connector_config
    if config is not None and config.disk_offload_dir is not None:
        refs = [(n, runtime.run_on(n.node_id, read_seed, Path(config.disk_offload_dir))) for n in runtime.nodes()]
        for node, ref in refs:
            try:
                seed: bytes | None = runtime.get(ref, f"node {node.host_name}", START_SECONDS)
            except ActorGoneError as error:
                raise PlanError(f"a node could not be asked for its tier's seed: {error}") from None
            if seed is not None:
                return seed
    return os.urandom(32)


def _measure(runtime: Runtime, node: Node, disk_dir: str | None) -> Any:
    memory = node.resources.get("memory")  # what Ray was told that it may use there
    return runtime.run_on(
        node.node_id, measure, node.node_id, node.host_name, int(memory) if memory else None, disk_dir
    )


def _place(runtime: Runtime, config: ClusterConfig, nodes: list[NodeMemory]) -> Placement:
    params = config.params
    refused = refused_nodes(nodes, params, config.wanted_pages, config.utilization)
    room = sum(replicas_that_fit(n, params) for n in nodes if n.node_id not in refused)
    if room < params.data_parallel_degree:
        reasons = "; ".join(refused.values()) or "the others have too few GPUs"
        raise PlanError(f"{params.data_parallel_degree} replica(s) asked for, {room} fit: {reasons}")
    bundle = {"CPU": SLIVER}
    if uses_cuda(params):
        bundle["GPU"] = float(params.tensor_parallel_degree)
    return runtime.place([bundle] * params.data_parallel_degree, list(refused), PLACE_SECONDS)


def _start_replicas(runtime: Runtime, cluster: Cluster, name: str | None) -> Cluster:
    config, epoch = cluster.config, time.time_ns() // 1_000
    keyed = desk_settings(config, cluster.pages).keyed
    gpus = config.params.tensor_parallel_degree if uses_cuda(config.params) else 0
    started: list[Actor] = []
    tiers = f"{epoch}-{os.urandom(8).hex()}"
    try:
        for r, pages in enumerate(cluster.pages):
            pool = f"{tiers}-{cluster.placement.node_ids[r]}"  # one for each node
            arguments = (
                config.params,
                r,
                pages,
                config.max_batch_size,
                config.runtime_checks,
                epoch + r,
                config.host_pages,
                pool,
                keyed,
            )
            named = f"{name}/replica-{r}" if name else None
            started.append(runtime.start(ActorSpec(ReplicaActor, arguments, gpus, cluster.placement, r, named)))
        facts = tuple(_ready(runtime, actor, f"replica {r}", "facts") for r, actor in enumerate(started))
    except BaseException:
        runtime.stop(started, None)
        raise
    return replace(cluster, replicas=tuple(started), epochs=tuple(epoch + r for r in range(len(started))), facts=facts)


def _compare(cluster: Cluster) -> None:
    """Warn where a replica took notably more or less memory than its plan says."""
    for plan, facts in zip(cluster.plan.replicas, cluster.facts, strict=True):
        if abs(facts.allocated - plan.bytes) > TOLERANCE * plan.bytes:
            log.warning(
                "replica %d on %s took %d bytes for its pages, planned were %d: the plan is off by %.1f %%",
                facts.replica,
                plan.host_name,
                facts.allocated,
                plan.bytes,
                100 * (facts.allocated / plan.bytes - 1),
            )


def _start_scheduler(runtime: Runtime, cluster: Cluster, name: str | None) -> Cluster:
    params, epoch = cluster.config.params, time.time_ns() // 1_000
    copies = params.enable_prefix_caching and params.enable_dp_cross_replica_prefix_copy
    cluster = replace(cluster, scheduler_epoch=epoch)
    arguments = (epoch, cluster.replicas, cluster.epochs, desk_settings(cluster.config, cluster.pages), copies, cluster)
    spec = ActorSpec(SchedulerActor, arguments, name=f"{name}/scheduler" if name else None, threads=LANES)
    scheduler = runtime.start(spec)
    try:
        _ready(runtime, scheduler, "the scheduler", "ping")
    except BaseException:
        runtime.stop([scheduler], None)
        raise
    return replace(cluster, scheduler=scheduler)


def _ready(runtime: Runtime, actor: Actor, target: str, question: str) -> Any:
    """The answer to a question to a new actor, once its constructor is done."""
    try:
        return runtime.get(actor.call(question, control=True), target, START_SECONDS)
    except ActorGoneError as error:
        raise PlanError(f"{target} could not start: {error}") from None


def _attach(runtime: Runtime, scheduler: Actor, config: ClusterConfig, name: str) -> Cluster:
    """The cluster that runs under `name`, if it is what was asked for."""
    try:
        cluster = runtime.get(scheduler.call("roster", control=True), "the scheduler", START_SECONDS)
    except ActorGoneError as error:
        raise SchedulerLostError(str(error)) from None
    assert isinstance(cluster, Cluster)
    differing = _differences(cluster, config)
    if differing:
        raise ConfigError(f"{name!r} runs with other settings: {differing}; use the same, or shut it down first")
    return replace(cluster, scheduler=scheduler)


def _differences(cluster: Cluster, wanted: ClusterConfig) -> str:
    running = cluster.config
    params = wanted.params
    if params.kv_hash_seed is None:
        params = replace(params, kv_hash_seed=running.params.kv_hash_seed)
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("params", lambda: params == running.params),
        ("total_num_pages", lambda: wanted.wanted_pages is None or {wanted.wanted_pages} == set(cluster.pages)),
        ("max_batch_size", lambda: wanted.max_batch_size == running.max_batch_size),
        ("router", lambda: wanted.router == running.router),
        ("uniform", lambda: wanted.uniform == running.uniform),
        ("total_num_host_pages", lambda: wanted.host_pages == running.host_pages),
        ("admission", lambda: wanted.admission == running.admission),
    ]
    return ", ".join(what for what, same in checks if not same())


__all__ = ["Cluster", "ClusterConfig", "RaykError", "start_cluster"]
