"""What a driver says and does to add, drain and remove replicas; rayk.manager.starter starts them."""

from __future__ import annotations

from functools import partial
from time import monotonic, sleep

from msgspec import structs

from rayk import protocol as m
from rayk.actors.deployment import Deployment
from rayk.actors.interface import Runtime
from rayk.errors import DrainError, RaykError, ReplicaRemovedError
from rayk.manager.cluster_view import Script, began_anew, current, off_loop
from rayk.manager.placing_calls import PlacingCalls
from rayk.manager.starter import Starter
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad
from rayk.scheduler.supervisor import Replacement

LOOK_SECONDS = 0.02  # between two looks at a replica that drains


class ScalingCalls(PlacingCalls):
    """Calls about replicas that come and go."""

    def __init__(self, runtime: Runtime, cluster: Deployment) -> None:
        super().__init__(runtime, cluster)
        self._removing: dict[int, Deployment] = {}  # as it was when that began
        self._starter = Starter(runtime, cluster, self.client)
        if cluster.config.replace:
            self._starter.keep()

    @current
    def add_replicas(self, count: int, timeout: float) -> Script[list[int]]:
        """Start `count` more replicas; their indices. Whatever fails, nothing is left behind."""
        replicas = yield from off_loop(lambda: self._starter.add(count, timeout))
        try:
            yield from self.catch_up()
        except RaykError as error:
            if not began_anew(error):
                raise
            yield from self.rejoin(error, self.scheduler.epoch)  # here, or they would be added again
        return replicas

    @current
    def replacements(self) -> Script[list[Replacement]]:
        """What is done about lost replicas."""
        known: m.Description = yield from self._ask(self.scheduler, m.Describe(self._take_released()))
        return [Replacement(*structs.astuple(each)) for each in known.replacements if known.target is not None]

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
        begun = self._removing.pop(replica, None)  # with a scheduler that was lost meanwhile
        self._removing[replica] = cluster = begun or self.cluster
        try:
            done: m.RemoveDone = yield from self._ask(self.scheduler, m.RemoveReplica(replica))
        except ReplicaRemovedError:
            if begun is None:
                del self._removing[replica]
                raise
            done = m.RemoveDone()
        except RaykError as error:
            if not began_anew(error):
                del self._removing[replica]
            raise
        del self._removing[replica]
        if (link := self._links[replica]) is not None:
            link.close()
        yield from off_loop(lambda: cluster.stop_replica(self._runtime, replica))
        return Removed(done.cached, done.known, done.taken)

    @current
    def replica_loads(self) -> Script[list[ReplicaLoad]]:
        """How each index stands and what it carries."""
        known: m.Description = yield from self._ask(self.scheduler, m.Describe(self._take_released()))
        columns = (known.states, known.requests, known.waiting, known.held, known.capacity)
        return [ReplicaLoad(r, *load) for r, load in enumerate(zip(*columns, strict=True))]
