"""A model served under a name: what was started and where, as any driver needs it to attach.

The scheduler keeps it and looks at little of it: what it would need torch for travels packed.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from rayk.actors.interface import Actor, Runtime
from rayk.actors.launch import PlacedActor, close_actors, stop_actors
from rayk.actors.secret import Lock
from rayk.protocol.admission import AdmissionState
from rayk.protocol.from_replica import LineState
from rayk.protocol.lines import PathState
from rayk.scheduler.router.router import RouterSettings
from rayk.transport.choice import Endpoint

if TYPE_CHECKING:
    from rayk.engine.replicas import ModelSource, ReplicaFacts, ServeSettings
    from rayk.engine.tiers import NodeTiers


CLOSE_SECONDS = 60.0  # to write what is on its way to disk


def serving_key(name: str) -> str:
    """Under which the scheduler of the Cluster of that name has kept what a successor needs."""
    return f"{name}/serving"


@dataclass(frozen=True)
class ServedModel:
    """What is served, and how; unpacked by drivers only. `settings` and `max_retries` as they were asked for at the
    start; `seed` names pages, `tiers` are what the nodes' replicas share, `pool` names their host memory."""

    source: ModelSource
    settings: ServeSettings
    max_retries: int
    tokenizer: Any
    seed: bytes | None
    tiers: dict[str, NodeTiers]
    pool: str

    def packed(self, runtime: Runtime) -> bytes:
        """As Ray pickles it: functions by reference where the other side can import them."""
        return runtime.dumps(self)


@dataclass(frozen=True)
class EngineHandle(PlacedActor):
    """An engine that runs in its bundle since `start`, with so many pages; `epoch` and `endpoint` are its peers' for
    it, `packed` are its ReplicaFacts."""

    start: int
    pages: int
    epoch: int
    endpoint: Endpoint | None
    packed: bytes

    @property
    def facts(self) -> ReplicaFacts:
        """What it is; loads what engines are made of."""
        facts: ReplicaFacts = pickle.loads(self.packed)  # packed by a driver of this Cluster
        return facts


@dataclass(frozen=True)
class ServingRoster:
    """`handles[r]` is replica r, None where there is none; `version` and `states` are those of the scheduler's
    Membership. `model` is a packed ServedModel, `model_name` for people."""

    name: str
    model: bytes
    model_name: str
    routing: RouterSettings
    shares_tiers: bool
    replaced: bool  # lost engines are
    handles: tuple[EngineHandle | None, ...]
    version: int = 1
    states: tuple[str, ...] = ()
    reset_token: bytes | None = None  # of the last reset of the prefix cache
    scheduler: Actor | None = None
    lock: Lock | None = None  # what it was locked with
    life: int = 0  # when the scheduler's process began, in microseconds

    @property
    def running(self) -> dict[int, EngineHandle]:
        """The engines that were not removed, by index."""
        return {r: handle for r, handle in enumerate(self.handles) if handle is not None}

    @property
    def served(self) -> ServedModel:
        """The model, unpacked."""
        served: ServedModel = pickle.loads(self.model)  # packed by the driver that started the Cluster
        return served

    def stop(self, runtime: Runtime) -> None:
        """End all engines, whose tiers are written out, and give their places back. Their scheduler is gone already, or
        would take them for lost."""
        running = self.running.values()
        if self.shares_tiers:
            close_actors(runtime, [handle.actor for handle in running], CLOSE_SECONDS)
        stop_actors(runtime, running)
        runtime.keep(serving_key(self.name), None)

    def with_engine(self, replica: int, handle: EngineHandle | None) -> ServingRoster:
        """The same with another engine, or none, at that index."""
        handles = [*self.handles, *[None] * (replica + 1 - len(self.handles))]
        handles[replica] = handle
        return replace(self, handles=tuple(handles))


class ServingState(msgspec.Struct, frozen=True):
    """What a scheduler knows at a moment: by driver number its name and how many of its requests wait and are placed;
    by replica how many are there, and why one was lost last; `paths` carry what the scheduler and engines say."""

    drivers: dict[int, tuple[str, int, int]]
    owner: str
    requests: list[int]
    why_lost: str
    admission: AdmissionState | None = None
    lines: list[LineState] = []
    paths: dict[int, PathState] = {}
