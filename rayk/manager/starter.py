"""A driver's part in starting replicas: those that a caller adds, and those that take the place of lost ones.

The driver plans, places and starts the actors, as at the start of a cluster; the scheduler keeps the books. It hears
first that indices are wanted, or grants those that are due, then that their replicas start, and at last that they take
requests. A thread asks the scheduler several times a second whether a replacement is due; it has a line of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Lock, Thread

from rayk import protocol as m
from rayk.actors.channel import ActorChannel, new_client_id
from rayk.actors.deployment import Deployment, ReplicaHandle, await_roster
from rayk.actors.interface import ActorGoneError, Runtime
from rayk.actors.launch import stop_actors
from rayk.actors.scale_out import ScaleOut, plan_scale_out, start_replicas
from rayk.errors import RaykError, SchedulerLostError, StaleEpochError
from rayk.planning.node_plan import NodeMemory
from rayk.values import told

log = logging.getLogger("rayk.scheduler")

POLL_SECONDS = 0.25
DRIVERS = 8  # that ask so often; of more, each asks less often, and all together as often as these
PLACE_SECONDS = 5.0  # to wait for a place for a replacement at a time
ANSWER_SECONDS = 5.0
AWAY_SECONDS = 30.0  # for a scheduler that was lost


class Starter:
    """Starts replicas of `cluster` for that `driver`; what it was starting is free again when the driver is gone."""

    def __init__(self, runtime: Runtime, cluster: Deployment, driver: str) -> None:
        assert cluster.scheduler is not None
        self._runtime = runtime
        self._driver = driver
        self._scheduler = ActorChannel(
            runtime,
            cluster.scheduler,
            "the scheduler",
            cluster.scheduler_epoch,
            new_client_id("starter"),
            SchedulerLostError,
            sockets=False,
        )
        self._one = Lock()  # starts at a time
        self._granted: list[int] = []  # and not begun
        self._failed: set[int] = set()  # replacements that could not be started the last time
        self._ended = Event()

    def keep(self) -> None:
        """Start replacements from now on, in a thread."""
        Thread(target=self._keep, name="rayk-starter", daemon=True).start()

    def end(self) -> None:
        """Start no more; what is being started is taken back. Returns when that is done."""
        self._ended.set()
        with self._one:
            pass

    def _keep(self) -> None:
        scheduler, pause = self._scheduler.actor, POLL_SECONDS
        while not self._ended.wait(pause):
            try:
                asked = scheduler.call("due", control=True)
                due, drivers = self._runtime.get(asked, "the scheduler", ANSWER_SECONDS)
                pause = POLL_SECONDS * max(1, drivers // DRIVERS)
                if self._granted or due:
                    self._replace()
            except (RaykError, ActorGoneError):
                with suppress(RaykError):  # without a scheduler nobody can be granted anything
                    self._rejoin()
            except Exception:
                log.exception("a lost replica could not be replaced")

    def _replace(self) -> None:
        """Start what is due side by side, as it was before; what failed so by itself, so that it keeps no other away,
        and where there is room now."""
        with self._one:
            self._take_due()
            granted, self._granted = self._granted, []
            together = [replica for replica in granted if replica not in self._failed]
            for replicas in [together, *([replica] for replica in granted if replica in self._failed)]:
                try:
                    if replicas:
                        self._start(replicas, PLACE_SECONDS, as_before=replicas is together)
                        self._failed.difference_update(replicas)
                        log.warning("replica(s) %s were lost and are replaced", replicas)
                except RaykError as error:
                    if not isinstance(error, (SchedulerLostError, StaleEpochError)):  # that is not of the replicas
                        self._failed.update(replicas)
                    log.warning("replica(s) %s were lost and cannot be replaced: %s", replicas, error)

    def _take_due(self) -> None:
        due: m.Enlisted = self._scheduler.ask(m.Replace(self._driver))
        self._granted += due.replicas

    def add(self, count: int, timeout: float) -> list[int]:
        """Start `count` more replicas; their indices. Whatever fails, nothing is left behind."""
        with self._one:
            try:
                return self._add(count, timeout)
            except (SchedulerLostError, StaleEpochError) as error:
                if not self._rejoin():
                    raise error
            return self._add(count, timeout)  # what was begun is taken back

    def _add(self, count: int, timeout: float) -> list[int]:
        enlisted: m.Enlisted = self._scheduler.ask(m.Enlist(count, self._driver))
        self._start(enlisted.replicas, timeout)
        return enlisted.replicas

    def _rejoin(self) -> bool:
        """Go on with the scheduler that is there now; whether it is another one."""
        epoch = await_roster(self._runtime, self._scheduler.actor, AWAY_SECONDS).scheduler_epoch
        began_anew = epoch != self._scheduler.epoch
        if began_anew:
            self._scheduler = self._scheduler.renewed(epoch)
        return began_anew

    def _roster(self) -> Deployment:
        sent = self._scheduler.send(m.GetRoster(), with_data=True)
        cluster: Deployment = self._scheduler.fetch(sent.wait().data)
        return cluster

    def _start(self, replicas: Sequence[int], timeout: float, as_before: bool = False) -> None:
        joined, placeless = list[int](), True
        new, handles = ScaleOut([], [], [], {}), list[ReplicaHandle]()
        try:
            cluster = self._roster()  # others may have come meanwhile
            new = plan_scale_out(self._runtime, cluster, replicas, timeout, as_before)
            placeless = False
            for r in replicas:
                self._scheduler.ask(m.Starting(r))
            handles = start_replicas(self._runtime, cluster, new.planned, cluster.name)
            for r, handle in zip(replicas, handles, strict=True):
                self._join(r, handle, tuple(new.nodes))
                joined.append(r)
        except BaseException as error:
            self._take_back([r for r in replicas if r not in joined], new, handles, error, placeless)
            raise

    def _join(self, replica: int, handle: ReplicaHandle, nodes: tuple[NodeMemory, ...]) -> None:
        """Have it take requests; of a scheduler that began anew meanwhile it is asked for again."""
        join = m.Join(replica, handle.epoch, handle.plan.pages)
        try:
            self._scheduler.send(join, [handle, nodes]).wait()
        except (SchedulerLostError, StaleEpochError):
            if not self._rejoin():
                raise
            self._take_due()
            if replica not in self._granted:
                raise
            self._granted.remove(replica)
            self._scheduler.ask(m.Starting(replica))
            self._scheduler.send(join, [handle, nodes]).wait()

    def _take_back(
        self,
        replicas: list[int],
        new: ScaleOut,
        handles: list[ReplicaHandle],
        error: BaseException,
        placeless: bool,
    ) -> None:
        """Stop what was started for those indices and let go of them."""
        joined = {each.epoch: each.bundle.placement for each in new.planned if each.replica not in replicas}
        actors = [handle.actor for handle in handles if handle.epoch not in joined]
        groups = [group for group in new.groups if group not in joined.values()]
        stop_actors(self._runtime, (), groups, actors)
        with suppress(SchedulerLostError, StaleEpochError):
            for r in replicas:
                self._scheduler.ask(m.GiveUp(r, told(error), placeless))
