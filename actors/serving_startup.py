"""A named Cluster's start: engines, then their scheduler, or what runs under that name already. Whatever fails, nothing
is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields

from rayk.actors.engine import LOAD_SECONDS, OPEN_SECONDS
from rayk.actors.interface import Actor, ActorSpec, NameTakenError, Runtime
from rayk.actors.launch import START_SECONDS, ended_on_failure, first_answers, starting
from rayk.actors.named_engines import NamedReplicas
from rayk.actors.serving import ANSWERS_LANE, DRIVERS, ServingActor
from rayk.actors.serving_roster import ServingRoster, serving_key
from rayk.errors import ConfigError, PlanError
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.serving.recovery import KeptServing

OWN = ("device", "hash_seed", "reset_token", "vllm_metrics")
"""Settings in which a driver that attaches may differ."""


def cluster_name(name: str) -> str:
    """What the actors of the Cluster of a session are called by."""
    return f"{name}/cluster"


def find_serving(runtime: Runtime, name: str) -> Actor | None:
    """The scheduler of the Cluster of that session, if one runs."""
    return runtime.find(f"{cluster_name(name)}/scheduler")


def start_serving(
    runtime: Runtime, name: str, replicas: NamedReplicas, routing: Callable[[NamedReplicas], RouterSettings]
) -> Actor | None:
    """Start the engines and their scheduler, which is returned; None when another driver was first."""
    try:
        replicas.start()
    except NameTakenError:
        return None
    settings, handles = replicas.settings, tuple(replicas.handles[r] for r in sorted(replicas.handles))
    roster = ServingRoster(
        cluster_name(name),
        replicas.packed(),
        replicas.model_name,
        routing(replicas),
        settings.tiers.wanted,
        settings.replaced,
        handles,
        lock=runtime.secret.lock() if runtime.secret is not None else None,
    )
    starts = [handle.start for handle in handles]
    key = serving_key(roster.name)
    runtime.keep(key, KeptServing(roster, starts, ["ready"] * len(starts)))
    placed = list(handles)
    with ended_on_failure(runtime, [each.actor for each in placed], [each.bundle.placement for each in placed]):
        spec = ActorSpec(
            ServingActor,
            (key,),
            name=f"{cluster_name(name)}/scheduler",
            lanes=(ANSWERS_LANE,),
            lane_threads=DRIVERS,
            restarts=True,
            home=runtime.home(detached=True),
        )
        with starting(runtime, [spec]) as [scheduler]:
            first_answers(runtime, {"the scheduler": scheduler.call("ping", control=True)}, START_SECONDS)
    return scheduler


def await_serving(runtime: Runtime, name: str) -> Actor:
    """The scheduler that another driver is about to start; PlanError when none comes."""
    deadline = time.monotonic() + LOAD_SECONDS + OPEN_SECONDS
    while time.monotonic() < deadline:
        if (running := find_serving(runtime, name)) is not None:
            return running
        if runtime.find(f"{cluster_name(name)}/engine-0") is None:
            break
        time.sleep(0.05)
    raise PlanError(
        f"another driver began to start the Cluster {name!r} and did not come to its end; end what is left of its "
        "actors, or use another name"
    )


def check_same(roster: ServingRoster, replicas: NamedReplicas, routing: RouterSettings) -> None:
    """ConfigError names the settings in which a driver that attaches wants something else."""
    served, wanted = roster.served, replicas.settings
    given = served.settings
    names = [each.name for each in fields(wanted) if each.name not in OWN]
    differing = [each for each in names if getattr(wanted, each) != getattr(given, each)]
    for what, one, other in (
        ("model", str(replicas.source), str(served.source)),
        ("max_retries", replicas.max_retries, served.max_retries),
        ("router", routing.router, roster.routing.router),
        ("admission", routing.admission, roster.routing.admission),
    ):
        if one != other:
            differing.append(what)
    if differing:
        raise ConfigError(
            f"{roster.name!r} runs with other settings: {', '.join(differing)}; use the same, attach() without any, or "
            "shut it down first"
        )
