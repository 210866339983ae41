"""Starting a manager's actors in the one order that cannot fail late: plan, place, replicas, scheduler.

Nodes are listed; a task on each measures it; only then is a placement group asked for, and each replica gets
the pages that its node's plan allows. Whatever fails, nothing is left behind.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rayk.actors.interface import Actor, ActorGoneError, ActorSpec, NameTakenError, Node, Placement, Runtime
from rayk.actors.replica import ReplicaActor, ReplicaFacts, measure
from rayk.actors.scheduler import LANES, SchedulerActor
from rayk.errors import ConfigError, PlanError, RaykError, SchedulerLostError
from rayk.params import KVCacheParams
from rayk.planning.node_plan import (
    ClusterPlan,
    Component,
    NodeMemory,
    ReplicaPlan,
    plan_cluster,
    refused_nodes,
    replicas_that_fit,
    uses_cuda,
)
from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.membership import State
from rayk.scheduler.router.policies import check_router
from rayk.scheduler.router.router import RouterSettings
from rayk.tiers.identity import named, read_seed, take_seed

log = logging.getLogger("rayk.scheduler")

START_SECONDS = 180.0
PLACE_SECONDS = 60.0
CLOSE_SECONDS = 30.0
SLIVER = 0.001  # of a CPU: Ray refuses an empty bundle, and many replicas must fit a small machine


@dataclass(frozen=True)
class DeploymentConfig:
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
class ReplicaHandle:
    """A replica that runs: in `placement.node_ids[bundle]`, by `plan`; `facts` is what it took."""

    actor: Actor
    epoch: int
    plan: ReplicaPlan
    facts: ReplicaFacts
    placement: Placement
    bundle: int = 0


@dataclass(frozen=True)
class Deployment:
    """Running actors of one manager: `seats[r]` is replica r, None where nobody is. The roster that drivers share.

    `plan` is that of the start, and what was measured of nodes since. `tiers` names the host pools of the nodes.
    `version`, `joined` and `states` are those of the scheduler's Membership. `started_here`: by this driver.
    """

    config: DeploymentConfig
    plan: ClusterPlan
    seats: tuple[ReplicaHandle | None, ...] = ()
    tiers: str = ""
    scheduler: Actor | None = None
    scheduler_epoch: int = 0
    version: int = 1
    joined: int = 1
    states: tuple[str, ...] = ()
    started_here: bool = False

    @property
    def there(self) -> list[ReplicaHandle]:
        """The replicas that run, by index."""
        return [seat for seat in self.seats if seat is not None]

    @property
    def replicas(self) -> tuple[Actor, ...]:
        """Their actors."""
        return tuple(seat.actor for seat in self.there)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Their starts."""
        return tuple(seat.epoch for seat in self.there)

    def answers(self, replica: int) -> bool:
        """Whether its process answered when the states were reported last."""
        return self.states[replica : replica + 1] != (State.silent,)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each index, 0 where nobody is."""
        return tuple(seat.plan.pages if seat is not None else 0 for seat in self.seats)

    @property
    def facts(self) -> tuple[ReplicaFacts, ...]:
        """What they took."""
        return tuple(seat.facts for seat in self.there)

    def seated(self, replica: int, seat: ReplicaHandle | None, nodes: Sequence[NodeMemory] = ()) -> Deployment:
        """The same with another replica, or nobody, at that index; `nodes` were measured for it."""
        seats = [*self.seats, *[None] * (replica + 1 - len(self.seats))]
        seats[replica] = seat
        measured = {node.node_id: node for node in (*self.plan.nodes, *nodes)}
        plan = msgspec.structs.replace(self.plan, nodes=tuple(measured.values()))
        return replace(self, seats=tuple(seats), plan=plan)

    def standing(self, version: int, joined: int, states: tuple[str, ...]) -> Deployment:
        """The same as of that version."""
        return replace(self, version=version, joined=joined, states=states)

    def stop(self, runtime: Runtime) -> None:
        """Kill all actors and give all placements back; returns when they are gone. Tiers are written out first."""
        there = [seat.actor for r, seat in enumerate(self.seats) if seat is not None and self.answers(r)]
        close_tiers(runtime, self.config, there)
        scheduler = () if self.scheduler is None else (self.scheduler,)
        groups = {id(seat.placement.group): seat.placement for seat in self.there}
        first, *others = groups.values() or [None]
        runtime.stop((*scheduler, *self.replicas), first)
        for placement in others:
            runtime.stop((), placement)


def close_tiers(runtime: Runtime, config: DeploymentConfig, replicas: Sequence[Actor]) -> None:
    """Have replicas write out what is on its way to their tiers, and let go of them."""
    if config.params.kv_connector != "null":
        closing = []
        for actor in replicas:
            with suppress(ActorGoneError):
                closing.append(actor.call("close"))
        deadline = time.monotonic() + CLOSE_SECONDS
        for ref in closing:
            with suppress(ActorGoneError, RaykError):  # a dead or hung replica's share is cleaned up by the next
                runtime.get(ref, "a replica", max(0.0, deadline - time.monotonic()))


def desk_settings(config: DeploymentConfig, pages: tuple[int, ...]) -> RouterSettings:
    """What the scheduler places requests by."""
    params = config.params
    return RouterSettings(
        config.router,
        pages,
        params.page_size,
        params.page_hash_algo,
        params.kv_hash_seed or b"",
        params.enable_prefix_caching,
        config.admission,
        params.page_transport,
        params.offers_pages,
    )


def start_cluster(runtime: Runtime, config: DeploymentConfig, name: str | None) -> Deployment:
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


def _start(runtime: Runtime, config: DeploymentConfig, name: str | None) -> Deployment:
    config = replace(config, params=named(config.params))
    if config.params.kv_hash_seed is None:
        config = replace(config, params=replace(config.params, kv_hash_seed=_seed(runtime, config.params)))
    disk = config.params.kv_connector_config
    nodes = measure_nodes(runtime, str(disk.disk_offload_dir) if disk and disk.disk_offload_dir else None)
    placement = _place(runtime, config, nodes)
    seats: list[ReplicaHandle] = []
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
        epoch = time.time_ns() // 1_000
        cluster = Deployment(config, plan, tiers=f"{epoch}-{os.urandom(8).hex()}")
        places = [Place(r, epoch + r, each, placement, r) for r, each in enumerate(plan.replicas)]
        seats = start_replicas(runtime, cluster, places, desk_settings(config, plan_pages(plan)).keyed, name)
        return _start_scheduler(runtime, replace(cluster, seats=tuple(seats)), name)
    except BaseException:
        runtime.stop([seat.actor for seat in seats], placement)
        raise


def plan_pages(plan: ClusterPlan) -> tuple[int, ...]:
    """Pages of each replica of a plan."""
    return tuple(each.pages for each in plan.replicas)


def measure_nodes(
    runtime: Runtime, disk_dir: str | None = None, taken: Mapping[str, int] | None = None
) -> list[NodeMemory]:
    """What every live node offers, measured on it by a task that holds none of it; the disk at `disk_dir` too.

    `taken`: bytes by node id that are promised already of what Ray was told of.
    """
    refs = [(node, _measure(runtime, node, disk_dir, (taken or {}).get(node.node_id, 0))) for node in runtime.nodes()]
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
        for node in runtime.nodes()[:1]:  # others may start on the same folder: who is first decides
            made: bytes = runtime.get(
                runtime.run_on(node.node_id, take_seed, Path(config.disk_offload_dir)),
                f"node {node.host_name}",
                START_SECONDS,
            )
            return made
    return os.urandom(32)


def _measure(runtime: Runtime, node: Node, disk_dir: str | None, taken: int) -> Any:
    memory = node.resources.get("memory")  # what Ray was told that it may use there
    limit = max(0, int(memory) - taken) if memory else None
    return runtime.run_on(node.node_id, measure, node.node_id, node.host_name, limit, disk_dir)


def _place(runtime: Runtime, config: DeploymentConfig, nodes: list[NodeMemory]) -> Placement:
    params = config.params
    refused = refused_nodes(nodes, params, config.wanted_pages, config.utilization)
    room = sum(replicas_that_fit(n, params) for n in nodes if n.node_id not in refused)
    if room < params.data_parallel_degree:
        reasons = "; ".join(refused.values()) or "the others have too few GPUs"
        raise PlanError(f"{params.data_parallel_degree} replica(s) asked for, {room} fit: {reasons}")
    return runtime.place([bundle_of(params)] * params.data_parallel_degree, list(refused), PLACE_SECONDS)


def bundle_of(params: KVCacheParams) -> dict[str, float]:
    """What a replica asks of Ray."""
    bundle = {"CPU": SLIVER}
    if uses_cuda(params):
        bundle["GPU"] = float(params.tensor_parallel_degree)
    return bundle


class Place(NamedTuple):
    """Where a replica is to start: its index and epoch, its plan, and its bundle of a placement."""

    replica: int
    epoch: int
    plan: ReplicaPlan
    placement: Placement
    bundle: int


def start_replicas(
    runtime: Runtime, cluster: Deployment, places: Sequence[Place], keyed: bool, name: str | None
) -> list[ReplicaHandle]:
    """Start replicas side by side and wait for all; none is left when one fails. `keyed`: they note what they cache.

    A replica that is added has its epoch in its actor's name, as another may have had its index before.
    """
    config = cluster.config
    gpus = config.params.tensor_parallel_degree if uses_cuda(config.params) else 0
    started: list[Actor] = []
    try:
        for at in places:
            pool = f"{cluster.tiers}-{at.placement.node_ids[at.bundle]}"  # one for each node
            arguments = (
                config.params,
                at.replica,
                at.plan.pages,
                config.max_batch_size,
                config.runtime_checks,
                at.epoch,
                config.host_pages,
                pool,
                keyed,
            )
            named = f"{name}/replica-{at.replica}{f'-{at.epoch}' if cluster.seats else ''}" if name else None
            started.append(runtime.start(ActorSpec(ReplicaActor, arguments, gpus, at.placement, at.bundle, named)))
        facts = [
            _ready(runtime, actor, f"replica {at.replica}", "facts") for at, actor in zip(places, started, strict=True)
        ]
    except BaseException:
        runtime.stop(started, None)
        raise
    seats = [
        ReplicaHandle(actor, at.epoch, at.plan, took, at.placement, at.bundle)
        for at, actor, took in zip(places, started, facts, strict=True)
    ]
    for seat in seats:
        _compare(seat.plan, seat.facts)
    return seats


def _compare(plan: ReplicaPlan, facts: ReplicaFacts) -> None:
    """Warn where a replica took notably more or less memory than its plan says."""
    pages = Component("pages", plan.bytes, facts.allocated)
    if pages.is_off:
        log.warning("replica %d on %s is not as planned: %s", facts.replica, plan.host_name, pages)


def _start_scheduler(runtime: Runtime, cluster: Deployment, name: str | None) -> Deployment:
    params, epoch = cluster.config.params, time.time_ns() // 1_000
    cluster = replace(cluster, scheduler_epoch=epoch, states=("ready",) * len(cluster.seats))
    settings = desk_settings(cluster.config, cluster.pages)
    arguments = (epoch, cluster.replicas, cluster.epochs, settings, params.copies_prefixes, cluster)
    spec = ActorSpec(SchedulerActor, arguments, name=f"{name}/scheduler" if name else None, threads=LANES)
    scheduler = runtime.start(spec)
    try:
        _ready(runtime, scheduler, "the scheduler", "ping")
    except BaseException:
        runtime.stop([scheduler], None)
        raise
    return replace(cluster, scheduler=scheduler, started_here=True)


def _ready(runtime: Runtime, actor: Actor, target: str, question: str) -> Any:
    """The answer to a question to a new actor, once its constructor is done."""
    try:
        return runtime.get(actor.call(question, control=True), target, START_SECONDS)
    except ActorGoneError as error:
        raise PlanError(f"{target} could not start: {error}") from None


def _attach(runtime: Runtime, scheduler: Actor, config: DeploymentConfig, name: str) -> Deployment:
    """The cluster that runs under `name`, if it is what was asked for."""
    try:
        cluster = runtime.get(scheduler.call("roster", control=True), "the scheduler", START_SECONDS)
    except ActorGoneError as error:
        raise SchedulerLostError(str(error)) from None
    assert isinstance(cluster, Deployment)
    differing = _differences(cluster, config)
    if differing:
        raise ConfigError(f"{name!r} runs with other settings: {differing}; use the same, or shut it down first")
    return replace(cluster, scheduler=scheduler)


def _same_pages(wanted: int | None, cluster: Deployment) -> bool:
    return wanted is None or all(seat.plan.pages == wanted for seat in cluster.there)


def _differences(cluster: Deployment, wanted: DeploymentConfig) -> str:
    running = cluster.config
    params = wanted.params
    if params.kv_hash_seed is None:
        params = replace(params, kv_hash_seed=running.params.kv_hash_seed)
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("params", lambda: params == running.params),
        ("total_num_pages", lambda: _same_pages(wanted.wanted_pages, cluster)),
        ("max_batch_size", lambda: wanted.max_batch_size == running.max_batch_size),
        ("router", lambda: wanted.router == running.router),
        ("uniform", lambda: wanted.uniform == running.uniform),
        ("total_num_host_pages", lambda: wanted.host_pages == running.host_pages),
        ("admission", lambda: wanted.admission == running.admission),
    ]
    return ", ".join(what for what, same in checks if not same())


__all__ = ["Deployment", "DeploymentConfig", "RaykError", "start_cluster"]
