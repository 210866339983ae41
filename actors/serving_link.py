"""A driver's line to the scheduler of a named Cluster: batches of news one way, a stream of answers the other, and
questions, which are calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, TypeVar

from rayk import protocol as m
from rayk.actors.channel import new_client_id
from rayk.actors.interface import Actor, ActorAwayError, ActorGoneError, Runtime
from rayk.actors.launch import find_sockets, proof_for
from rayk.actors.post_line import PostLine
from rayk.actors.secret import Proof
from rayk.actors.serving import ANSWERS_LANE
from rayk.actors.serving_roster import EngineHandle, ServingRoster, ServingState
from rayk.errors import CallTimeoutError, RaykError, SchedulerLostError
from rayk.metrics.reading import Labels, Reading
from rayk.protocol.engine import Report
from rayk.protocol.serving import (
    DriverNews,
    LineNews,
    PlaceRequest,
    SchedulerNews,
    Standing,
    decode_scheduler_news,
    encode_news,
)
from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.requests import PlacedRequest, RefusedRequest
from rayk.scheduler.supervisor import Replacement
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.links import LinkTable

log = logging.getLogger("rayk.engine")
T = TypeVar("T")

ASK_SECONDS = 30.0
AWAY_SECONDS = 0.05  # between two looks whether it is back
LEASE_SECONDS = 15.0  # a driver that is silent this long has its requests ended
SILENT_SECONDS = 5.0  # it says something every second, and answers at once; one that is silent so long hangs
MESSAGE_BYTES = 90_000  # of one message; beyond 100 KiB Ray goes through its object store


class SchedulerLink:
    """Implements rayk.dispatch.requests.Scheduler: what it is told in a turn goes out at the end of it, and what came
    meanwhile is taken."""

    def __init__(self, runtime: Runtime, actor: Actor) -> None:
        self.actor = actor
        self.client = new_client_id("cluster")
        self.number = 0
        self.lost: str | None = None
        """Why the scheduler is gone, if it is."""
        self._runtime = runtime
        self._wants: list[PlaceRequest] = []
        self._dropped: list[int] = []
        self._unheard: list[tuple[int, int]] = []
        self._lines: list[LineNews] = []
        self._placed: list[PlacedRequest] = []
        self._refused: list[RefusedRequest] = []
        self._standing: set[int] = set()  # tickets of whose ends the scheduler may not hear from their replicas
        self._told = 0  # how often it said all
        self._life = 0  # of the scheduler that it talks to
        self._line: PostLine | None = None

    # -- requests: in a turn of theirs -----------------------------------------------------------------------

    def place(self, wants: Sequence[PlaceRequest]) -> None:
        """See Scheduler."""
        if self.lost is not None:
            self._refused += [RefusedRequest(want.ticket, SchedulerLostError(self.lost)) for want in wants]
        else:
            self._wants += wants

    def drop(self, tickets: Sequence[int]) -> None:
        """See Scheduler."""
        self._dropped += tickets

    def on_report(self, replica: int, report: Report, first: Sequence[int]) -> None:
        """It hears from its engines itself, but of what one before it would have heard."""
        if self._standing:
            over = [end.number for end in report.ended if end.number in self._standing]
            self._standing.difference_update(over)
            self._dropped += over

    def unheard(self, replica: int, start: int) -> None:
        """Nothing comes from the replica of that start any more."""
        self._unheard.append((replica, start))

    def note_line(self, news: LineNews) -> None:
        """What became of a copy."""
        self._lines.append(news)

    def tell(self, standing: Sequence[Standing], wants: Sequence[PlaceRequest]) -> None:
        """All that is not over, to a scheduler that may have begun anew; it ignores what it knows."""
        self._standing = {each.want.ticket for each in standing}
        for part in _parts(standing, lambda each: len(each.want.keys)):
            self._send(DriverNews(standing=part))
        self._wants = list(wants)
        self._flush(self._told)

    def keep(self, news: SchedulerNews) -> None:
        """What came, until it is taken."""
        self._placed += [PlacedRequest(p.ticket, p.replica, [Span(*span) for span in p.spans]) for p in news.placed]
        self._refused += [RefusedRequest(each.ticket, m.to_error(each.why)) for each in news.refused]

    def take(self) -> tuple[list[PlacedRequest], list[RefusedRequest]]:
        """See Scheduler."""
        if self.lost is None and (self._wants or self._dropped or self._unheard or self._lines):
            self._flush()
        placed, self._placed = self._placed, []
        refused, self._refused = self._refused, []
        return placed, refused

    def _flush(self, told: int = 0) -> None:
        wants, self._wants = self._wants, []
        dropped, self._dropped = self._dropped, []
        unheard, self._unheard = self._unheard, []
        lines, self._lines = self._lines, []
        *before, last = [*_parts(wants, lambda want: len(want.keys))] or [[]]
        for part in before:
            self._send(DriverNews(part, [], unheard))
            unheard = []
        self._send(DriverNews(last, dropped, unheard, lines, told=told))

    def _send(self, news: DriverNews) -> None:
        self._open().post(encode_news(news), self.number)

    def answers(self) -> Iterator[SchedulerNews]:
        """What it says, until it takes this driver for gone; raises when nothing more will come."""
        return map(decode_scheduler_news, self._open().stream(SILENT_SECONDS, self.number))

    def _open(self) -> PostLine:
        """The line, which who only asks does not need."""
        if self._line is None:
            self._line = PostLine(self._runtime, self.actor, "the scheduler", ANSWERS_LANE)
        return self._line

    def _open_anew(self, roster: ServingRoster) -> None:
        """To a scheduler that has heard nothing of this driver."""
        self._life = roster.life
        if self._line is not None:
            self._line.close()
        self._line = None
        with suppress(RaykError, ActorGoneError):  # then messages go by calls
            find_sockets(self._runtime, {"the scheduler": self.actor})
        self._open()

    # -- calls ---------------------------------------------------------------------------------------------

    def _ask(self, method: str, *args: Any, seconds: float = ASK_SECONDS, patience: float = SILENT_SECONDS) -> Any:
        """The answer of the scheduler. One that died is waited for while Ray starts it again, one that hangs has its
        process ended for that; then it is asked again. SchedulerLostError when it is gone for good, or for too long."""
        began, ended = monotonic(), False
        while True:
            left = began + seconds - monotonic()
            try:
                call = self.actor.call(method, *args, control=True)
                return self._runtime.get(call, "the scheduler", max(0.0, min(left, patience)))
            except CallTimeoutError:
                if left <= patience:
                    raise
                if not ended:
                    log.warning("the scheduler does not answer: its process is ended, and another one begins")
                    self._runtime.restart(self.actor)
                    ended = True
            except ActorAwayError as error:
                if monotonic() - began >= seconds:
                    raise SchedulerLostError(f"{error}; it was not back within {seconds:.0f} s") from None
                sleep(AWAY_SECONDS)
            except ActorGoneError as error:
                raise SchedulerLostError(str(error)) from None

    def _proof(self) -> Proof | None:
        try:
            return proof_for(self._runtime, self.actor, ASK_SECONDS)
        except ActorGoneError as error:
            raise SchedulerLostError(str(error)) from None

    def connect(self, owner: bool) -> ServingRoster:
        """Come, or come again with another number."""
        self.number, roster = self._ask("connect", self.client, owner, LEASE_SECONDS, self._proof())
        assert isinstance(roster, ServingRoster)
        self._open_anew(roster)
        return roster

    def resume(self, silent: bool) -> ServingRoster | None:
        """Go on with the scheduler, which may have begun anew; None when this driver has to come again. `silent`: it
        was not heard for SILENT_SECONDS already."""
        patience = 1.0 if silent else SILENT_SECONDS
        self._told += 1
        asked = self.number, self.client, self._told
        roster: ServingRoster | None = self._ask("resume", *asked, patience=patience)
        if roster is not None:
            self._open_anew(roster)
        return roster

    def renew(self) -> bool:
        """Keep the lease; False when it has ended. True, too, where the scheduler cannot be asked."""
        try:
            return bool(self._ask("renew", self.client, seconds=5.0))
        except RaykError:
            return True

    def leave(self) -> None:
        """Go; a scheduler that is gone needs to hear nothing."""
        with suppress(RaykError):
            self._ask("leave", self.number, seconds=5.0)
        if self._line is not None:
            self._line.close()

    def readings(self, labels: Labels) -> list[Reading]:
        """Its metrics."""
        found: list[Reading] = self._ask("readings", labels)
        return found

    def owner(self) -> str:
        """The driver that owns the Cluster, '' for nobody, and without a scheduler."""
        try:
            return str(self._ask("owner", seconds=5.0))
        except RaykError:
            return ""

    def roster(self) -> ServingRoster:
        """As it is now."""
        roster = self._ask("roster", self._proof())
        assert isinstance(roster, ServingRoster)
        return roster

    def enlist(self, count: int) -> list[int]:
        """See ServingActor; so the others."""
        return list(self._ask("enlist", self.number, count))

    def take_due(self) -> list[int]:
        """Indices at which this driver is to start engines now."""
        return list(self._ask("take_due", self.number))

    def seconds(self) -> float | None:
        """Until take_due() has something."""
        seconds: float | None = self._ask("seconds")
        return seconds

    def replacements(self) -> list[Replacement]:
        """What is done about lost engines."""
        return list(self._ask("replacements"))

    def give_up(self, replicas: Sequence[int], why: str, placeless: bool) -> None:
        """Those could not be started."""
        self._ask("give_up", list(replicas), why, placeless)

    def join(self, replica: int, handle: EngineHandle, model: bytes) -> bytes | None:
        """It takes requests from now on; the token of the last reset."""
        token: bytes | None = self._ask("join", replica, handle, model)
        return token

    def drain(self, replica: int, leaving: bool) -> None:
        """Nothing new goes there."""
        self._ask("drain", replica, leaving)

    def undrain(self, replica: int) -> None:
        """It takes requests again."""
        self._ask("undrain", replica)

    def hand_over(self, replica: int) -> None:
        """It lets go of all that it has."""
        self._ask("hand_over", replica)

    def requests_on(self, replica: int) -> list[str]:
        """What is placed there."""
        return list(self._ask("requests_on", replica))

    def offer(self, replica: int) -> None:
        """Begin to offer what it has cached."""
        self._ask("offer", replica)

    def offering(self, replica: int) -> bool:
        """Whether that is under way."""
        return bool(self._ask("offering", replica))

    def remove(self, replica: int) -> Removed:
        """Forget it."""
        removed = self._ask("remove", replica)
        assert isinstance(removed, Removed)
        return removed

    def note_reset(self, token: bytes) -> None:
        """Engines that join later have to know of that reset."""
        self._ask("note_reset", token)

    def explain(self, key: str) -> m.Explained:
        """Why that request went where it went."""
        explained: m.Explained = self._ask("explain", key)
        return explained

    def pid(self) -> int:
        """Its process."""
        return int(self._ask("pid", seconds=5.0))

    def state(self) -> ServingState:
        """A snapshot."""
        state = self._ask("state")
        assert isinstance(state, ServingState)
        return state


def _parts(items: Sequence[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Split so that a message stays small."""
    part, size = list[T](), 0
    for item in items:
        if part and size + size_of(item) > MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += size_of(item) + 100
    if part:
        yield part


class ToldLinks(LinkTable):
    """The links as one driver sees them; the scheduler is told what became of copies."""

    def __init__(self, link: SchedulerLink, *more: Any) -> None:
        super().__init__(*more)
        self._link = link

    def carried(self, source: int, target: int, kind: str, pages: int, seconds: float) -> None:
        super().carried(source, target, kind, pages, seconds)
        if source in self.peers:
            self._link.note_line(LineNews(source, self.peers[source].epoch, target, kind, pages, seconds))

    def failed(self, source: int, target: int, kind: str, reason: str) -> None:
        super().failed(source, target, kind, reason)
        if source in self.peers:
            self._link.note_line(LineNews(source, self.peers[source].epoch, target, kind, trouble=reason))
