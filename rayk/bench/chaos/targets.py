"""What there is to be hit: the processes of a manager or of a Cluster, and this process's sockets to actors.

Asked from a thread of their own, while the benchmark is at work; what cannot be asked now is None.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

import psutil

from rayk import protocol as m
from rayk.actors.channel import ActorChannel, new_client_id
from rayk.actors.deployment import Deployment, await_roster
from rayk.actors.interface import ActorGoneError
from rayk.actors.listener import socket_folder
from rayk.errors import RaykError, SchedulerLostError
from rayk.manager.calls import Calls
from rayk.scheduler.membership import State

if TYPE_CHECKING:
    from rayk.actors.serving_link import SchedulerLink
    from rayk.cluster import Cluster
    from rayk.manager.manager import PagedKVCacheManager

ASK_SECONDS = 5.0
WAYS = (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)
NAMES = ("from", "to", "from and to")


class Replica(NamedTuple):
    """One index: how it stands, and its process."""

    state: str
    pid: int


class Left(NamedTuple):
    """Pages in use on a replica, and requests that are claimed there; -1 where nobody says."""

    pages: int
    requests: int


UNKNOWN = Left(-1, -1)


class Target(Protocol):
    """What is measured, as the injector sees it."""

    def replicas(self) -> list[Replica] | None:
        """Each index."""
        ...

    def scheduler(self) -> int | None:
        """The scheduler's process."""
        ...

    def drivers(self) -> int | None:
        """Drivers that have a lease."""
        ...

    def left(self) -> list[Left]:
        """Of each index. Of the benchmark's own thread."""
        ...


class LocalTarget:
    """Whatever runs in this process: there is a disk, and nothing else to be hit."""

    def replicas(self) -> list[Replica] | None:
        return None

    def scheduler(self) -> int | None:
        return None

    def drivers(self) -> int | None:
        return None

    def left(self) -> list[Left]:
        return []


class ManagerTarget:
    """A manager on Ray."""

    def __init__(self, manager: PagedKVCacheManager) -> None:
        calls = manager._all()
        assert isinstance(calls, Calls)
        self._manager = manager
        self._calls, self._runtime = calls, calls._runtime

    def _roster(self) -> Deployment | None:
        try:
            return await_roster(self._runtime, self._calls.scheduler.actor, ASK_SECONDS)
        except RaykError:
            return None

    def replicas(self) -> list[Replica] | None:
        roster = self._roster()
        if roster is None:
            return None
        running = roster.running
        return [Replica(state, running[r].facts.pid if r in running else 0) for r, state in enumerate(roster.states)]

    def scheduler(self) -> int | None:
        try:
            return self._calls.scheduler_pid()
        except (RaykError, ActorGoneError):
            return None

    def drivers(self) -> int | None:
        if (roster := self._roster()) is None:
            return None
        actor, epoch, me = self._calls.scheduler.actor, roster.scheduler_epoch, new_client_id("chaos")
        line = ActorChannel(
            self._runtime, actor, "the scheduler", epoch, me, SchedulerLostError, ASK_SECONDS, sockets=False
        )
        try:
            known: m.Description = line.ask(m.Describe())
        except RaykError:
            return None
        return known.clients

    def left(self) -> list[Left]:
        found = [UNKNOWN] * self._calls.indices
        with suppress(RaykError):
            for r, load in enumerate(self._manager.replica_loads()):
                found[r] = Left(self._manager.get_num_used_pages(r), load.requests)
        return found


class ClusterTarget:
    """A Cluster on Ray."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def replicas(self) -> list[Replica] | None:
        states = self._cluster.replica_states()
        return [Replica(state, facts.pid) for state, facts in zip(states, self._cluster.facts, strict=False)]

    @property
    def _link(self) -> SchedulerLink:
        from rayk.dispatch.named import NamedDispatcher

        dispatcher = self._cluster._dispatcher
        assert isinstance(dispatcher, NamedDispatcher)
        return dispatcher._link

    def scheduler(self) -> int | None:
        try:
            return self._link.pid()
        except RaykError:
            return None

    def drivers(self) -> int | None:
        try:
            return len(self._link.state().drivers)
        except RaykError:
            return None

    def left(self) -> list[Left]:
        found = [UNKNOWN] * len(self._cluster.facts)
        for r in range(len(found)):
            with suppress(RaykError, ActorGoneError):
                stats = self._cluster.stats(r)
                found[r] = Left(stats.pages - stats.free_pages, stats.running + stats.waiting)
        return found


def whole(replicas: Sequence[Replica] | None) -> bool:
    """Whether all of them take requests."""
    return replicas is not None and all(replica.state == State.ready for replica in replicas)


class CutSocket(NamedTuple):
    """A socket of this process to the actor that listens at `path`, which was shut down."""

    fd: int
    inode: int
    path: str
    way: str

    @property
    def closed(self) -> bool:
        """Whether its owner has noticed."""
        try:
            return os.stat(f"/proc/self/fd/{self.fd}").st_ino != self.inode
        except OSError:
            return True

    @property
    def mended(self) -> bool:
        """Whether there is another one to that actor, or the actor is gone."""
        if not self.closed:
            return False
        pid = os.path.basename(self.path).partition("-")[0]
        return not psutil.pid_exists(int(pid)) or self.path in (path for _, _, path in _sockets())


def cut_one(draw: int, before: Collection[int] = ()) -> CutSocket | None:
    """Shut one of this process's sockets to actors down, in one direction or both; none whose inode was cut before."""
    found = sorted(each for each in _sockets() if each[1] not in before)
    if not found:
        return None
    (fd, inode, path), way = found[draw % len(found)], draw // len(found) % len(WAYS)
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as end:
        end.shutdown(WAYS[way])
        return CutSocket(fd, inode, path, NAMES[way])
    return None


def _sockets() -> list[tuple[int, int, str]]:
    """This process's sockets to actors: file descriptors, inodes, and where the actors listen."""
    folder, found = str(socket_folder()), list[tuple[int, int, str]]()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            there = os.stat(f"/proc/self/fd/{name}")
            if stat.S_ISSOCK(there.st_mode) and (path := _peer(int(name))).startswith(folder):
                found.append((int(name), there.st_ino, path))
    return found


def _peer(fd: int) -> str:
    """The file to which a Unix socket is connected, "" for another socket."""
    with socket.socket(fileno=os.dup(fd)) as end:
        return str(end.getpeername()) if end.family == socket.AF_UNIX else ""
