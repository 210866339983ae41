"""Scripts of the scheduler that engines answer: each call is a Query, its reply comes with the reports of its engine.

So what the router is told of pages, which comes before it in the same reports, is never older than what a script knows.
The scheduler of a Cluster runs evacuations so, a driver the copies of its requests' prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Iterator
from typing import Any, NamedTuple

from rayk import protocol as m
from rayk.errors import ReplicaLostError
from rayk.protocol.engine import Command, Query, Report
from rayk.scheduler.script import ReplicaCall, ReplicaReply

Rounds = Generator[list[ReplicaCall], list[ReplicaReply], Any]


class _Script:
    """A script under way, what came of its round, and replicas that were lost since it began: others in their place
    are not meant."""

    def __init__(self, key: Hashable, rounds: Rounds, on_end: Callable[[Any], None]) -> None:
        self.key = key
        self.rounds = rounds
        self.on_end = on_end
        self.replies: list[ReplicaReply | None] = []
        self.lost: set[int] = set()


class _Asked(NamedTuple):
    """A call, and its place in the round of `script`."""

    script: _Script
    row: int
    call: ReplicaCall


class EngineScripts:
    """Its owner's, in its turn. `live()` are the replicas that answer; queries get their `numbers` from what no other
    scripts take any from."""

    def __init__(
        self, post: Callable[[int, Command], None], live: Callable[[], Collection[int]], numbers: Iterator[int]
    ) -> None:
        self._post = post
        self._live = live
        self._running: dict[Hashable, _Script] = {}
        self._asked: dict[int, _Asked] = {}  # by the number of its query
        self._numbers = numbers

    def start(self, key: Hashable, rounds: Rounds, on_end: Callable[[Any], None] = lambda result: None) -> None:
        """Run a script, known by `key` until its result goes to `on_end`: maybe at once."""
        script = self._running[key] = _Script(key, rounds, on_end)
        self._advance(script, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._running

    def __len__(self) -> int:
        return len(self._running)

    def give_up(self, key: Hashable) -> None:
        """Run a script no further, if it is under way; what comes late for it is taken back."""
        self._running.pop(key, None)

    def on_report(self, report: Report) -> None:
        """Replies that came."""
        for answered in report.answered:
            self._reply(answered.number, ReplicaReply(answered.result, answered.data))

    def lose(self, replica: int) -> None:
        """A replica is gone: it will not answer."""
        for script in self._running.values():
            script.lost.add(replica)
        for number in [number for number, asked in self._asked.items() if asked.call.replica == replica]:
            self._reply(number, _lost(replica))

    def _reply(self, number: int, reply: ReplicaReply) -> None:
        asked = self._asked.pop(number, None)
        if asked is None:
            return
        script = asked.script
        if self._running.get(script.key) is script:
            script.replies[asked.row] = reply
            self._advance(script, script.replies)
        elif asked.call.late is not None:
            for call in asked.call.late(reply.result):
                self._send(script, 0, call)

    def _advance(self, script: _Script, replies: list[ReplicaReply | None] | None) -> None:
        """The next rounds, as far as there are replies."""
        while replies is None or None not in replies:
            try:
                calls = script.rounds.send(replies)  # type: ignore[arg-type]  # nothing at first, then none of it is None
            except StopIteration as end:
                del self._running[script.key]
                script.on_end(end.value)
                return
            replies = script.replies = [self._send(script, row, call) for row, call in enumerate(calls)]

    def _send(self, script: _Script, row: int, call: ReplicaCall) -> ReplicaReply | None:
        """Post a call; its reply, where that is known already."""
        if call.replica in script.lost or call.replica not in self._live():
            return _lost(call.replica)
        done = isinstance(call.command, m.Acknowledge | m.DropLines)  # nobody needs to know when
        number = 0 if done else next(self._numbers)
        if not done:
            self._asked[number] = _Asked(script, row, call)
        self._post(call.replica, Query(number, call.command, list(call.attached)))  # type: ignore[arg-type]  # nothing else is asked of engines
        return ReplicaReply(m.Done()) if done else None


def _lost(replica: int) -> ReplicaReply:
    return ReplicaReply(m.failure(ReplicaLostError(replica, 0, [], "it is gone")))
