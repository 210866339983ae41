"""What a driver says and does to add, drain and remove replicas.

The driver plans, places and starts the actors, as at the start of a cluster; the scheduler keeps the books. It hears
first that indices are wanted, then that their replicas start, and at last that they take requests.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from time import monotonic, sleep

from rayk import protocol as m
from rayk.actors.deployment import ReplicaHandle
from rayk.actors.launch import stop_actors
from rayk.actors.scale_out import ScaleOut, plan_scale_out, start_replicas
from rayk.errors import DrainError, SchedulerLostError
from rayk.manager.cluster_view import Script, current, off_loop, result_of
from rayk.manager.placing_calls import PlacingCalls
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad

LOOK_SECONDS = 0.02  # between two looks at a replica that drains


class ScalingCalls(PlacingCalls):
    """`_name` is that of the cluster's detached actors, if they are that."""

    _name: str | None

    @current
    def add_replicas(self, count: int, timeout: float) -> Script[list[int]]:
        """Start `count` more replicas; their indices. Whatever fails, nothing is left behind."""
        enlisted: m.Enlisted = yield from self._ask(self.scheduler, m.Enlist(count))
        replicas, joined = enlisted.replicas, list[int]()
        new, handles = ScaleOut([], [], [], {}), list[ReplicaHandle]()
        try:
            yield from self.catch_up()  # others may have come meanwhile
            cluster, name = self.cluster, self._name
            new = yield from off_loop(lambda: plan_scale_out(self._runtime, cluster, replicas, timeout))
            for r in replicas:
                yield from self._ask(self.scheduler, m.Starting(r))
            handles = yield from off_loop(lambda: start_replicas(self._runtime, cluster, new.planned, name))
            for r, handle in zip(replicas, handles, strict=True):
                join = m.Join(r, handle.epoch, handle.plan.pages)
                [reply] = yield [self.scheduler.send(join, [handle, tuple(new.nodes)])]
                result_of(reply)
                joined.append(r)
        except BaseException:
            yield from self._take_back([r for r in replicas if r not in joined], new, handles)
            raise
        return replicas

    def _take_back(self, replicas: list[int], new: ScaleOut, handles: list[ReplicaHandle]) -> Script[None]:
        """Stop what was started for those indices and let go of them."""
        joined = {each.epoch: each.bundle.placement for each in new.planned if each.replica not in replicas}
        actors = [handle.actor for handle in handles if handle.epoch not in joined]
        groups = [group for group in new.groups if group not in joined.values()]
        yield from off_loop(lambda: stop_actors(self._runtime, (), groups, actors))
        with suppress(SchedulerLostError):
            for r in replicas:
                yield from self._ask(self.scheduler, m.GiveUp(r))

    @current
    def drain_replica(self, replica: int, deadline: float | None, handover: bool) -> Script[Drained]:
        """Give the replica no new requests; wait up to `deadline` seconds for those it has, then hand them over."""
        until = monotonic() + (deadline or 0.0)
        while True:
            late = deadline is not None and monotonic() >= until
            command = m.DrainReplica(replica, self._take_released(), late and handover)
            done: m.Drained = yield from self._ask(self.scheduler, command)
            if not done.left or deadline is None:
                return Drained(sorted(done.left), done.moved)
            if late:
                raise DrainError(replica, done.left)
            yield from off_loop(partial(sleep, min(LOOK_SECONDS, max(0.0, until - monotonic()))))

    @current
    def resume_replica(self, replica: int) -> Script[None]:
        """Let it take requests again."""
        yield from self._ask(self.scheduler, m.ResumeReplica(replica))

    @current
    def remove_replica(self, replica: int) -> Script[Removed]:
        """Forget a replica, then end its process and give its place back; what became of its pages."""
        yield from self.catch_up()
        cluster = self.cluster
        done: m.RemoveDone = yield from self._ask(self.scheduler, m.RemoveReplica(replica))
        self.link(replica).close_lane()  # while its other end runs
        yield from off_loop(lambda: cluster.stop_replica(self._runtime, replica))
        return Removed(done.cached, done.known, done.taken)

    @current
    def replica_loads(self) -> Script[list[ReplicaLoad]]:
        """How each index stands and what it carries."""
        known: m.Description = yield from self._ask(self.scheduler, m.Describe(self._take_released()))
        columns = (known.states, known.requests, known.waiting, known.held, known.capacity)
        return [ReplicaLoad(r, *load) for r, load in enumerate(zip(*columns, strict=True))]
