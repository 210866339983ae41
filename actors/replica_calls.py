"""The scheduler's talk with replicas: every message has a deadline, and who does not answer harms only itself.

    question   asked for the scheduler's own books        waited for QUESTION_SECONDS
    work       what a driver asked for                     waited for while the replica lives, BUSY_SECONDS at most
    order      what a replica has to do in any case        sent even to one that does not answer, and done when it does

The scheduler looks at every replica twice a second, whether anybody asks it anything or not: vitals(), which has a lane
of its own, says that its process lives and whether its work gets on (rayk.kvcache.progress).

A replica that leaves a message unanswered for QUESTION_SECONDS is set aside: no question waits for it any more, and
the router passes it over while others take requests. Its vitals() say if it is only busy. When they are not answered
either, or its work did not get on, for SILENT_SECONDS, the replica is silent: only orders are sent to it, everything
else ends at once with a CallTimeoutError that names it, and its state says so. It comes back by itself: with the next
answer it is not silent any more, and once everything that it was sent is answered it is not set aside.

What was given up is not done later in nobody's name. A replica takes messages in the order in which they were sent, so
behind each that is given up goes the one that undoes it (Ask.undo). Where only its answer says what to undo, that is
done when it comes (Ask.late).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rayk import protocol as m
from rayk.actors.channel import SLICE, ActorChannel, Answer, Pending
from rayk.actors.interface import Actor, Runtime
from rayk.errors import CallTimeoutError, RaykError, ReplicaRemovedError
from rayk.scheduler.script import ReplicaCall, ReplicaReply

QUESTION_SECONDS = 1.0
SILENT_SECONDS = 4.0  # after the first question went unanswered
BUSY_SECONDS = 120.0
PATIENT = 8  # rounds at a time that are waited for longer than a question is


class ReplicaChannel(ActorChannel):
    """The scheduler's line to one start of a replica, and how that answers."""

    pulse_method = "vitals"

    def __init__(
        self,
        runtime: Runtime,
        actor: Actor,
        replica: int,
        epoch: int,
        client: str,
        gone: Callable[[str], RaykError],
    ) -> None:
        super().__init__(runtime, actor, f"replica {replica}", epoch, client, gone)
        self.replica = replica
        self.silence, self.stalled, self.poison, self.answers = 0.0, 0.0, "", True
        """Seconds for which its process did not answer, or its work did not get on, and why it is unfit, as it says
        itself; whether it `answers`."""
        self.aside = self.silent = False
        self.owed: list[tuple[ReplicaCall, Pending]] = []
        """Messages whose answers nobody waits for, in the order they were sent."""
        self.waits = 0
        """Messages that are waited for longer than a question would be."""

    def look(self) -> float:
        """Seconds for which its process did not answer, or its work did not get on."""
        silence = super().look()
        self.silence, self.answers = silence, not silence
        if self._pulse.answer is not None:
            self.stalled, self.poison = self._pulse.answer
        return silence or self.stalled


