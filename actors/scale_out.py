"""A manager's replicas, those of the start and those that are added: nodes are measured, a place is asked for, what
fits there is planned, and actors start with that many pages. Whatever fails, nothing is left behind."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rayk.actors.deployment import Deployment, ReplicaHandle
from rayk.actors.interface import ActorSpec, Bundle, Placement, Runtime
from rayk.actors.launch import (
    START_SECONDS,
    ended_on_failure,
    find_sockets,
    first_answers,
    measure_nodes,
    place_actors,
    shares_group,
    starting,
    vacate,
)
from rayk.actors.replica import ReplicaActor, ReplicaFacts
from rayk.errors import PlanError
from rayk.params import KVCacheParams
from rayk.planning.node_plan import (
    Component,
    NodeMemory,
    ReplicaPlan,
    plan_replicas,
    refused_nodes,
    replicas_that_fit,
)
from rayk.scheduler.membership import State

log = logging.getLogger("rayk.scheduler")


class PlannedReplica(NamedTuple):
    """A replica that is to be started: its index and epoch, its plan, and its place."""

    replica: int
    epoch: int
    plan: ReplicaPlan
    bundle: Bundle


class ScaleOut(NamedTuple):
    """Replicas that are to be started; `groups` were made for them; `nodes` as they were measured, some `refused`."""

    planned: list[PlannedReplica]
    groups: list[Placement]
    nodes: list[NodeMemory]
    refused: Mapping[str, str]


def plan_scale_out(
    runtime: Runtime, deployment: Deployment, replicas: Sequence[int], timeout: float, as_before: bool = False
) -> ScaleOut:
    """Find places for those indices; PlanError, with what is missing, and nothing is held, when there is none in
    `timeout` seconds after nodes were measured.

    A node that comes up meanwhile is measured then. What is left of lost replicas there is given back first. With
    `as_before` they go where they were, if that is still there, by the plans that they had: nothing is measured, which
    takes about as long as their start.
    """
    running, config = deployment.running, deployment.config
    vacate(runtime, running, replicas)
    if as_before and (again := _as_before(runtime, deployment, replicas, timeout)):
        return ScaleOut(again, [], [], {})
    nodes = _measure(runtime, deployment)
    refused = dict(refused_nodes(nodes, config.params, config.wanted_pages, config.utilization))
    refused |= {node_id: f"node {node_id} is about to go" for node_id in runtime.draining_nodes()}
    if not running:  # later, an autoscaler may start what is missing
        room = sum(replicas_that_fit(node, config.params) for node in nodes if node.node_id not in refused)
        if room < len(replicas):
            reasons = "; ".join(refused.values()) or "the others have too few GPUs"
            raise PlanError(f"{len(replicas)} replica(s) asked for, {room} fit: {reasons}")
    bundles, groups = place_actors(runtime, running, replicas, config.gpus, refused, timeout, deployment.name)
    with ended_on_failure(runtime, (), groups):
        if not {bundle.node_id for bundle in bundles.values()} <= {node.node_id for node in nodes}:
            nodes = _measure(runtime, deployment)  # one of them came up for this
        return ScaleOut(_plan(deployment, bundles, nodes), groups, nodes, refused)


def _as_before(
    runtime: Runtime, deployment: Deployment, replicas: Sequence[int], timeout: float
) -> list[PlannedReplica]:
    """The same plans in the same bundles; none unless all of these are where they were."""
    running = deployment.running
    if not all(r in running and shares_group(running, r) for r in replicas):
        return []
    bundles, _ = place_actors(runtime, running, replicas, deployment.config.gpus, {}, timeout)
    going, epoch = runtime.draining_nodes(), time.time_ns() // 1_000
    if any(b.node_id != running[r].plan.node_id or b.node_id in going for r, b in bundles.items()):
        return []
    return [PlannedReplica(r, epoch + at, running[r].plan, bundle) for at, (r, bundle) in enumerate(bundles.items())]


def _plan(deployment: Deployment, bundles: Mapping[int, Bundle], nodes: Sequence[NodeMemory]) -> list[PlannedReplica]:
    """The plan of each new replica by what its node has free now."""
    config, epoch, running = deployment.config, time.time_ns() // 1_000, deployment.running
    for r, bundle in bundles.items():
        if bundle.node_id not in {node.node_id for node in nodes}:
            raise PlanError(f"node {bundle.node_id}, on which replica {r} was placed, has gone already; try again")
    wanted = config.wanted_pages
    if wanted is None and config.uniform and running:
        wanted = min(handle.plan.pages for handle in running.values())
    node_ids = [bundle.node_id for bundle in bundles.values()]
    plans = plan_replicas(nodes, node_ids, config.params, wanted, config.uniform, config.utilization)
    return [
        PlannedReplica(r, epoch + at, plan, bundle)
        for at, (plan, (r, bundle)) in enumerate(zip(plans, bundles.items(), strict=True))
    ]


def _measure(runtime: Runtime, deployment: Deployment) -> list[NodeMemory]:
    """Nodes now. What Ray was told of a node's memory is less by what the replicas there were planned with."""
    taken: Counter[str] = Counter()
    for handle, state in zip(deployment.handles, deployment.states, strict=False):  # none where one is planned only
        if handle is not None and state != State.lost:
            taken[handle.plan.node_id] += handle.plan.bytes
    return measure_nodes(runtime, disk_dir=disk_dir(deployment.config.params), taken=taken)


def disk_dir(params: KVCacheParams) -> Path | None:
    """The folder of the nodes' disk tiers, if they have any."""
    config = params.kv_connector_config
    return Path(config.disk_offload_dir) if config is not None and config.disk_offload_dir else None


def start_replicas(
    runtime: Runtime, deployment: Deployment, planned: Sequence[PlannedReplica], name: str | None
) -> list[ReplicaHandle]:
    """Start replicas side by side; none is left when one fails.

    A replica that is added has its epoch in its actor's name, as another may have had its index before.
    """
    config = deployment.config
    keyed = config.router_settings((*deployment.pages, *(each.plan.pages for each in planned))).keyed

    def spec(this: PlannedReplica) -> ActorSpec:
        pool = f"{deployment.tiers}-{this.bundle.node_id}"  # one for each node
        sizes, tiers = (this.plan.pages, config.max_batch_size), (config.host_pages, pool)
        more = (config.runtime_checks, this.epoch, *tiers, keyed, config.kv_events)
        arguments = (config.params, this.replica, *sizes, *more)
        later = f"-{this.epoch}" if deployment.handles else ""
        named = f"{name}/replica-{this.replica}{later}" if name else None
        return ActorSpec(
            ReplicaActor, arguments, config.gpus, this.bundle, named, title=f"{deployment.title}/replica-{this.replica}"
        )

    with starting(runtime, map(spec, planned)) as actors:
        calls = {
            f"replica {this.replica}": a.call("facts", control=True) for this, a in zip(planned, actors, strict=True)
        }
        facts: list[ReplicaFacts] = first_answers(runtime, calls, START_SECONDS)
        find_sockets(runtime, {f"replica {this.replica}": a for this, a in zip(planned, actors, strict=True)})
    for this, took in zip(planned, facts, strict=True):
        pages = Component("pages", this.plan.bytes, took.allocated)
        if pages.is_off:
            log.warning("replica %d on %s is not as planned: %s", this.replica, this.plan.host_name, pages)
    return [
        ReplicaHandle(actor, this.bundle, this.epoch, this.plan, took)
        for this, actor, took in zip(planned, actors, facts, strict=True)
    ]
