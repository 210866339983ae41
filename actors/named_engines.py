"""The engines of a Cluster with a name, as one of its drivers sees them: detached actors, which any driver starts and
ends. Which there are says the scheduler's roster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from rayk.actors.engine import (
    CLOSE_SECONDS,
    REPORTS_LANE,
    EngineActor,
    RayReplicas,
)
from rayk.actors.interface import Actor, ActorSpec, Bundle, Runtime
from rayk.actors.launch import PlacedActor, close_actors, vacate
from rayk.actors.removal import find_strays
from rayk.actors.serving import DRIVERS
from rayk.actors.serving_roster import EngineHandle, ServedModel, ServingRoster, serving_key

if TYPE_CHECKING:
    from rayk.engine.replicas import ModelSource, ReplicaFacts, ServeSettings


class NamedReplicas(RayReplicas):
    """Implements rayk.engine.replicas.Replicas for the driver with that number; engines are called by `name`."""

    def __init__(self, runtime: Runtime, name: str, source: ModelSource, settings: ServeSettings) -> None:
        super().__init__(runtime, source, settings, name)
        self.driver = 0
        self.scheduler: Actor | None = None
        """Ends before its engines, so that it takes none for lost."""
        self.max_retries = 0
        self.handles: dict[int, EngineHandle] = {}
        """By index, those that are known here."""
        self._lock = Lock()
        self._unjoined: set[int] = set()  # started here: until they join, the roster may name others there
        self._there: dict[int, EngineHandle] = {}  # by the last roster
        self._removed: dict[int, PlacedActor] = {}  # by any driver
        self._wanted = settings

    @classmethod
    def of(cls, runtime: Runtime, roster: ServingRoster) -> NamedReplicas:
        """Those that run already."""
        served = roster.served
        settings = replace(served.settings, hash_seed=served.seed)
        replicas = cls(runtime, roster.name, served.source, settings)
        replicas._wanted, replicas._tiers, replicas._pool = served.settings, dict(served.tiers), served.pool
        replicas.max_retries, replicas.tokenizer = served.max_retries, served.tokenizer
        replicas.follow(roster)
        return replicas

    @property
    def source(self) -> ModelSource:
        """Where the model comes from."""
        return self._source

    @property
    def model_name(self) -> str:
        """For people."""
        return str(self._source)

    def packed(self) -> bytes:
        """What other drivers have to know."""
        served = ServedModel(
            self._source,
            self._wanted,
            self.max_retries,
            self.tokenizer,
            self.settings.hash_seed,
            self._tiers,
            self._pool,
        )
        return served.packed(self._runtime)

    def _spec(self, replica: int, bundle: Bundle) -> ActorSpec:
        later = f"-{time.time_ns() // 1_000}" if self._placed or self.handles else ""  # others may have had its index
        arguments = (replica, self._source, self.settings, bundle if self.settings.tp > 1 else None)
        named = f"{self._name}/engine-{replica}{later}"
        lanes = {"lanes": (REPORTS_LANE,), "lane_threads": 1 + DRIVERS}
        return ActorSpec(EngineActor, arguments, self._gpus, bundle, named, **lanes)  # type: ignore[arg-type]  # mypy joins the types

    def add(self, replicas: Sequence[int], timeout: float) -> None:
        while self.facts and len(self.facts) < max(replicas):  # others are starting those before
            self.facts.append(_nobody(len(self.facts), self.facts[0]))
        super().add(replicas, timeout)

    def _enter(self, placed: dict[int, PlacedActor], facts: Sequence[ReplicaFacts]) -> None:
        start = time.time_ns() // 1_000
        with self._lock:
            super()._enter(placed, facts)
            self._unjoined.update(placed)
            for replica, each in placed.items():
                here = self.facts[replica]
                self.handles[replica] = EngineHandle(
                    each.actor,
                    each.bundle,
                    start + replica,
                    here.pages,
                    here.epoch,
                    here.endpoint,
                    self._runtime.dumps(here),
                )

    def joined(self, replica: int) -> None:
        """The roster names what was started here."""
        self._unjoined.discard(replica)

    def follow(self, roster: ServingRoster) -> list[int]:
        """Take note of who runs; the indices of engines that were not known here."""
        self.settings = replace(self.settings, reset_token=roster.reset_token)
        found, running = [], roster.running
        with self._lock:
            self._there = running
            for replica in range(len(roster.handles)):
                if replica in self._unjoined:
                    continue
                handle, known = roster.handles[replica], self.handles.get(replica)
                if handle is None:
                    self.handles.pop(replica, None)
                    if replica in self._placed:
                        self._removed[replica] = self._placed.pop(replica)
                        self._let_go(replica)
                    if replica == len(self.facts):
                        self.facts.append(_nobody(replica, next(iter(running.values())).facts))
                elif known is None or known.start != handle.start:
                    self._let_go(replica)
                    self.handles[replica] = self._placed[replica] = handle
                    self.facts[replica : replica + 1] = [handle.facts]
                    found.append(replica)
        return found

    def drop(self, replica: int) -> None:
        """Nothing: the scheduler ends engines of which it hears nothing."""

    def close(self) -> None:
        if self.scheduler is not None:
            self._runtime.stop([self.scheduler], None)
            self._runtime.keep(serving_key(str(self._name)), None)
        strays = find_strays(self._runtime, str(self._name), "engine", self._placed.values())  # of drivers that died
        super().close()
        strays.end(self._runtime)

    def remove(self, replica: int) -> None:
        with self._lock:
            placed = self._removed.pop(replica, None) or self._placed.pop(replica)
            self.handles.pop(replica, None)
            self._let_go(replica)
            others: dict[int, PlacedActor] = {**self._placed}
            if replica in self._unjoined and replica in self._there:  # another driver's came first, maybe in its place
                others[-1] = self._there[replica]
            self._unjoined.discard(replica)
        close_actors(self._runtime, [placed.actor], CLOSE_SECONDS)
        vacate(self._runtime, others | {replica: placed}, [replica])


def _nobody(replica: int, other: ReplicaFacts) -> ReplicaFacts:
    """At an index where this driver never saw anybody: the model's facts, without a place."""
    return replace(other, replica=replica, node="", device="", epoch=0, endpoint=None, memory=(), pid=0)
