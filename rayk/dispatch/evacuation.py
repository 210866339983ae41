"""Engines that go offer what they have cached to the others: the scheduler's script
(rayk.scheduler.transfers.evacuation), of which each question is a command and each answer comes with the reports of its
engine. So what the router is told of pages, which comes before it in the same reports, is never older than what the
script knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any

from rayk import protocol as m
from rayk.errors import ReplicaLostError
from rayk.protocol.engine import Command, Query, Report
from rayk.scheduler.scaling import Removed

if TYPE_CHECKING:
    from rayk.scheduler.router.steering import Steering
    from rayk.scheduler.script import ReplicaCall, ReplicaReply


class _Talk:
    """A script under way, and what is known of the answers to its round."""

    def __init__(self, script: Generator[list[ReplicaCall], list[ReplicaReply], Removed]) -> None:
        self.script = script
        self.answers: list[ReplicaReply | None] = []


class Offers:
    """The dispatcher's, under its lock. `ready()` take requests, `live()` answer, `ended()` hears when one is over."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        steering: Steering,
        ready: Callable[[], Sequence[int]],
        live: Callable[[], Collection[int]],
        ended: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._post = post
        self._steering = steering
        self._ready = ready
        self._live = live
        self._ended = ended
        self._clock = clock
        self._talks: dict[int, _Talk] = {}  # by the replica that goes
        self._asked: dict[int, tuple[int, int, int]] = {}  # number -> whose talk, place in its round, who was asked
        self._numbers = itertools.count(1)
        self._done: dict[int, Removed] = {}

    def begin(self, source: int) -> None:
        """Offer what a draining replica has; nothing where there are no copies, or a tier that has it."""
        fetching = self._steering.fetching
        if fetching is None or fetching.shares_tiers or source in self._talks:
            return
        from rayk.scheduler.transfers.evacuation import Evacuation
        from rayk.scheduler.transfers.transfer import PageTransfers

        carrier = PageTransfers(fetching.lines, self._clock)
        self._talks[source] = _Talk(Evacuation(carrier, self._ready, fetching.page_size, self._clock).run(source))
        self._go_on(source, None)

    def under_way(self, source: int) -> bool:
        """Whether it is not over."""
        return source in self._talks

    def end(self, source: int) -> Removed:
        """What became of it. One that is under way is given up: its replica goes, and with it what is pinned there."""
        if self._talks.pop(source, None) is not None:
            self._asked = {number: each for number, each in self._asked.items() if each[0] != source}
        return self._done.pop(source, Removed())

    def hear(self, report: Report) -> None:
        """Answers that came."""
        from rayk.scheduler.script import ReplicaReply

        for answered in report.answered:
            self._answered(answered.number, ReplicaReply(answered.result, answered.data))

    def lose(self, replica: int) -> None:
        """A replica is gone: it will not answer."""
        for number in [number for number, (_, _, who) in self._asked.items() if who == replica]:
            self._answered(number, _lost(replica))

    def _answered(self, number: int, told: ReplicaReply) -> None:
        source, at, _ = self._asked.pop(number, (-1, 0, 0))
        talk = self._talks.get(source)
        if talk is not None:
            talk.answers[at] = told
            if None not in talk.answers:
                self._go_on(source, talk.answers)

    def _go_on(self, source: int, told: list[ReplicaReply | None] | None) -> None:
        """The next round: those who are gone answer at once."""
        talk = self._talks[source]
        while told is None or None not in told:
            try:
                asks = talk.script.send(told)  # type: ignore[arg-type]  # nothing at first, then none of it is None
            except StopIteration as end:
                del self._talks[source]
                self._done[source] = end.value
                self._ended()
                return
            live = self._live()
            told = talk.answers = [None if ask.replica in live else _lost(ask.replica) for ask in asks]
            for at, ask in enumerate(asks):
                if told[at] is None:
                    number = next(self._numbers)
                    self._asked[number] = (source, at, ask.replica)
                    attached: list[Any] = list(ask.attached)
                    self._post(ask.replica, Query(number, ask.command, attached))  # type: ignore[arg-type]  # an offer asks nothing else


def _lost(replica: int) -> ReplicaReply:
    from rayk.scheduler.script import ReplicaReply

    return ReplicaReply(m.failure(ReplicaLostError(replica, 0, [], "it is gone")))
