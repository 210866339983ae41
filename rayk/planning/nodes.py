"""Replicas on nodes: which GPUs each gets, and how many pages; a replica's shards are on one node.

Nodes may differ. Each replica gets what its GPUs can give, or, if `uniform`, all get what the smallest can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayk.errors import PlanError
from rayk.planning.model import Model
from rayk.planning.node_plan import DeviceMemory, NodeMemory
from rayk.planning.plan import MemoryPlan, plan_replica
from rayk.planning.settings import PlanSettings


@dataclass(frozen=True)
class PlacedReplica:
    """One replica on the GPUs of a node, by their indices there."""

    index: int
    node_id: str
    gpus: tuple[int, ...]
    plan: MemoryPlan


@dataclass(frozen=True)
class NodeUse:
    """What a node is used for: replicas by index, or the reason why it has none."""

    node_id: str
    host_name: str
    gpus: int
    replicas: tuple[int, ...]
    reason: str | None


@dataclass(frozen=True)
class ClusterMemoryPlan:
    """All replicas. `typical` is the smallest replica that fits; where none does, the plan that came nearest."""

    replicas: tuple[PlacedReplica, ...]
    nodes: tuple[NodeUse, ...]
    typical: MemoryPlan
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Site:
    """A replica's worth of GPUs on one node, and the plan of a replica there."""

    node: int
    gpus: tuple[DeviceMemory, ...]
    plan: MemoryPlan


def plan_nodes(
    model: Model, settings: PlanSettings, nodes: Sequence[NodeMemory], uniform: bool = False
) -> ClusterMemoryPlan:
    """Place `settings.dp` replicas where they get most pages. PlanError when no node has a GPU at all."""
    sites = _sites(model, settings, nodes)
    fitting = [site for site in sites if site.plan.fits]
    best = sorted(range(len(fitting)), key=lambda i: -fitting[i].plan.pages)[: settings.dp]  # of equal ones the first
    chosen = [fitting[i] for i in sorted(best)]
    plans = [site.plan for site in chosen]
    if uniform and plans:
        pages = min(plan.pages for plan in plans)
        plans = [plan_replica(model, settings, site.gpus, pages) for site in chosen]
    replicas = tuple(
        PlacedReplica(index, nodes[site.node].node_id, tuple(gpu.index for gpu in site.gpus), plan)
        for index, (site, plan) in enumerate(zip(chosen, plans, strict=True))
    )
    uses = [
        _node_use(number, node, settings, sites, {r: s.node for r, s in enumerate(chosen)})
        for number, node in enumerate(nodes)
    ]
    smallest = min((r.plan for r in replicas), key=lambda plan: plan.pages, default=None)
    return ClusterMemoryPlan(
        replicas=replicas,
        nodes=tuple(uses),
        typical=smallest or _nearest(model, settings, nodes, sites),
        problems=_problems(settings, len(fitting), uses, sites),
    )


def _sites(model: Model, settings: PlanSettings, nodes: Sequence[NodeMemory]) -> list[_Site]:
    """Every group of GPUs of a node that a replica needs, those with most free memory together."""
    known: dict[tuple[int, ...], MemoryPlan] = {}  # equal groups share a plan: there may be thousands
    sites = []
    for number, node in enumerate(nodes):
        gpus = sorted(node.gpus, key=lambda gpu: (-gpu.free, gpu.index))
        for start in range(0, len(gpus) - settings.gpus + 1, settings.gpus):
            group = tuple(gpus[start : start + settings.gpus])
            key = tuple(gpu.free for gpu in group)
            if key not in known:
                known[key] = plan_replica(model, settings, group)
            sites.append(_Site(number, group, known[key]))
    return sites


def _node_use(
    number: int, node: NodeMemory, settings: PlanSettings, sites: Sequence[_Site], chosen: dict[int, int]
) -> NodeUse:
    here = tuple(replica for replica, where in chosen.items() if where == number)
    own = [site.plan for site in sites if site.node == number]
    reason = None
    if not own:
        reason = f"it has {len(node.gpus)} GPU(s), a replica needs {settings.gpus} on one node"
    elif not any(plan.fits for plan in own):
        reason = "; ".join(own[0].problems)
    elif not here:
        reason = "not needed: the replicas fit on other nodes"
    return NodeUse(node.node_id, node.host_name, len(node.gpus), here, reason)


def _nearest(model: Model, settings: PlanSettings, nodes: Sequence[NodeMemory], sites: Sequence[_Site]) -> MemoryPlan:
    """A plan to explain what is missing."""
    if sites:
        return max((site.plan for site in sites), key=lambda plan: plan.limit)
    gpus = [gpu for node in nodes for gpu in node.gpus]
    if not gpus:
        raise PlanError(f"none of {len(nodes)} node(s) has a GPU; name one to plan for, such as --gpu h100")
    return plan_replica(model, settings, [max(gpus, key=lambda gpu: gpu.free)] * settings.gpus)


def _problems(settings: PlanSettings, fitting: int, uses: Sequence[NodeUse], sites: Sequence[_Site]) -> tuple[str, ...]:
    if fitting >= settings.dp:
        return ()
    if len(uses) == 1 and sites and not fitting:
        return sites[0].plan.problems
    reasons = [f"{use.host_name}: {use.reason}" for use in uses if use.reason and not use.replicas]
    return (f"{settings.dp} replica(s) asked for, {fitting} fit", *reasons)