class ReplicaCalls:
    """Sends messages and waits for answers. Whoever sends holds `lock`; so does who tells `stands` of a replica that
    stands otherwise than before."""

    def __init__(
        self,
        lock: AbstractContextManager[Any],
        stands: Callable[[ReplicaChannel], None],
        clock: Callable[[], float],
    ) -> None:
        self._lock = lock
        self._stands = stands
        self._clock = clock
        self._patient = 0

    def send(self, links: Sequence[ReplicaChannel | None], asks: Sequence[ReplicaCall]) -> list[Pending | RaykError]:
        """Send a round, `links` by replica; the error where nobody is to wait for an answer. With the lock held."""
        sent: list[Pending | RaykError] = []
        for ask in asks:
            link = links[ask.replica] if ask.replica < len(links) else None
            sent.append(self._send(link, ask) if link is not None else ReplicaRemovedError(ask.replica, len(links)))
        return sent

    def _send(self, link: ReplicaChannel, ask: ReplicaCall) -> Pending | RaykError:
        waited_for = not link.aside or (ask.patient and not link.silent and self._patient < PATIENT)
        if not waited_for and not ask.order:
            return _timeout(link)
        try:
            pending = link.send(ask.command, ask.attached, ask.with_data)
        except RaykError as error:
            return error
        if waited_for:
            return pending
        link.owed.append((ask, pending))
        return _timeout(link)

    def order(self, link: ReplicaChannel, ask: ReplicaCall) -> None:
        """Send one message whose answer nobody waits for. With the lock held."""
        sent = self._send(link, ask)
        if isinstance(sent, Pending):
            link.owed.append((ask, sent))

    def hear(self, asks: Sequence[ReplicaCall], sent: Sequence[Pending | RaykError]) -> list[ReplicaReply]:
        """The answers of a round, each waited for as long as its kind is. Without the lock."""
        told = [ReplicaReply(m.failure(each)) if isinstance(each, RaykError) else NOT_YET for each in sent]
        waiting = {i: each for i, each in enumerate(sent) if isinstance(each, Pending)}
        last = self._clock()
        if len(waiting) == len(sent) > 1:
            wires = waiting[0].link.fetch_all([pending.ref for pending in waiting.values()], within=SLICE)
            if wires is not None:
                return [
                    ReplicaReply(p.link.decoded(wire), p.data) for wire, p in zip(wires, waiting.values(), strict=True)
                ]
        passed = 0.0
        late: list[ReplicaChannel] = []
        try:
            while waiting:
                pause = SLICE
                for i, pending in list(waiting.items()):
                    heard = pending.within(pause)
                    pause = 0.0
                    if heard is not None:
                        told[i] = (
                            ReplicaReply(m.failure(heard)) if isinstance(heard, RaykError) else ReplicaReply(*heard)
                        )
                        del waiting[i]
                now = self._clock()
                passed, last = passed + min(now - last, 2 * SLICE), now  # no time in which this process was stopped
                if passed >= QUESTION_SECONDS and waiting:
                    for i in self._give_up(asks, waiting, late, passed):
                        told[i] = ReplicaReply(m.failure(_timeout(waiting.pop(i).link, passed)))
        finally:
            with self._lock:
                self._patient -= bool(late)
                for link in late:
                    link.waits -= 1
        return told

    def _give_up(
        self, asks: Sequence[ReplicaCall], waiting: dict[int, Pending], late: list[ReplicaChannel], passed: float
    ) -> list[int]:
        """Set those aside that have not answered; what is not to be waited for any longer. The links to the others are
        in `late` from then on."""
        first, given_up = not late, list[int]()
        silence = {pending.link: _look(pending.link) for pending in waiting.values()}
        with self._lock:
            patient = passed < BUSY_SECONDS and (not first or self._patient < PATIENT)
            for i, pending in waiting.items():
                link, ask = pending.link, asks[i]
                assert isinstance(link, ReplicaChannel)
                self._note(link, silence[link])
                if patient and ask.patient and not link.silent:
                    if first:
                        late.append(link)
                        link.waits += 1
                    continue
                given_up.append(i)
                link.owed.append((ask, pending))
                if ask.undo is not None:
                    self.order(link, ReplicaCall(ask.replica, ask.undo))
            self._patient += bool(first and late)
        return given_up

    def _note(self, link: ReplicaChannel, silence: float, aside: bool = True) -> None:
        """How a replica stands whose ping() has not been answered for so many seconds. With the lock held."""
        before = link.aside, link.silent
        link.aside = aside
        link.silent = aside and (silence >= SILENT_SECONDS or (link.silent and silence > 0))
        if before != (link.aside, link.silent):
            self._stands(link)

    def tick(self, links: Sequence[ReplicaChannel | None], watch: bool = False) -> None:
        """Look after those that are set aside: read what they answer late, and take them back. With `watch`, look at
        all of them, so that who dies or hangs is noticed though nobody asks it anything. Waits for nobody. `links` by
        replica."""
        for link in links:
            if link is not None and (watch or link.aside or link.owed):
                silence = _look(link) if watch or link.aside else 0.0
                if link.aside or link.owed or silence >= SILENT_SECONDS:
                    with self._lock:
                        for more in self._read_late(link):
                            target = links[more.replica]
                            if target is not None:
                                self.order(target, more)
                        if link.aside or silence >= SILENT_SECONDS:
                            self._note(link, silence, aside=bool(silence or link.owed or link.waits))

    @staticmethod
    def _read_late(link: ReplicaChannel) -> list[ReplicaCall]:
        """Read what is there of the answers that nobody waits for; what is to be sent because of them."""
        more: list[ReplicaCall] = []
        while link.owed:
            ask, pending = link.owed[0]
            heard = pending.within(0.0)
            if heard is None:
                break
            del link.owed[0]
            if ask.late is not None and isinstance(heard, Answer):
                more += ask.late(heard.result)
        return more


NOT_YET = ReplicaReply(m.Done())


def _look(link: ActorChannel) -> float:
    """Seconds for which its ping() was not answered; 0 where its process died, which its answers say."""
    try:
        return link.look()
    except RaykError:
        return 0.0


def _timeout(link: ActorChannel, seconds: float = QUESTION_SECONDS) -> CallTimeoutError:
    return CallTimeoutError(link.target, seconds)
