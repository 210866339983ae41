"""A manager's start in the one order that cannot fail late: measure, place, plan, replicas, scheduler. A manager of a
name attaches to what runs under it. Whatever fails, nothing is left behind."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from rayk.actors.deployment import Deployment, DeploymentConfig, await_roster
from rayk.actors.interface import Actor, ActorSpec, NameTakenError, Runtime
from rayk.actors.launch import (
    PLACE_SECONDS,
    START_SECONDS,
    ended_on_failure,
    find_sockets,
    first_answers,
    starting,
    tier_seed,
)
from rayk.actors.scale_out import disk_dir, plan_scale_out, start_replicas
from rayk.actors.scheduler import LANES, SchedulerActor
from rayk.errors import ConfigError, PlanError
from rayk.scheduler.recovery import Kept
from rayk.scheduler.router.policies import check_router
from rayk.tiers.identity import named


def start_deployment(runtime: Runtime, config: DeploymentConfig, name: str | None) -> Deployment:
    """Start everything, or attach to what runs under `name`; PlanError or ConfigError otherwise."""
    check_router(config.router)  # a wrong name is refused before anything starts
    running = runtime.find(f"{name}/scheduler") if name is not None else None
    if name is None or running is None:
        try:
            return _start(runtime, config, name)
        except NameTakenError:  # another driver starts it right now
            assert name is not None
            running = _await_scheduler(runtime, name)
    return _attach(runtime, running, config, name)


def _await_scheduler(runtime: Runtime, name: str) -> Actor:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        running = runtime.find(f"{name}/scheduler")
        if running is not None:
            return running
        time.sleep(0.05)
    raise PlanError(
        f"replicas of {name!r} exist, but no scheduler came up within {START_SECONDS:.0f} s: the driver that started "
        f"them may have died half-way; `rayk down {name.rpartition('/')[0]}` removes what is left"
    )


def _attach(runtime: Runtime, scheduler: Actor, config: DeploymentConfig, name: str) -> Deployment:
    """The deployment that runs under `name`, if it is what was asked for."""
    deployment = await_roster(runtime, scheduler, START_SECONDS)
    differing = deployment.differences(config)
    if differing:
        raise ConfigError(f"{name!r} runs with other settings: {differing}; use the same, or shut it down first")
    find_sockets(runtime, {"the scheduler": scheduler})
    return replace(deployment, scheduler=scheduler)


def _start(runtime: Runtime, config: DeploymentConfig, name: str | None) -> Deployment:
    params = named(config.params)
    if params.kv_hash_seed is None:
        params = replace(params, kv_hash_seed=tier_seed(runtime, disk_dir(params)))
    tiers = f"{time.time_ns() // 1_000}-{os.urandom(8).hex()}"
    lock = runtime.secret.lock() if runtime.secret is not None else None
    deployment = Deployment(replace(config, params=params), tiers=tiers, name=name, lock=lock)
    first = plan_scale_out(runtime, deployment, range(params.data_parallel_degree), PLACE_SECONDS)
    actors: list[Actor] = []
    with ended_on_failure(runtime, actors, first.groups):
        handles = start_replicas(runtime, deployment, first.planned, name)
        actors += [handle.actor for handle in handles]
        return _start_scheduler(
            runtime,
            replace(deployment, handles=tuple(handles), nodes=tuple(first.nodes), refused=first.refused),
            name,
        )


def _start_scheduler(runtime: Runtime, deployment: Deployment, name: str | None) -> Deployment:
    config, epoch = deployment.config, time.time_ns() // 1_000
    deployment = replace(deployment, scheduler_epoch=epoch, states=("ready",) * len(deployment.handles))
    settings, copies = config.router_settings(deployment.pages), config.params.copies_prefixes
    runtime.keep(deployment.key, Kept(deployment, list(deployment.epochs), list(deployment.states)))
    arguments = (epoch, (), (), settings, copies, deployment.key)
    named, home = f"{name}/scheduler" if name else None, runtime.home(detached=name is not None)
    spec = ActorSpec(
        SchedulerActor,
        arguments,
        name=named,
        threads=LANES,
        restarts=True,
        home=home,
        title=f"{deployment.title}/scheduler",
    )
    try:
        with starting(runtime, [spec]) as [scheduler]:
            first_answers(runtime, {"the scheduler": scheduler.call("ping", control=True)}, START_SECONDS)
            find_sockets(runtime, {"the scheduler": scheduler})
    except BaseException:
        runtime.keep(deployment.key, None)
        raise
    return replace(deployment, scheduler=scheduler, started_here=True)
