"""The requests of one of several drivers of a named Cluster: their table is here, their scheduler is an actor.

A thread hears what the scheduler says. When that dies or hangs, requests that a replica has go on to their end, and
Ray starts another one, to which each driver says what it has; those that wait end with a SchedulerLostError only when
there will be none. A driver whose lease has ended (it was stopped for long) comes again, and asks again for whatever is
not over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from time import monotonic

from rayk import protocol as m
from rayk.actors import serving_link
from rayk.actors.named_engines import NamedReplicas
from rayk.actors.serving_link import SchedulerLink, ToldLinks
from rayk.actors.serving_roster import ServingRoster
from rayk.dispatch.output import Handle
from rayk.dispatch.requests import Requests
from rayk.errors import (
    CallTimeoutError,
    ConfigError,
    DrainError,
    NoPlaceError,
    NotOwnerError,
    RaykError,
    ReplicaIndexError,
    ReplicaLostError,
    ReplicaRemovedError,
    ReplicaStateError,
    SchedulerLostError,
)
from rayk.metrics.reading import Labels, Reading
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.engine import Cancel, Report
from rayk.protocol.serving import DRIVER_SHIFT, PlaceRequest, SchedulerNews, Standing
from rayk.request_errors import RequestCancelledError
from rayk.scheduler.membership import State
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.removal import OFFER_SECONDS
from rayk.scheduler.serving.requests import PlacedRequest, RefusedRequest
from rayk.scheduler.supervisor import Replacement
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Endpoint
from rayk.values import told

log = logging.getLogger("rayk.engine")

LOOK_SECONDS = 0.05  # between two looks at a replica that is about to be removed
HERE = (State.ready, State.draining, State.silent)


class Tickets:
    """Numbers that no other driver gives out."""

    def __init__(self) -> None:
        self._next = 0

    def begin(self, driver: int) -> None:
        """From now on those of the driver with that number."""
        self._next = driver << DRIVER_SHIFT

    def __iter__(self) -> Tickets:
        return self

    def __next__(self) -> int:
        self._next += 1
        return self._next


class NamedDispatcher(Requests):
    """Does for Cluster what Dispatcher does, by a scheduler that others use, too."""

    def __init__(self, link: SchedulerLink, replicas: NamedReplicas, roster: ServingRoster, owner: bool) -> None:
        self._link = link
        self._replicas = replicas
        self._routing: RouterSettings = roster.routing
        self._name = roster.name
        self._owner = owner
        self._make_keys = roster.routing.keys()
        self._numbers = Tickets()
        self._looking = threading.RLock()  # one takes note of the roster at a time, or comes again
        self._states = [State(state) for state in roster.states]
        self._version = roster.version
        self._unheard: dict[int, list[int]] = {}
        """Replicas whose streams ended here, which may still run, and the tickets that they had."""
        self._listened: dict[int, list[PlacedRequest]] = {}
        """Of these, those that are listened to again: what goes there as soon as anything is heard. Until then the
        stream before may still take what is said, and say it to nobody."""
        self._ended = threading.Event()
        self._follow: Callable[[int], None] = lambda replica: None
        self.links = ToldLinks(link, monotonic, roster.routing.page_transport)
        transfers = PageTransfers(self.links, roster.routing.page_size)
        super().__init__(
            replicas.post,
            link,
            replicas.max_retries,
            monotonic,
            self._numbers,
            self._here,
            lambda: link.lost is None,
            lambda: transfers,
        )
        self._come(roster)

    def _come(self, roster: ServingRoster) -> None:
        self._numbers.begin(self._link.number)
        self._replicas.driver = self._link.number
        self._meet(roster)

    def start(self, follow: Callable[[int], None]) -> None:
        """Hear the scheduler, and keep the lease."""
        self._follow = follow
        threading.Thread(target=self._listen, name="rayk-answers", daemon=True).start()
        threading.Thread(target=self._renew, name="rayk-lease", daemon=True).start()

    def _here(self) -> list[int]:
        return [replica for replica, state in enumerate(self._states) if state in HERE]

    def _keys(self, handle: Handle) -> bytes:
        if not self._routing.wants_keys:
            return b""
        return self._make_keys.joined(handle.prompt, (handle.cache_salt, None))

    # -- hearing -------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        number = self._link.number
        while True:
            silent = False
            try:
                for news in self._link.answers():
                    self._hear(news)
            except BaseException as error:  # whatever it was, that stream is over
                silent = isinstance(error, CallTimeoutError)
                log.warning("the scheduler of %s is not heard any more: %s", self._name, error)
            if self.closed or self._link.number != number or not self._resume(silent):
                return  # in the second case another thread hears

    def _hear(self, news: SchedulerNews) -> None:
        if news.roster > self._version:
            self._look()
        with self._turn():
            self._link.keep(news)

    def _resume(self, silent: bool) -> bool:
        """Go on with the scheduler, or with the one that took its place, which is told all that is not over. False when
        there is none, or this driver has come to it again."""
        with self._looking:
            try:
                roster = self._link.resume(silent)
                if roster is None:
                    self._come_again()
                    return False
                for replica in self._take(roster):
                    self._follow(replica)
            except RaykError as error:
                if not self.closed:
                    self._lose_scheduler(error.reason if isinstance(error, SchedulerLostError) else str(error))
                return False
            with self._turn():
                here, waits = list[Standing](), list[PlaceRequest]()
                for handle in self._handles.values():
                    if handle.replica is not None:
                        here.append(Standing(self._want(handle), handle.replica, not handle.prefilling))
                    else:  # those that had a place and lost it are the next ones still
                        had_one = handle.retries or handle.tokens
                        waits.append(self._want(handle, handle.ticket if had_one else 0))
                self._link.tell(here, waits)
            return True

    def _lose_scheduler(self, reason: str) -> None:
        log.warning("the scheduler of %s is gone: %s", self._name, reason)
        with self._turn():
            self._link.lost = reason
            for handle in [each for each in self._handles.values() if each.replica is None]:
                self._end(handle, SchedulerLostError(reason))

    def _renew(self) -> None:
        while not self._ended.wait(serving_link.LEASE_SECONDS / 3):
            if not self._link.renew() and not self.closed:
                self._come_again()

    def _come_again(self) -> bool:
        """Whether the lease had ended, and this driver has another now."""
        with self._looking:
            if self.closed or self._link.lost is not None or self._link.renew():
                return False
            log.warning("this driver was silent for longer than its lease: it asks again for what is not over")
            try:
                roster = self._link.connect(self._owner and not self._link.owner())
            except RaykError as error:
                self._lose_scheduler(f"this driver cannot come again: {error}")
                return False
            with self._turn():
                self._come(roster)
                self._ask_again(list(reversed(self._handles.values())))
            self._take(roster)
            for replica in self._here():
                self._follow(replica)
            threading.Thread(target=self._listen, name="rayk-answers", daemon=True).start()
            return True

    def _look(self) -> ServingRoster:
        """Take note of who runs now."""
        with self._looking:
            roster = self._link.roster()
            for replica in self._take(roster):
                self._follow(replica)
            return roster

    def _take(self, roster: ServingRoster) -> list[int]:
        found = self._replicas.follow(roster)
        with self._turn():
            for replica in found:
                self._unheard.pop(replica, None)
                self._listened.pop(replica, None)
                self._lost(replica, "another took its place")
            self._states, self._version = [State(state) for state in roster.states], roster.version
            self._meet(roster)
        return [replica for replica in found if self._states[replica] in HERE]

    def _meet(self, roster: ServingRoster) -> None:
        for replica, handle in roster.running.items():
            if handle.endpoint is not None:
                self.links.joined(replica, handle.epoch, handle.endpoint)

    def era(self, replica: int) -> Hashable:
        """Which coming of this driver it is, and which start of the replica: streams of earlier ones end, and nothing
        is lost with them."""
        handle = self._replicas.handles.get(replica)
        return self._link.number, handle.start if handle is not None else 0

    def lose(self, replica: int, reason: str, era: Hashable) -> None:
        """Nothing comes from a replica any more: what it had goes on elsewhere, as often as was allowed."""
        if self._come_again():
            return
        with self._turn():
            handle = self._replicas.handles.get(replica)
            if self.closed or handle is None or era != self.era(replica):
                return
            here = [ticket for ticket, each in self._handles.items() if each.replica == replica]
            self._unheard[replica] = self._unheard.get(replica, []) + here
            self._listened.pop(replica, None)
            self._link.unheard(replica, handle.start)
            self._lost(replica, reason)

    def _carry_out(self, placed: Sequence[PlacedRequest], refused: Sequence[RefusedRequest]) -> None:
        """Some of it was decided before the scheduler knew what this driver knows. A replica that was lost here is
        listened to again: it may be back, or it is heard at once that it is not. What was to go to one that has left is
        asked for again."""
        now, gone = list[PlacedRequest](), list[Handle]()
        for each in placed:
            handle = self._handles.get(each.ticket)
            if handle is None or handle.replica is not None:  # it is over, or that was said twice
                continue
            if each.replica not in self._replicas.handles:
                gone.append(handle)
            elif each.replica in self._unheard:
                handle.replica = each.replica
                if each.replica not in self._listened:
                    self._listened[each.replica] = []
                    self._follow(each.replica)
                self._listened[each.replica].append(each)
            else:
                now.append(each)
        super()._carry_out(now, refused)
        if gone:  # or another's came that is not known here: the roster is read again
            self._version = 0
            self._ask_again(gone[::-1])

    def on_report(self, replica: int, report: Report) -> None:
        """A replica's next report; the first since it is listened to again lets go what waits for that."""
        if replica in self._listened:
            with self._turn():
                waiting, left = self._listened.pop(replica, []), self._unheard.pop(replica, [])
                self._post(replica, Cancel(left))  # before the same ids come there again
                handles = [handle for each in waiting if (handle := self._handles.get(each.ticket)) is not None]
                for handle in [handle for handle in handles if handle.unwanted]:
                    self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
                for handle in handles:
                    handle.replica = None  # it was not sent
                self._carry_out(waiting, [])
        super().on_report(replica, report)

    # -- replicas that come and go: see Dispatcher ---------------------------------------------------------------

    @property
    def states(self) -> list[State]:
        """The state of each replica."""
        if self._link.lost is None:
            with suppress(RaykError):
                self._look()
        return list(self._states)

    @property
    def live(self) -> list[int]:
        """Replicas that answer, as far as it was heard."""
        return self._here()

    @property
    def ready(self) -> list[int]:
        """Replicas that take requests, likewise."""
        return [replica for replica, state in enumerate(self._states) if state is State.ready]

    def check_removable(self, replica: int) -> State:
        """Its state, unless it is the last one that takes requests."""
        states = self.states
        self._check(replica, states)
        if states[replica] is not State.lost and not set(self.ready) - {replica}:
            raise ReplicaStateError(replica, "the last one that takes requests", "be removed")
        return states[replica]

    def check_live(self, replica: int) -> None:
        """Nothing, for a replica that answers."""
        self._check(replica, self._states)
        if self._states[replica] is State.lost:
            raise ReplicaLostError(replica, 0, [], "its scheduler says so")
        if self._states[replica] not in HERE:
            raise ReplicaStateError(replica, self._states[replica], "be asked")

    def _check(self, replica: int, states: Sequence[State]) -> None:
        if not 0 <= replica < len(states):
            raise ReplicaIndexError(replica, len(states))
        if states[replica] is State.removed:
            raise ReplicaRemovedError(replica, len(states))

    def enlist(self, count: int) -> list[int]:
        """Indices for `count` replicas that this driver is going to start."""
        replicas = self._link.enlist(count)
        self._look()
        return replicas

    def take_due(self) -> list[int]:
        """Indices of lost replicas at which this driver is to start others now."""
        replicas = self._link.take_due()
        if replicas:
            self._look()
        return replicas

    def seconds(self) -> float | None:
        """Until take_due() may have something."""
        try:
            return self._link.seconds() if not self.closed and self._link.lost is None else None
        except RaykError:
            return None

    def replacements(self) -> list[Replacement]:
        """What is done about lost replicas."""
        return self._link.replacements()

    def give_up(self, replicas: Sequence[int], error: BaseException) -> None:
        """Those could not be started."""
        self._link.give_up(replicas, told(error), isinstance(error, NoPlaceError))

    def join(self, replica: int, pages: int, epoch: int, endpoint: Endpoint | None) -> None:
        """A replica of enlist() takes requests from now on. What was placed at the one before it, of whose end this
        driver may not have heard yet, goes on elsewhere."""
        with self._looking:
            with self._turn():
                self._unheard.pop(replica, None)
                self._listened.pop(replica, None)
                self._lost(replica, "another took its place")
            try:
                token = self._link.join(replica, self._replicas.handles[replica], self._replicas.packed())
            except ReplicaStateError:  # another driver's came first
                self._look()
                raise
            self._replicas.joined(replica)
            if token is not None and token != self._replicas.settings.reset_token:
                self._replicas.reset_prefix_cache([replica], token)
            self._take(self._link.roster())

    def drain(self, replica: int, leaving: bool = True) -> None:
        """Give a replica nothing new."""
        self._link.drain(replica, leaving)

    def resume(self, replica: int) -> None:
        """Let a draining replica take requests again."""
        self._link.undrain(replica)

    def hand_over(self, replica: int) -> None:
        """Have a draining replica let go of all that it has."""
        self._link.hand_over(replica)

    def remove(self, replica: int, timeout: float | None, offer_seconds: float | None = None) -> Removed:
        """As Dispatcher.remove(); the requests of all drivers are waited for."""
        link, began = self._link, monotonic()
        while (left := link.requests_on(replica)) and not self.closed:
            if timeout is not None and monotonic() - began > timeout:
                raise DrainError(replica, dict.fromkeys(left, "it runs there"))
            self._ended.wait(LOOK_SECONDS)
        if offer_seconds != 0 and not self.closed:
            link.offer(replica)
            patience = monotonic() + (OFFER_SECONDS if offer_seconds is None else offer_seconds)
            while link.offering(replica) and monotonic() < patience and not self.closed:
                self._ended.wait(LOOK_SECONDS)
        removed = link.remove(replica)
        with self._turn():
            self._scripts.lose(replica)
        return removed

    def note_reset(self, token: bytes) -> None:
        """Replicas that are added later, by whomever, have to know of that reset of the prefix cache."""
        self._link.note_reset(token)

    # -- questions and the end -------------------------------------------------------------------------------

    def explain(self, request_id: str) -> m.Explained:
        """Why a request went where it went: one of this driver's, or "driver/id" of another's."""
        try:
            return self._link.explain(f"{self._link.number}/{request_id}")
        except ConfigError:
            return self._link.explain(request_id)

    def readings(self, labels: Labels) -> list[Reading]:
        """Metrics of the scheduler; none while it is not there."""
        try:
            return self._link.readings(labels)
        except RaykError:
            return []

    def admission_state(self) -> AdmissionState | None:
        """A snapshot of the queue, if there is an admission policy."""
        return self._link.state().admission

    @property
    def admission(self) -> AdmissionPolicy | None:
        """By what requests wait."""
        return self._routing.admission

    def check_owned(self) -> None:
        """NotOwnerError when another driver started the Cluster and still uses it."""
        owner = self._link.owner()
        if owner and owner != self._link.client:
            raise NotOwnerError(self._name, owner)

    def go(self) -> None:
        """Leave: what this driver had is forgotten everywhere."""
        self._ended.set()
        with suppress(RaykError):  # so that close() ends all engines, those of others, too
            self._look()
        self._link.leave()
