"""One manager's running actors: what was wanted, and a handle of each replica. The scheduler keeps it for drivers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rayk.actors.interface import Actor, ActorAwayError, ActorGoneError, Runtime
from rayk.actors.launch import PlacedActor, close_actors, proof_for, stop_actors, vacate
from rayk.actors.replica import ReplicaFacts
from rayk.actors.secret import Lock
from rayk.errors import SchedulerLostError
from rayk.params import KVCacheParams
from rayk.planning.node_plan import NodeMemory, ReplicaPlan, uses_cuda
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.kv_events import KVEventsConfig
from rayk.scheduler.membership import State
from rayk.scheduler.router.router import RouterSettings

AWAY_SECONDS = 0.05  # between two looks whether a scheduler is back
CLOSE_SECONDS = 30.0  # to write out what is on its way to the tiers


def await_roster(runtime: Runtime, scheduler: Actor, seconds: float) -> Deployment:
    """The latest deployment, as its scheduler knows it; one that was lost and begins anew is waited for.
    SchedulerLostError when it is gone for good, or not there within so many seconds; SecretError when it has another
    secret than the runtime's."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(0.0, deadline - time.monotonic())
            proof = proof_for(runtime, scheduler, left)
            deployment = runtime.get(scheduler.call("roster", proof, control=True), "the scheduler", left)
            assert isinstance(deployment, Deployment)
            return deployment
        except ActorAwayError as error:
            if time.monotonic() >= deadline:
                raise SchedulerLostError(f"{error}; it was not back within {seconds:.0f} s") from None
            time.sleep(AWAY_SECONDS)
        except ActorGoneError as error:
            raise SchedulerLostError(str(error)) from None


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
    kv_events: KVEventsConfig | None = None  # where replicas publish what they cache
    replace: bool = True  # lost replicas are replaced

    @property
    def gpus(self) -> int:
        """Of each replica."""
        return self.params.tensor_parallel_degree if uses_cuda(self.params) else 0

    def router_settings(self, pages: tuple[int, ...]) -> RouterSettings:
        """What the scheduler places requests by, on replicas of so many pages."""
        params = self.params
        return RouterSettings(
            self.router,
            pages,
            params.page_size,
            params.page_hash_algo,
            params.kv_hash_seed or b"",
            params.enable_prefix_caching,
            admission=self.admission,
            page_transport=params.page_transport,
            offers=params.offers_pages,
        )


@dataclass(frozen=True)
class ReplicaHandle(PlacedActor):
    """A replica that runs in its bundle by `plan`; `facts` is what it took."""

    epoch: int
    plan: ReplicaPlan
    facts: ReplicaFacts


@dataclass(frozen=True)
class Deployment:
    """`handles[r]` is replica r, None where there is none any more. Immutable: each change makes another one.

    `nodes` as they were measured last; those `refused` at the start, for a reason each. `tiers` names the nodes' host
    pools, `name` the detached actors, if they are that. `version`, `joined` and `states` are those of the scheduler's
    Membership. `started_here`: by this driver; `lock`: what it was locked with.
    """

    config: DeploymentConfig
    nodes: tuple[NodeMemory, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    handles: tuple[ReplicaHandle | None, ...] = ()
    tiers: str = ""
    name: str | None = None
    scheduler: Actor | None = None
    scheduler_epoch: int = 0
    version: int = 1
    joined: int = 1
    states: tuple[str, ...] = ()
    started_here: bool = False
    lock: Lock | None = None

    @property
    def title(self) -> str:
        """What its actors' titles begin with."""
        return f"rayk-{self.tiers[-8:]}"

    @property
    def key(self) -> str:
        """Under which the scheduler has kept what a successor needs."""
        return f"{self.name or ''}/{self.tiers}"

    @property
    def running(self) -> dict[int, ReplicaHandle]:
        """The replicas that were not removed, by index."""
        return {r: handle for r, handle in enumerate(self.handles) if handle is not None}

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of the running replicas."""
        return tuple(handle.epoch for handle in self.running.values())

    @property
    def facts(self) -> tuple[ReplicaFacts, ...]:
        """Of the running replicas."""
        return tuple(handle.facts for handle in self.running.values())

    @property
    def pages(self) -> tuple[int, ...]:
        """Of each index, 0 for a removed replica."""
        return tuple(handle.plan.pages if handle is not None else 0 for handle in self.handles)

    def with_replica(self, replica: int, handle: ReplicaHandle | None, nodes: Sequence[NodeMemory] = ()) -> Deployment:
        """The same with another replica, or none, at that index; `nodes` were measured for it."""
        handles = [*self.handles, *[None] * (replica + 1 - len(self.handles))]
        handles[replica] = handle
        measured = {node.node_id: node for node in (*self.nodes, *nodes)}
        return replace(self, handles=tuple(handles), nodes=tuple(measured.values()))

    def with_states(self, version: int, joined: int, states: tuple[str, ...]) -> Deployment:
        """The same as of that version."""
        return replace(self, version=version, joined=joined, states=states)

    def differences(self, wanted: DeploymentConfig) -> str:
        """The settings in which a manager that attaches wants something else."""
        config, params, pages = self.config, wanted.params, wanted.wanted_pages
        if params.kv_hash_seed is None:
            params = replace(params, kv_hash_seed=config.params.kv_hash_seed)
        same = {
            "params": params == config.params,
            "total_num_pages": pages is None or {each.plan.pages for each in self.running.values()} <= {pages},
            "max_batch_size": wanted.max_batch_size == config.max_batch_size,
            "router": wanted.router == config.router,
            "uniform": wanted.uniform == config.uniform,
            "total_num_host_pages": wanted.host_pages == config.host_pages,
            "admission": wanted.admission == config.admission,
            "kv_events": wanted.kv_events == config.kv_events,
            "replace": wanted.replace == config.replace,
        }
        return ", ".join(what for what, is_same in same.items() if not is_same)

    def stop(self, runtime: Runtime) -> None:
        """End all actors and give all placement groups back; returns when they are gone. Tiers are written out."""
        self._close_tiers(runtime, self.running)
        stop_actors(runtime, self.running.values(), others=() if self.scheduler is None else (self.scheduler,))
        runtime.keep(self.key, None)

    def stop_replica(self, runtime: Runtime, replica: int) -> None:
        """End a replica that was removed, and give its place back."""
        if replica in self.running:
            self._close_tiers(runtime, [replica])
            vacate(runtime, self.running, [replica])

    def _close_tiers(self, runtime: Runtime, replicas: Iterable[int]) -> None:
        """Of those replicas whose processes answered when the states were reported last."""
        if self.config.params.kv_connector != "null":
            answering = [self.running[r].actor for r in replicas if self.states[r : r + 1] != (State.silent,)]
            close_actors(runtime, answering, CLOSE_SECONDS)
