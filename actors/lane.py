"""A driver's fast lane to one replica: small messages past Ray's calls, by a compiled graph in shared memory.

It opens beside the first messages, which go by calls until it has, rests when nothing is said, and is given up for
good, with one warning, whenever anything is wrong with it; whoever uses it goes on with calls. It carries one message
at a time. `python tests/measure/fast_lane.py` measures what it gains and costs.
"""

from __future__ import annotations

import logging
from typing import Any

from rayk import protocol as m
from rayk.actors.chunks import LONGEST
from rayk.actors.graph import LaneError
from rayk.actors.interface import Actor, Lane, LaneState, Runtime

log = logging.getLogger("rayk.actors")

SPOKEN = (m.RunTick, m.Step, m.Execute)  # what a decode loop says; all of them bear numbers


class Crossing:
    """A message on its way by a lane. What arrived is `answer`; `call` is a reference to the answer of the same
    message sent again by a call, once the lane has brought none."""

    __slots__ = ("answer", "call", "ref", "wire")

    def __init__(self, wire: bytes, ref: Any) -> None:
        self.wire = wire
        self.ref = ref
        self.answer: bytes | None = None
        self.call: Any = None


class FastLane:
    """The lane to `actor`, which is `target` in messages and runs on that node."""

    def __init__(self, runtime: Runtime, actor: Actor, node_id: str, target: str) -> None:
        self._runtime = runtime
        self._actor = actor
        self._node_id = node_id
        self._target = target
        self._lane: Lane | None = None
        self._closed = False
        self._reason = ""
        self._messages = 0

    @property
    def closed(self) -> bool:
        """Whether it carries nothing any more."""
        return self._closed

    def state(self, replica: int) -> LaneState:
        """How it stands, as the lane to that replica."""
        lane = self._lane
        if self._closed:
            state = "closed"
        elif lane is None:
            state = "unused"
        else:
            state = "open" if lane.open else "resting" if lane.rested else "opening"
        return LaneState(replica, state, self._reason, self._messages)

    def send(self, wire: bytes) -> Crossing | None:
        """Send a message; None when it has to go by a call. After a failure it may have arrived all the same."""
        if self._closed or len(wire) > LONGEST:
            return None
        try:
            if self._lane is None or self._lane.rested:
                self._lane = self._runtime.open_lane(self._actor, self._node_id)
            ref = self._lane.send(wire)
        except LaneError as error:
            self.give_up(str(error))
            return None
        except BaseException:  # nobody knows how far it got
            self.close("it was interrupted")
            raise
        if ref is None:
            return None
        self._messages += 1
        return Crossing(wire, ref)

    def receive(self, crossing: Crossing, timeout: float) -> None:
        """Wait for the answer; there is none when it is too long for a lane, and when the lane failed or is late, and
        then it is closed."""
        if self._lane is None:
            return
        try:
            crossing.answer = self._lane.get(crossing.ref, timeout) or None
        except LaneError as error:
            self.give_up(str(error))

    def give_up(self, reason: str) -> None:
        """Close it, and say why, once."""
        if not self._closed:
            log.warning("the fast lane to %s is closed (%s): going on with calls", self._target, reason)
            self.close(reason)

    def close(self, reason: str = "it is not needed any more") -> None:
        """Take it down; nothing is sent by it from now on."""
        if not self._closed:
            self._closed, self._reason = True, reason
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()
