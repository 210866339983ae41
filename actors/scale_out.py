"""More replicas for a cluster that runs: nodes are measured, a place is asked for, what fits there is planned.

Every added replica has a placement group of its own, so that Ray's autoscaler sees the request while it waits, and so
that its resources go back when it is removed. A lost replica's successor takes its bundle, if that belongs to a group
that others use, too. Starting the actors is start_replicas(), as at the start of the cluster.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rayk.actors.interface import Placement, Runtime
from rayk.actors.launch import Deployment, Place, ReplicaHandle, bundle_of, close_tiers, measure_nodes
from rayk.errors import PlanError
from rayk.planning.node_plan import NodeMemory, plan_replica, refused_nodes, uses_cuda
from rayk.scheduler.membership import State


class Placed(NamedTuple):
    """Where replicas are to start; `groups` are those that were made for them; `nodes` as they were measured."""

    places: list[Place]
    groups: list[Placement]
    nodes: list[NodeMemory]


def place_replicas(runtime: Runtime, cluster: Deployment, replicas: Sequence[int], timeout: float) -> Placed:
    """Find places for those indices; PlanError, with what is missing, and nothing is held, when there is none in
    `timeout` seconds after nodes were measured.

    A node that comes up meanwhile is measured then. What is left of lost replicas there is given back first.
    """
    for seat in [cluster.seats[r] for r in replicas if r < len(cluster.seats)]:
        if seat is not None:
            runtime.stop([seat.actor], None if _shared(cluster, seat) else seat.placement)
    config = cluster.config
    nodes = _measure(runtime, cluster)
    refused = refused_nodes(nodes, config.params, config.wanted_pages, config.utilization)
    deadline = time.monotonic() + timeout
    bundles: dict[int, tuple[Placement, int]] = {}
    for r in replicas:
        old = cluster.seats[r] if r < len(cluster.seats) else None
        if old is not None and _shared(cluster, old):
            bundles[r] = runtime.await_place(old.placement, deadline - time.monotonic()), old.bundle
    alone = [r for r in replicas if r not in bundles]
    wanted = [bundle_of(config.params)] * len(alone)
    try:
        groups = runtime.place_each(wanted, list(refused), max(0.0, deadline - time.monotonic())) if alone else []
    except PlanError as error:
        why = "; ".join(refused.values())
        raise PlanError(f"{error}; left out: {why}" if why else str(error)) from None
    bundles |= {r: (group, 0) for r, group in zip(alone, groups, strict=True)}
    try:
        where = {r: placement.node_ids[bundle] for r, (placement, bundle) in bundles.items()}
        if not set(where.values()) <= {node.node_id for node in nodes}:
            nodes = _measure(runtime, cluster)  # one of them came up for this
        return Placed(_plan(cluster, replicas, bundles, where, nodes), groups, nodes)
    except BaseException:
        give_back(runtime, groups)
        raise


def _plan(
    cluster: Deployment,
    replicas: Sequence[int],
    bundles: dict[int, tuple[Placement, int]],
    where: dict[int, str],
    nodes: Sequence[NodeMemory],
) -> list[Place]:
    """The plan of each new replica by what its node has free now."""
    config, epoch = cluster.config, time.time_ns() // 1_000
    by_id, sharing = {node.node_id: node for node in nodes}, Counter(where.values())
    wanted = config.wanted_pages
    if wanted is None and config.uniform and cluster.there:
        wanted = min(seat.plan.pages for seat in cluster.there)
    places = []
    for at, r in enumerate(replicas):
        placement, bundle = bundles[r]
        together = 1 if uses_cuda(config.params) else sharing[where[r]]
        if where[r] not in by_id:
            raise PlanError(f"node {where[r]}, on which replica {r} was placed, has gone already; try again")
        plan = plan_replica(by_id[where[r]], config.params, wanted, together, config.utilization)
        places.append(Place(r, epoch + at, plan, placement, bundle))
    return places


def _measure(runtime: Runtime, cluster: Deployment) -> list[NodeMemory]:
    """Nodes now. What Ray was told of a node's memory is less by what the replicas there were planned with."""
    taken: Counter[str] = Counter()
    for seat, state in zip(cluster.seats, cluster.states, strict=False):  # nobody is yet where it is planned
        if seat is not None and state != State.lost:
            taken[seat.plan.node_id] += seat.plan.bytes
    disk = cluster.config.params.kv_connector_config
    return measure_nodes(runtime, str(disk.disk_offload_dir) if disk and disk.disk_offload_dir else None, taken)


def _shared(cluster: Deployment, seat: ReplicaHandle) -> bool:
    """Whether other replicas that are there use the same placement group."""
    return any(other is not seat and other.placement.group is seat.placement.group for other in cluster.there)


def give_back(runtime: Runtime, groups: Sequence[Placement]) -> None:
    """Give placement groups back."""
    for group in groups:
        runtime.stop((), group)


def vacate(runtime: Runtime, cluster: Deployment, replica: int) -> None:
    """End the process of a replica that was removed, and give its placement back unless others use it."""
    seat = cluster.seats[replica]
    if seat is not None:
        close_tiers(runtime, cluster.config, [seat.actor] if cluster.answers(replica) else [])
        runtime.stop([seat.actor], None if _shared(cluster, seat) else seat.placement)
