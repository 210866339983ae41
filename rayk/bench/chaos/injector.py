"""Injects faults as a schedule has them, and notes of each who was hit and when it was over.

A thread of its own, so that faults come whatever the benchmark waits for. A fault that can hit nobody at its time (all
replicas are being replaced, the scheduler is away) waits until it can.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import msgspec

from rayk.bench.chaos.disk import damage, fill, freeze
from rayk.bench.chaos.neighbour import Neighbour
from rayk.bench.chaos.nodes import SimulatedNodes
from rayk.bench.chaos.schedule import Planned
from rayk.bench.chaos.targets import Target, cut_one, whole
from rayk.bench.measure import Fault
from rayk.scheduler.membership import State

LOOK_SECONDS = 0.1
SETTLED_SECONDS = 3.0  # a replica that dies sooner counts as one that could not be started
HELD_SECONDS = 3.0  # a disk is slow, or full
PATIENCE_SECONDS = 60.0  # for what is not over when the benchmark is

log = logging.getLogger("rayk.bench")


def _nothing() -> None:
    pass


def _signalled(pid: int, number: signal.Signals) -> bool:
    """Whether there was such a process; what is known of it may be a moment old."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Hit(NamedTuple):
    """Somebody was: `noticed` and `over` look whether that is so, `undo` is what is left to do then."""

    who: str
    over: Callable[[], bool]
    undo: Callable[[], None] = _nothing
    noticed: Callable[[], bool] | None = None


@dataclass
class _Open:
    """A fault that is not over: which of those so far, and its times."""

    number: int
    hit: Hit


