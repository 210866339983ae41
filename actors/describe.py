"""A snapshot of the managers that run under a name: plan, replicas, pages and claims."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from rayk import protocol as m
from rayk.actors.channel import ActorChannel, new_client_id
from rayk.actors.deployment import Deployment, ReplicaHandle, await_roster
from rayk.actors.interface import ActorGoneError, Runtime
from rayk.errors import CallTimeoutError, ConfigError, RaykError, ReplicaLostError, SchedulerLostError
from rayk.kvcache.connector import TierCount
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.planning.node_plan import NodeMemory, ReplicaPlan
from rayk.protocol.admission import AdmissionState
from rayk.scheduler.membership import State
from rayk.scheduler.scaling import Removed

ASK_SECONDS = 10.0


class TierState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The host and disk tier of a replica's node, in pages, shared by its replicas. `trouble`: why one is off."""

    host_pages: int
    host_used: int
    disk_pages: int = 0
    disk_used: int = 0
    trouble: str = ""

    @classmethod
    def of(cls, count: m.TiersDone | TierCount) -> TierState | None:
        """None where there are no tiers."""
        if not count.host_total:
            return None
        return cls(count.host_total, count.host_used, count.disk_total, count.disk_used, count.trouble)


class ReplicaState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One replica. Pages and bytes; what a lost or silent replica cannot answer is absent, for that `reason`."""

    index: int
    node: str
    state: str  # "ready", "draining", "silent" or "lost"
    epoch: int
    devices: tuple[str, ...]
    plan: ReplicaPlan
    allocated_bytes: int
    reason: str | None = None
    pages: int | None = None
    used_pages: int | None = None
    cached_pages: int | None = None
    free_bytes: int | None = None
    peak_bytes: int | None = None
    requests: int | None = None
    tokens: int | None = None
    tiers: TierState | None = None
    promised_pages: int | None = None  # in use or promised, as the admission policy counts them


class ManagerState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One manager. `refused` are nodes on which no replica could be, with the reason."""

    name: str
    router: str
    page_size: int
    bytes_per_page: int
    replicas: list[ReplicaState]
    nodes: tuple[NodeMemory, ...]
    refused: dict[str, str]
    drivers: int
    metrics: KVCacheMetrics | None = None
    admission: AdmissionState | None = None
    coming: dict[int, str] = {}  # indices that are planned or starting
    transport: str = "auto"  # the kind of line that copies were asked to go by
    lines: list[m.LineState] = []
    target: int | None = None  # replicas that are kept
    replacements: list[m.Replacement] = []  # of lost ones that are under way or given up
    removed: dict[int, dict[str, int]] = {}  # by index: pages that were cached there, known to others, taken by them


class Decision(msgspec.Struct, frozen=True):
    """Why a request went where it went: the cheapest candidates with the parts of their costs, in tokens of prefill."""

    request_id: str
    manager: str
    router: str
    replica: int
    tokens: int
    seconds_ago: float
    candidates: list[dict[str, float]]

    @classmethod
    def of(cls, why: m.Explained, request_id: str, manager: str = "") -> Decision:
        """What a router said of the request; of a Cluster's there is no manager."""
        candidates = [dict(zip(why.names, values, strict=True)) for values in why.candidates]
        return cls(request_id, manager, why.router, why.replica, why.tokens, why.seconds_ago, candidates)


def describe(runtime: Runtime, name: str) -> list[ManagerState]:
    """All managers of the sessions called `name`, in the order they were made; ConfigError when there is none."""
    return [_manager(runtime, each, deployment, link) for each, deployment, link in _managers(runtime, name)]


def explain(runtime: Runtime, name: str, request_id: str) -> Decision:
    """Why that request went where it went; ConfigError when no manager of that name remembers it."""
    missing: RaykError | None = None
    for manager, _, link in _managers(runtime, name):
        try:
            why: m.Explained = link.ask(m.Explain(request_id))
        except ConfigError as error:
            missing = error
            continue
        return Decision.of(why, request_id, manager)
    assert missing is not None
    raise missing


def _managers(runtime: Runtime, name: str) -> list[tuple[str, Deployment, ActorChannel]]:
    """Name, deployment and a line to the scheduler of each manager of the sessions called `name`."""
    found: list[tuple[str, Deployment, ActorChannel]] = []
    while (actor := runtime.find(f"{name}/{len(found)}/scheduler")) is not None:
        deployment = await_roster(runtime, actor, ASK_SECONDS)
        link = ActorChannel(
            runtime,
            actor,
            "the scheduler",
            deployment.scheduler_epoch,
            new_client_id("describe"),
            SchedulerLostError,
            sockets=False,
        )
        found.append((f"{name}/{len(found)}", deployment, link))
    if not found:
        raise ConfigError(f"no rayk cluster of the name {name!r} runs here; only sessions with a name can be described")
    return found


def _manager(runtime: Runtime, name: str, deployment: Deployment, scheduler: ActorChannel) -> ManagerState:
    known: m.Description = scheduler.ask(m.Describe())
    replicas = [_replica(runtime, r, handle, known) for r, handle in deployment.running.items()]
    metrics: KVCacheMetrics = scheduler.ask(m.EveryReplica(m.GetMetrics())).metrics
    return ManagerState(
        name=name,
        router=deployment.config.router,
        page_size=deployment.config.params.page_size,
        bytes_per_page=deployment.config.params.bytes_per_page,
        replicas=replicas,
        nodes=deployment.nodes,
        refused=dict(deployment.refused),
        drivers=known.clients,
        metrics=metrics,
        admission=known.admission,
        coming={r: state for r, state in enumerate(known.states) if state in (State.planned, State.starting)},
        transport=known.transport,
        lines=known.lines,
        target=known.target,
        replacements=known.replacements if known.target is not None else [],
        removed={r: Removed(each.cached, each.known, each.taken)._asdict() for r, each in known.removed.items()},
    )


def _replica(runtime: Runtime, r: int, handle: ReplicaHandle, known: m.Description) -> ReplicaState:
    plan, facts, actor, epoch = handle.plan, handle.facts, handle.actor, handle.epoch
    common: dict[str, Any] = {
        "index": r,
        "node": plan.host_name,
        "epoch": epoch,
        "devices": facts.devices,
        "plan": plan,
        "allocated_bytes": facts.allocated,
    }
    lost = partial(ReplicaLostError, r, epoch, [])
    if known.states[r] == State.silent:
        return ReplicaState(state=State.silent, reason="its process does not answer", **common)
    try:
        client = new_client_id("describe")
        link = ActorChannel(runtime, actor, f"replica {r}", epoch, client, lost, ASK_SECONDS, sockets=False)
        usage: m.UsageDone = link.ask(m.GetUsage())
        tiers: m.TiersDone = link.ask(m.GetTiers())
        now = runtime.get(actor.call("facts", control=True), f"replica {r}", ASK_SECONDS)
    except ReplicaLostError as error:
        return ReplicaState(state=State.lost, reason=error.reason, **common)
    except CallTimeoutError as error:
        return ReplicaState(state=known.states[r], reason=str(error), **common)
    except (RaykError, ActorGoneError) as error:
        return ReplicaState(state=State.lost, reason=str(error), **common)
    return ReplicaState(
        state=known.states[r],
        pages=usage.total,
        used_pages=usage.total - usage.free,
        cached_pages=usage.cached,
        free_bytes=now.free,
        peak_bytes=now.peak,
        requests=known.requests[r],
        tokens=known.tokens[r],
        tiers=TierState.of(tiers),
        promised_pages=known.levels[r] if known.levels else None,
        **common,
    )
