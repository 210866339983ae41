"""Starting a manager's actors in the one order that cannot fail late: plan, place, replicas, scheduler.

Nodes are listed; a task on each measures it; only then is a placement group asked for, and each replica gets
the pages that its node's plan allows. Whatever fails, nothing is left behind.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from rayk.actors.replica import ReplicaActor, measure
from rayk.actors.runtime import Actor, ActorGoneError, ActorSpec, NameTakenError, Placement, Runtime
from rayk.errors import ConfigError, PlanError, RaykError, SchedulerLostError
from rayk.params import KVCacheParams
from rayk.planning import NodeMemory, plan_replica, refused_nodes, replicas_that_fit, uses_cuda
from rayk.scheduler.actor import SchedulerActor
from rayk.scheduler.routing import make_router

START_SECONDS = 180.0
PLACE_SECONDS = 60.0
SLIVER = 0.001  # of a CPU: Ray refuses an empty bundle, and many replicas must fit a small machine


@dataclass(frozen=True)
class ClusterConfig:
    """What a manager wants started."""

    params: KVCacheParams
    wanted_pages: int | None
    max_batch_size: int
    runtime_checks: bool
    router: str


@dataclass(frozen=True)
class Cluster:
    """Running actors of one manager. `pages[r]`, `node_names[r]` and `epochs[r]` belong to replica r."""

    config: ClusterConfig
    replicas: tuple[Actor, ...]
    epochs: tuple[int, ...]
    pages: tuple[int, ...]
    node_names: tuple[str, ...]
    placement: Placement | None
    scheduler: Actor | None = None
    scheduler_epoch: int = 0

    def stop(self, runtime: Runtime) -> None:
        """Kill all actors and give the placement back; returns when they are gone."""
        scheduler = () if self.scheduler is None else (self.scheduler,)
        runtime.stop((*scheduler, *self.replicas), self.placement)


def start_cluster(runtime: Runtime, config: ClusterConfig, name: str | None) -> Cluster:
    """Start everything, or attach to what runs under `name`; PlanError or ConfigError otherwise."""
    make_router(config.router)  # a wrong name is refused before anything starts
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
        config = replace(config, params=replace(config.params, kv_hash_seed=os.urandom(32)))
    nodes = measure_nodes(runtime)
    placement = _place(runtime, config, nodes)
    names = {node.node_id: node.host_name for node in nodes}
    cluster = Cluster(config, (), (), (), tuple(names[i] for i in placement.node_ids), placement)
    try:
        cluster = _start_replicas(runtime, cluster, nodes, name)
        return _start_scheduler(runtime, cluster, name)
    except BaseException:
        cluster.stop(runtime)
        raise


def measure_nodes(runtime: Runtime) -> list[NodeMemory]:
    """What every live node offers, measured on it by a task that holds none of it."""
    refs = [(n, runtime.run_on(n.node_id, measure, n.node_id, n.host_name)) for n in runtime.nodes()]
    return [runtime.get(ref, f"the planner on node {n.host_name}", START_SECONDS) for n, ref in refs]


def _place(runtime: Runtime, config: ClusterConfig, nodes: list[NodeMemory]) -> Placement:
    params = config.params
    refused = refused_nodes(nodes, params, config.wanted_pages)
    room = sum(replicas_that_fit(n, params) for n in nodes if n.node_id not in refused)
    if room < params.data_parallel_degree:
        reasons = "; ".join(refused.values()) or "the others have too few GPUs"
        raise PlanError(f"{params.data_parallel_degree} replica(s) asked for, {room} fit: {reasons}")
    bundle = {"CPU": SLIVER}
    if uses_cuda(params):
        bundle["GPU"] = float(params.tensor_parallel_degree)
    return runtime.place([bundle] * params.data_parallel_degree, list(refused), PLACE_SECONDS)


def _start_replicas(runtime: Runtime, cluster: Cluster, nodes: list[NodeMemory], name: str | None) -> Cluster:
    config, placement = cluster.config, cluster.placement
    assert placement is not None
    by_id = {node.node_id: node for node in nodes}
    on_node = Counter(placement.node_ids)
    plans = [  # on CUDA every replica has GPUs of its own
        plan_replica(by_id[i], config.params, config.wanted_pages, 1 if uses_cuda(config.params) else on_node[i])
        for i in placement.node_ids
    ]
    epoch = time.time_ns() // 1_000
    started: list[Actor] = []
    try:
        for r, plan in enumerate(plans):
            arguments = (config.params, r, plan.pages, config.max_batch_size, config.runtime_checks, epoch + r)
            gpus = config.params.tensor_parallel_degree if uses_cuda(config.params) else 0
            spec = ActorSpec(ReplicaActor, arguments, gpus, placement, r, f"{name}/replica-{r}" if name else None)
            started.append(runtime.start(spec))
        for r, actor in enumerate(started):
            _wait(runtime, actor, f"replica {r}")
    except BaseException:
        runtime.stop(started, None)
        raise
    pages = tuple(plan.pages for plan in plans)
    return replace(cluster, replicas=tuple(started), epochs=tuple(epoch + r for r in range(len(plans))), pages=pages)


def _start_scheduler(runtime: Runtime, cluster: Cluster, name: str | None) -> Cluster:
    params, epoch = cluster.config.params, time.time_ns() // 1_000
    copies = params.enable_prefix_caching and params.enable_dp_cross_replica_prefix_copy
    cluster = replace(cluster, scheduler_epoch=epoch)
    arguments = (epoch, cluster.replicas, cluster.epochs, cluster.config.router, copies, cluster)
    spec = ActorSpec(SchedulerActor, arguments, name=f"{name}/scheduler" if name else None)
    scheduler = runtime.start(spec)
    try:
        _wait(runtime, scheduler, "the scheduler")
    except BaseException:
        runtime.stop([scheduler], None)
        raise
    return replace(cluster, scheduler=scheduler)


def _wait(runtime: Runtime, actor: Actor, target: str) -> None:
    """Return once the actor's constructor is done."""
    try:
        runtime.get(actor.call("ping", control=True), target, START_SECONDS)
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
    ]
    return ", ".join(what for what, same in checks if not same())


__all__ = ["Cluster", "ClusterConfig", "RaykError", "start_cluster"]
