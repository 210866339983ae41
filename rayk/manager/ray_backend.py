"""The manager's backend on Ray: every call waits for its answers. What is said to whom is in rayk.manager.calls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from threading import Event, Thread
from typing import Any

import torch

from rayk import protocol as m
from rayk.actors.channel import Traffic
from rayk.actors.interface import ActorGoneError, LaneState, Runtime
from rayk.actors.launch import Deployment
from rayk.context import TextContext
from rayk.errors import CallTimeoutError, InsufficientBlocksError, NotOwnerError, RaykError, SchedulerLostError
from rayk.kvcache.connector import TierCount
from rayk.kvcache.iteration import Batches, Forward
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.request import Usage
from rayk.kvcache.runtime_inputs import BatchCharacteristics, ReplicaInputs
from rayk.kvcache.tick import Admission, HitCounts, Tick, TickResult
from rayk.manager.calls import Calls
from rayk.manager.cluster_view import wait_for
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad

log = logging.getLogger("rayk.scheduler")

CLOSING_SECONDS = 5.0  # for which a scheduler may not answer a driver that leaves
OWNER_SECONDS = 5.0
LEASE_SECONDS = 15.0  # a driver of a named session that is silent this long has its requests released


class RayBackend:
    """Talks to one running Cluster. With a `name` it outlives this driver, so its claims have a lease.

    `fast_lane`: ticks go by lanes (rayk.actors.lane), unless the cluster has a name: a replica has one lane, not one
    for each driver, and it would stay when its driver is killed.
    """

    def __init__(self, runtime: Runtime, cluster: Deployment, name: str | None, fast_lane: bool = False) -> None:
        self.calls = Calls(runtime, cluster, name)
        self.calls.made = lambda replica: partial(self.alloc, replica=replica)
        self.allocators = self.calls.replicas
        self.allocators.update((r, self.calls.made(r)) for r in list(self.allocators))
        self._runtime = runtime
        self._name = name
        self._stopped = Event()
        if fast_lane and name is not None:
            log.warning("no fast lanes to replicas of a named session, which several drivers share: %r has calls", name)
            self.calls.have_no_lanes("a named session, whose drivers share its replicas")
        elif fast_lane:
            self.calls.lay_lanes()
        if name is not None:
            self.calls.scheduler.ask(m.Connect(LEASE_SECONDS, cluster.started_here))
            Thread(target=self._renew, name="rayk-lease", daemon=True).start()

    @property
    def prefill_rate(self) -> float | None:
        """See Backend."""
        return self.calls.prefill_rate

    @prefill_rate.setter
    def prefill_rate(self, rate: float | None) -> None:
        self.calls.prefill_rate = rate

    def _renew(self) -> None:
        scheduler, had = self.calls.scheduler.actor, True
        while not self._stopped.wait(LEASE_SECONDS / 3):
            try:
                has = self._runtime.get(scheduler.call("renew", self.calls.client, control=True), "the scheduler", 5)
                if had and not has:
                    log.warning("this driver was silent for longer than its lease: what it had claimed is released")
                had = has
            except (RaykError, ActorGoneError):
                continue  # the next call of the driver will say so

    def claim(self, request_id: str, replica: int, dummy: bool = False) -> None:
        wait_for(self.calls.claim(request_id, replica, dummy))

    def contains(self, request_id: str, replica: int) -> bool:
        done: bool = wait_for(self.calls.contains(request_id, replica))
        return done

    def alloc(self, ctx: TextContext, replica: int) -> None:
        wait_for(self.calls.alloc(ctx, replica))

    def release(self, request_id: str, replica: int, force: bool = False) -> None:
        wait_for(self.calls.release(request_id, replica, force))
        if self.calls.queued:
            self.calls.note_released()

    def blocks(self, request_id: str, replica: int) -> list[int]:
        done: list[int] = wait_for(self.calls.blocks(request_id, replica))
        return done

    def alloc_many(self, batches: Batches) -> list[dict[str, InsufficientBlocksError]]:
        done: list[dict[str, InsufficientBlocksError]] = wait_for(self.calls.alloc_many(batches))
        return done

    def try_admit(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, stop_on_error: bool
    ) -> list[Admission]:
        done: list[Admission] = wait_for(self.calls.try_admit(ctxs, replicas, stop_on_error))
        return done

    def enter(self, ctxs: Sequence[TextContext], given_up: Sequence[str]) -> list[tuple[TextContext, Admission]]:
        done: list[tuple[TextContext, Admission]] = wait_for(self.calls.enter(ctxs, given_up))
        return done

    def tick(self, ticks: Sequence[Tick], fn: Forward | None) -> list[TickResult]:
        done: list[TickResult] = wait_for(self.calls.tick(ticks, fn))
        if self.calls.queued:
            self.calls.note_released()
        return done

    def runtime_inputs(
        self, batches: Batches, max_cache_length: int | None, characteristics: BatchCharacteristics | None
    ) -> list[ReplicaInputs]:
        done: list[ReplicaInputs] = wait_for(self.calls.runtime_inputs(batches, max_cache_length, characteristics))
        return done

    def execute(self, batches: Batches, fn: Forward) -> list[Any]:
        done: list[Any] = wait_for(self.calls.execute(batches, fn))
        return done

    def step(self, batches: Batches) -> None:
        wait_for(self.calls.step(batches))

    def traffic(self) -> list[Traffic]:
        """What this driver has sent to each replica and to the scheduler, which comes last, and read from them."""
        return self.calls.traffic()

    def usage(self, replica: int) -> Usage:
        done: Usage = wait_for(self.calls.usage(replica))
        return done

    def used_fraction_after(self, ctx: TextContext, replica: int) -> float:
        done: float = wait_for(self.calls.used_fraction_after(ctx, replica))
        return done

    def hit_counts(self, ctx: TextContext) -> list[HitCounts]:
        done: list[HitCounts] = wait_for(self.calls.hit_counts(ctx))
        return done

    def metrics(self) -> KVCacheMetrics:
        done: KVCacheMetrics = wait_for(self.calls.metrics())
        return done

    def reset_metrics(self) -> None:
        wait_for(self.calls.reset_metrics())

    def reset_prefix_cache(self, token: bytes | None) -> dict[int, int]:
        done: dict[int, int] = wait_for(self.calls.reset_prefix_cache(token))
        return done

    def read_pages(self, page_ids: Sequence[int], replica: int) -> list[torch.Tensor]:
        done: list[torch.Tensor] = wait_for(self.calls.read_pages(page_ids, replica))
        return done

    def tier_count(self, replica: int) -> TierCount:
        done: TierCount = wait_for(self.calls.tier_count(replica))
        return done

    def poll_transfers(self) -> None:
        wait_for(self.calls.poll_transfers())

    def drain(self) -> None:
        wait_for(self.calls.drain())

    def check_integrity(self) -> list[int]:
        done: list[int] = wait_for(self.calls.check_integrity())
        return done

    def buffers(self, replica: int) -> list[torch.Tensor]:
        return self.calls.buffers(replica)

    @property
    def _cluster(self) -> Deployment:
        return self.calls.cluster

    def node_names(self) -> list[str]:
        return [seat.plan.host_name if seat is not None else "" for seat in self._cluster.seats]

    def replica_pids(self) -> list[int]:
        """The process of each replica that is there, on its node."""
        return [facts.pid for facts in self._cluster.facts]

    def scheduler_pid(self) -> int:
        """The scheduler's process, on its node."""
        pid: int = self._runtime.get(self.calls.scheduler.actor.call("pid", control=True), "the scheduler", 5)
        return pid

    # -- who is there ------------------------------------------------------------------------------

    @property
    def indices(self) -> int:
        return self.calls.indices

    def look(self) -> None:
        """Take note of who came and left by other drivers."""
        if self._name is not None:
            wait_for(self.calls.catch_up())

    def add_replicas(self, count: int, timeout: float) -> list[int]:
        done: list[int] = wait_for(self.calls.add_replicas(count, timeout))
        return done

    def drain_replica(self, replica: int, deadline: float | None, handover: bool) -> Drained:
        done: Drained = wait_for(self.calls.drain_replica(replica, deadline, handover))
        return done

    def resume_replica(self, replica: int) -> None:
        wait_for(self.calls.resume_replica(replica))

    def remove_replica(self, replica: int) -> Removed:
        done: Removed = wait_for(self.calls.remove_replica(replica))
        return done

    def lane_states(self) -> list[LaneState]:
        return self.calls.lane_states()

    def replica_loads(self) -> list[ReplicaLoad]:
        done: list[ReplicaLoad] = wait_for(self.calls.replica_loads())
        return done

    def holder(self, request_id: str) -> int | None:
        return self.calls.holder(request_id)

    def check_owned(self) -> None:
        """NotOwnerError when another driver started the cluster and still uses it."""
        if self._name is None or self._cluster.started_here:
            return
        scheduler = self.calls.scheduler.actor
        try:
            owner = self._runtime.get(scheduler.call("owner", control=True), "the scheduler", OWNER_SECONDS)
        except ActorGoneError:
            return  # without a scheduler the cluster is of no use to anybody
        if owner:
            raise NotOwnerError(self._name, owner)

    def close(self) -> None:
        self._stopped.set()
        self.calls.scheduler.quiet = CLOSING_SECONDS
        with suppress(RaykError):  # a dead or silent scheduler cannot say who came or left
            self.look()
        self.calls.have_no_lanes("shut down")
        self._cluster.stop(self._runtime)

    def leave(self) -> None:
        self._stopped.set()
        self.calls.scheduler.quiet = CLOSING_SECONDS
        with suppress(SchedulerLostError, CallTimeoutError):  # nothing is left to be released, or the lease ends
            self.calls.scheduler.ask(m.Disconnect())
