"""A snapshot of the Cluster that runs under a name: its model, replicas, drivers and queue."""

from __future__ import annotations

from typing import Any

import msgspec

from rayk import protocol as m
from rayk.actors.describe import TierState
from rayk.actors.interface import ActorGoneError, Runtime
from rayk.actors.serving_link import SchedulerLink
from rayk.actors.serving_roster import EngineHandle, ServingState
from rayk.actors.serving_startup import find_serving
from rayk.errors import CallTimeoutError, RaykError
from rayk.protocol.admission import AdmissionState
from rayk.protocol.lines import PathState
from rayk.scheduler.membership import State

ASK_SECONDS = 10.0


class EngineState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One replica. `requests` are placed there by the scheduler, `running` have pages; `path` carries what those two
    tell each other. What a lost one cannot answer is absent, for that `reason`."""

    index: int
    state: str
    node: str = ""
    pages: int | None = None
    requests: int | None = None
    running: int | None = None
    free_pages: int | None = None
    generated_tokens: int | None = None
    reason: str | None = None
    waiting: int | None = None  # there
    cached_pages: int | None = None  # of the free ones
    prompt_tokens: int | None = None
    reused_tokens: dict[str, int] = {}  # of these, by tier
    preemptions: int | None = None
    tiers: TierState | None = None
    path: PathState | None = None


class DriverState(msgspec.Struct, frozen=True):
    """One driver: how many of its requests wait for a place, and how many have one."""

    name: str
    waiting: int
    placed: int
    owner: bool


class ClusterState(msgspec.Struct, frozen=True, omit_defaults=True):
    """A Cluster. `failures` says by index what is wrong with replacements of lost replicas."""

    name: str
    model: str
    router: str
    page_size: int
    replicas: list[EngineState]
    drivers: list[DriverState]
    admission: AdmissionState | None = None
    lines: list[m.LineState] = []
    failures: dict[int, str] = {}


def describe_cluster(runtime: Runtime, name: str) -> ClusterState | None:
    """The Cluster of the sessions called `name`; None where there is none."""
    scheduler = find_serving(runtime, name)
    if scheduler is None:
        return None
    link = SchedulerLink(runtime, scheduler)
    roster, known, missing = link.roster(), link.state(), link.replacements()
    replicas = []
    for replica, state in enumerate(roster.states):
        handle = roster.running.get(replica)
        if state != State.removed:
            replicas.append(_engine(runtime, replica, state, handle, known))
    return ClusterState(
        name=roster.name,
        model=roster.model_name,
        router=roster.routing.router,
        page_size=roster.routing.page_size,
        replicas=replicas,
        drivers=[
            DriverState(client, waiting, placed, client == known.owner)
            for client, waiting, placed in known.drivers.values()
        ],
        admission=known.admission,
        lines=known.lines,
        failures={each.replica: f"{each.reason} ({each.failures} in a row)" for each in missing},
    )


def explain_in_cluster(runtime: Runtime, name: str, request_id: str) -> m.Explained | None:
    """Why a request of any driver went where it went; None where there is no Cluster. ConfigError when no decision for
    it is remembered."""
    scheduler = find_serving(runtime, name)
    return SchedulerLink(runtime, scheduler).explain(request_id) if scheduler is not None else None


def _engine(
    runtime: Runtime, replica: int, state: str, handle: EngineHandle | None, known: ServingState
) -> EngineState:
    if handle is None or state in (State.lost, State.planned, State.starting):
        return EngineState(replica, state, reason=known.why_lost if state == State.lost else None)
    common: dict[str, Any] = {"index": replica, "state": state, "node": handle.bundle.node_id}
    common |= {"pages": handle.pages, "requests": known.requests[replica], "path": known.paths.get(replica)}
    try:
        stats = runtime.get(handle.actor.call("stats", control=True), f"replica {replica}", ASK_SECONDS)
    except (ActorGoneError, CallTimeoutError, RaykError) as error:
        return EngineState(reason=str(error), **common)
    return EngineState(
        running=stats.running,
        free_pages=stats.free_pages,
        generated_tokens=stats.generated_tokens,
        waiting=stats.waiting,
        cached_pages=stats.cached_pages,
        prompt_tokens=stats.prompt_tokens,
        reused_tokens=dict(zip(("device", "peer", "host", "disk"), stats.reused, strict=True)),
        preemptions=stats.preemptions,
        tiers=TierState.of(stats.tiers),
        **common,
    )