class Injector:
    """`folder` is the disk tier's, `clock` counts seconds from the start of the run. A `neighbour` makes another
    driver."""

    def __init__(
        self,
        target: Target,
        planned: Iterator[Planned],
        clock: Callable[[], float],
        folder: Path | None = None,
        nodes: SimulatedNodes | None = None,
        neighbour: Callable[[], Neighbour] | None = None,
    ) -> None:
        self.injected: list[Fault] = []
        self._target, self._planned, self._clock = target, planned, clock
        self._folder, self._nodes, self._make = folder, nodes, neighbour
        self._neighbour: Neighbour | None = None
        self._open: list[_Open] = []
        self._ready_since: dict[int, float] = {}  # by process
        self._doomed: set[int] = set()  # processes
        self._cut: set[int] = set()  # sockets
        self._ending = Event()
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="rayk-chaos", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self._make is not None:
            self._neighbour = self._make()
        self._thread.start()

    def stop(self) -> list[Fault]:
        """No more faults; those that are not over are waited for. All that there were. Raises what went wrong here."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._neighbour is not None:
            self._neighbour.kill()
        if self._error is not None:
            raise self._error
        return self.injected

    # -- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            waiting, due = deque[Planned](), next(self._planned)
            while not self._ending.wait(LOOK_SECONDS):
                self._look()
                while due.at <= self._clock():
                    waiting.append(due)
                    due = next(self._planned)
                for _ in range(len(waiting)):
                    planned = waiting.popleft()
                    if not self._inject(planned):
                        waiting.append(planned)
            until = self._clock() + PATIENCE_SECONDS
            while self._open and self._clock() < until:
                self._look()
                Event().wait(LOOK_SECONDS)
        except Exception as error:
            self._error = error
        finally:
            for each in self._open:
                each.hit.undo()

    def _look(self) -> None:
        """Note what is over, and since when replicas are ready."""
        for each in list(self._open):
            fault, seconds = self.injected[each.number], self._clock() - self.injected[each.number].at
            if fault.noticed_s is None and each.hit.noticed is not None and each.hit.noticed():
                fault = msgspec.structs.replace(fault, noticed_s=seconds)
            if each.hit.over():
                each.hit.undo()
                self._open.remove(each)
                fault = msgspec.structs.replace(fault, recovered_s=seconds)
            self.injected[each.number] = fault
        if self._nodes is not None:
            self._nodes.mend()
        replicas = self._target.replicas()
        if replicas is not None:
            now = self._clock()
            ready = {each.pid for each in replicas if each.state == State.ready}
            self._ready_since = {pid: self._ready_since.get(pid, now) for pid in ready}

    def _inject(self, planned: Planned) -> bool:
        """Whether there was somebody to be hit."""
        act: dict[str, Callable[[int], Hit | None]] = {
            "kill-replica": lambda draw: self._hit_replica(draw, signal.SIGKILL),
            "hang-replica": lambda draw: self._hit_replica(draw, signal.SIGSTOP),
            "kill-scheduler": self._kill_scheduler,
            "kill-driver": self._kill_driver,
            "kill-node": self._kill_node,
            "cut-socket": self._cut_socket,
            "corrupt-disk": self._damage,
            "slow-disk": lambda draw: self._hold("frozen", freeze),
            "fill-disk": lambda draw: self._hold("full", fill),
        }
        at = self._clock()
        hit = act[planned.kind](planned.draw)
        if hit is None:
            return False
        log.info("chaos: %s: %s", planned.kind, hit.who)
        self._open.append(_Open(len(self.injected), hit))
        self.injected.append(Fault(kind=planned.kind, at=at, target=hit.who))
        return True

    # -- the faults --------------------------------------------------------------------------------------

    def _hit_replica(self, draw: int, number: signal.Signals) -> Hit | None:
        now, replicas = self._clock(), self._target.replicas() or []
        settled = [
            (r, each.pid)
            for r, each in enumerate(replicas)
            if each.state == State.ready
            and each.pid not in self._doomed
            and now - self._ready_since.get(each.pid, now) >= SETTLED_SECONDS
        ]
        if not settled:
            return None
        replica, pid = settled[draw % len(settled)]
        self._doomed.add(pid)
        if not _signalled(pid, number):
            return None

        def over() -> bool:
            here = self._target.replicas()
            return here is not None and here[replica].state == State.ready and here[replica].pid != pid

        def noticed() -> bool:
            here = self._target.replicas()
            return here is not None and here[replica] != (State.ready, pid)

        def undo() -> None:  # one that was not taken out must not stay behind
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)

        return Hit(f"replica {replica}, process {pid}", over, undo if number == signal.SIGSTOP else _nothing, noticed)

    def _kill_scheduler(self, draw: int) -> Hit | None:
        pid = self._target.scheduler()
        if pid is None or pid in self._doomed:
            return None
        self._doomed.add(pid)
        if not _signalled(pid, signal.SIGKILL):
            return None
        return Hit(f"process {pid}", lambda: self._target.scheduler() not in (None, pid))

    def _kill_driver(self, draw: int) -> Hit | None:
        neighbour = self._neighbour
        if neighbour is None or not neighbour.up.is_set():
            return None
        before = self._target.drivers()
        if before is None:
            return None
        neighbour.kill()
        self._neighbour = None

        def over() -> bool:
            now = self._target.drivers()
            return now is not None and now < before

        def undo() -> None:
            if self._make is not None and not self._ending.is_set():
                self._neighbour = self._make()

        return Hit(f"process {neighbour.pid}", over, undo)

    def _kill_node(self, draw: int) -> Hit | None:
        """Not before all replicas are there: the next one would take what the last one left."""
        if self._nodes is None or not whole(self._target.replicas()):
            return None
        gone = self._nodes.kill(draw)
        self._doomed |= gone
        self._nodes.add()  # as an autoscaler would

        def over() -> bool:
            here = self._target.replicas()
            return here is not None and whole(here) and not gone & {each.pid for each in here}

        return Hit(f"a node and its {len(gone)} processes", over, noticed=lambda: not whole(self._target.replicas()))

    def _cut_socket(self, draw: int) -> Hit | None:
        """Over when there is another one, or nothing is sent there any more."""
        cut = cut_one(draw, self._cut)
        if cut is None:
            return None
        self._cut.add(cut.inode)
        who = f"socket {cut.fd}, {cut.way} the actor at {Path(cut.path).name}"
        return Hit(who, lambda: cut.mended or self._ending.is_set(), noticed=lambda: cut.closed)

    @property
    def _held(self) -> bool:
        """Whether the disk is frozen or full: one thing at a time, as this thread would wait for itself."""
        return any(self.injected[each.number].kind in ("slow-disk", "fill-disk") for each in self._open)

    def _damage(self, draw: int) -> Hit | None:
        if self._folder is None or self._held:
            return None
        done = damage(self._folder, draw)
        return Hit(f"{done} files", lambda: True) if done else None

    def _hold(self, how: str, begin: Callable[[Path], Callable[[], None]]) -> Hit | None:
        """The disk is frozen or full for a while."""
        if self._folder is None or self._held:
            return None
        end, until = begin(self._folder), self._clock() + HELD_SECONDS
        return Hit(f"{self._folder} is {how}", lambda: self._clock() >= until, end)
