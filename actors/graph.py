"""The life of a lane over a compiled graph: opened, watched, rested, taken down, all on a thread of its own.

Each of these steps waits for the actor, which may be at work, hung or dying, and the driver must not. Ray must not be
shut down while such a thread still waits, because that aborts the process; end() sees to it. No Ray here: what is done
to a graph is behind Graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any, Protocol

log = logging.getLogger("rayk.actors")

OPEN_SECONDS = 15.0  # for the first answer of a graph that compiled
SEND_SECONDS = 10.0  # for the actor to take a message, and beyond the time that was given for its answer
REST_SECONDS = 5.0  # without a message: then the graph is taken down, as it keeps cores busy
LOOK_SECONDS = 0.5  # between two looks at the clock
CLOSE_SECONDS = 2.0  # for all threads to end by themselves
KILL_SECONDS = 30.0  # for those whose actors were killed


class LaneError(Exception):
    """A lane did not open, did not carry a message, or brought no answer; the argument says why."""


class Graph(Protocol):
    """A compiled graph of one call of one actor. Any error of send() and get() is a LaneError."""

    def open(self, timeout: float) -> None:
        """Compile it, and have something come back within `timeout` seconds after that."""
        ...

    def send(self, wire: bytes) -> Any:
        """Send a message; what get() takes."""
        ...

    def get(self, ref: Any, timeout: float) -> bytes:
        """The answer, which can be had once."""
        ...

    def close(self) -> None:
        """Have send() and get() fail at once, and return when the actor has let go."""
        ...

    def kill(self) -> None:
        """End the actor, and with it whatever waits for it."""
        ...


class GraphLane:
    """One message at a time through a graph. `owner` is whom it is opened for, see living()."""

    def __init__(self, graph: Graph, owner: object = None, clock: Callable[[], float] = monotonic) -> None:
        self._graph = graph
        self.owner = owner
        self._clock = clock
        self._lock = Lock()  # of the next five
        self._open = False
        self._trouble = ""
        self._used = clock()  # when something went through
        self._under_way = False  # a message whose answer was not there yet
        self._due = inf  # when what the driver waits for in Ray must be over
        self._ended = Event()
        self._rested = False
        self._thread = Thread(target=self._live, name="rayk-lane", daemon=True)
        _living.add(self)
        self._thread.start()

    @property
    def rested(self) -> bool:
        """Whether it was taken down because nothing was said: another one may be opened."""
        return self._rested

    @property
    def open(self) -> bool:
        """Whether it carries messages now."""
        return self._open

    def send(self, wire: bytes) -> Any:
        """Send a message; what get() takes, or None while it is not open: then nothing was sent. LaneError when it did
        not open, or when the message may have arrived or not."""
        with self._lock:
            if self._trouble:
                raise LaneError(self._trouble)
            if not self._open:
                return None
            self._under_way, self._due = True, self._clock() + SEND_SECONDS
        try:
            return self._graph.send(wire)
        except LaneError as error:
            raise LaneError(self._trouble or str(error)) from None
        finally:
            self._due = inf

    def get(self, ref: Any, timeout: float) -> bytes:
        """The answer, which can be had once. LaneError when it did not come."""
        self._due = self._clock() + timeout + SEND_SECONDS
        try:
            answer = self._graph.get(ref, timeout)
        except LaneError as error:
            raise LaneError(self._trouble or str(error)) from None
        finally:
            self._due = inf
        self._used, self._under_way = self._clock(), False
        return answer

    def close(self) -> None:
        """Have it taken down, and do not wait for that."""
        self._ended.set()
        with self._lock:
            self._open = False

    def join(self, timeout: float) -> bool:
        """Whether it has been taken down within so many seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def kill(self) -> None:
        """End its actor."""
        with suppress(Exception):  # it may be dead
            self._graph.kill()

    # -- the thread ------------------------------------------------------------------------------------

    def _live(self) -> None:
        trouble = ""
        try:
            self._graph.open(OPEN_SECONDS)
            with self._lock:
                self._open, self._used = not self._ended.is_set(), self._clock()
            while not (self._ended.wait(LOOK_SECONDS) or self._over()):
                pass
        except Exception as error:  # Ray names none for an actor that has a graph already, or that does not answer
            trouble = str(error) or type(error).__name__
        with self._lock:
            self._trouble = self._trouble or trouble
        with suppress(Exception):  # nothing is to be had of it any more
            self._graph.close()
        self._rested = not self._trouble
        _living.discard(self)

    def _over(self) -> bool:
        """Whether to take it down: the driver is stuck in it, which Ray does not limit, or nobody needs it now."""
        with self._lock:
            now = self._clock()
            if now > self._due:
                self._trouble = "the replica does not take what is sent"
            elif self._under_way or now - self._used <= REST_SECONDS:
                return False
            self._open = False
            return True


_living: set[GraphLane] = set()  # of this process


def living(owner: object = None) -> list[GraphLane]:
    """Lanes that were not taken down yet, of one owner or of all."""
    return [lane for lane in list(_living) if owner is None or lane.owner is owner]


def end(lanes: Iterable[GraphLane]) -> None:
    """Take those lanes down and wait for it; actors that hold it up are killed."""
    left = list(lanes)
    for lane in left:
        lane.close()
    left = _after(left, CLOSE_SECONDS)
    for lane in left:
        lane.kill()
    left = _after(left, KILL_SECONDS)
    if left:
        log.error("%d fast lane(s) still wait for actors that were killed: Ray may abort this process", len(left))


def _after(lanes: Iterable[GraphLane], seconds: float) -> list[GraphLane]:
    """Those that were not taken down in so many seconds."""
    until = monotonic() + seconds
    return [lane for lane in lanes if not lane.join(max(0.0, until - monotonic()))]
