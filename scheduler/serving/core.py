"""The scheduler of a Cluster: which requests there are, who goes where and when, and which replicas there are.

    waiting -> placed -> over
       ^          |
       +----------+    its replica was lost, or hands it over: its driver asks again, with another ticket

Drivers say what they want (PlaceRequest), replicas what they have done (Report), and take() says what drivers have to
know. Who waits goes by turns (waiting.py) while a replica has room by the router's limit, or by an admission policy
(admission.py); requests that lost their place go first in both. What goes wrong with one request here ends that
request. No Ray, no threads, no prompts; commands to replicas go out through `post`. Replicas come and go as
rayk.scheduler.membership says.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic

import numpy as np

from rayk import protocol as m
from rayk.errors import (
    DrainError,
    NoReplicaError,
    OverloadedError,
    RaykError,
    ReplicaLostError,
    ReplicaStateError,
)
from rayk.kvcache.page_hash import split_keys
from rayk.metrics.histogram import Histogram
from rayk.metrics.table import SECONDS
from rayk.protocol.admission import AdmissionState
from rayk.protocol.engine import Cancel, Command, HandOver, Query, Report
from rayk.protocol.serving import DRIVER_SHIFT, PlaceRequest
from rayk.request_errors import RequestError, RequestTimeoutError
from rayk.scheduler.lifecycle import ReplicaLifecycle
from rayk.scheduler.membership import HERE, Membership, State
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.replica_loads import BoolArray
from rayk.scheduler.router.router import NO_KEYS, RouterSettings
from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.admission import ClusterAdmission
from rayk.scheduler.serving.engine_scripts import EngineScripts
from rayk.scheduler.serving.evacuation import Evacuations
from rayk.scheduler.serving.requests import PlacedRequest, RefusedRequest, ServedRequest
from rayk.scheduler.serving.waiting import Waiting
from rayk.scheduler.supervisor import Supervisor
from rayk.transport.choice import Endpoint
from rayk.values import told

log = logging.getLogger("rayk.engine")


class ServingCore:
    """Of one turn at a time. `keys_of(ticket)` makes the keys of requests that came without; `numbers` are those of
    queries to replicas; `on_left()` is called when a request left its replica, or the offers of one are over. With
    `replace` lost replicas are wanted back. `starts` are those of the first replicas, where several drivers name them.
    """

    def __init__(
        self,
        post: Callable[[int, Command], None],
        settings: RouterSettings,
        clock: Callable[[], float] = monotonic,
        keys_of: Callable[[int], Sequence[int]] | None = None,
        numbers: Iterator[int] | None = None,
        on_left: Callable[[], None] = lambda: None,
        replace: bool = False,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.router = settings.make(clock)
        self.members = members = Membership(starts or [1] * len(settings.pages))
        self.lifecycle = ReplicaLifecycle(members, self.router, self.ids_on, lambda ids: None, settings)
        self.lifecycle.on_replica_gone = lambda replica, ids: self._replica_gone(replica)
        self.supervisor = Supervisor(self.lifecycle, clock, replace)
        self.waiting = Waiting()
        self.admission: ClusterAdmission | None = None
        """Whose turn it is, if there is a policy."""
        if settings.admission is not None:
            self.admission = ClusterAdmission(settings.admission, self.router, settings.page_size, clock)
        self.scripts = EngineScripts(post, lambda: members.here, numbers or itertools.count(1))
        self.evacuations = Evacuations(self.scripts, self.router, lambda: members.ready, on_left, clock)
        self.retries = 0
        """Requests that asked again, since they lost their place."""
        self.placing = Histogram(SECONDS)
        """How long they waited for places."""
        self.why_lost = ""
        """Of the replica that was lost last."""
        self._post = post
        self._clock = clock
        self._keys_of = keys_of
        self._on_left = on_left
        self._suspected: dict[int, int] = {}  # replicas that a driver hears nothing of, with their starts
        self._freed = False  # there may be room
        self._served: dict[int, ServedRequest] = {}  # by ticket, until they are over
        self._placed: list[PlacedRequest] = []  # to be told
        self._refused: list[RefusedRequest] = []  # likewise

    # -- what drivers say ------------------------------------------------------------------------------

    def place(self, wants: Sequence[PlaceRequest]) -> None:
        """Requests want places: what becomes of them comes with take(), now or later."""
        now = self._clock()
        for want in wants:
            known = self._served.get(want.ticket)
            if known is not None:  # it was said twice, by a driver that may not have heard the answer
                if known.replica >= 0:
                    self._placed.append(PlacedRequest(want.ticket, known.replica, ()))
                continue
            request = self._request(want, now)
            if want.again:
                self.retries += want.again != want.ticket  # else it waits already, and is said to another scheduler
                before = self._served.pop(want.again, None)
                if before is not None:
                    if before.replica in self.members.here:  # its driver hears nothing from there; should it go on
                        self._post(before.replica, Cancel([want.again]))
                    self._leave(before)
                elif self.admission is not None:
                    self.admission.adopt(request, self._route(request))
                self._served[want.ticket] = request
                self.waiting.put_back(request)
                continue
            self._served[want.ticket] = request
            if self.admission is None:
                self.waiting.add(request)
                continue
            self.waiting.enter(request)
            try:
                self.admission.offer(request, self._route(request))
            except Exception as raised:
                self._fail(request, raised)
            self._admit(self.admission)  # what finds room makes no other wait
        self.pump()

    def _request(self, want: PlaceRequest, now: float) -> ServedRequest:
        driver = want.ticket >> DRIVER_SHIFT
        late_at = now + want.left if want.left is not None else None
        key = f"{driver}/{want.request_id}" if driver else want.request_id
        return ServedRequest(want, driver, key, late_at, since=now)

    def adopt(self, want: PlaceRequest, replica: int, begun: bool) -> None:
        """A request has had its place since before this scheduler began; `begun`: and tokens from there. Of one that is
        lost there its driver hears itself, and asks again."""
        if want.ticket in self._served or replica not in self.members.here:
            return
        request = self._served[want.ticket] = self._request(want, self._clock())
        route = self._route(request)
        self.router.place(request.key, replica, route)
        request.replica = replica
        if begun:
            self.router.prefilled(replica, [request.key])
        if self.admission is not None:
            self.admission.adopt(request, route)
            if not begun:
                self.admission.promise(request.key, replica, route)

    def drop(self, tickets: Sequence[int]) -> None:
        """Those are not wanted any more, and are nowhere; unknown ones are ignored."""
        for ticket in tickets:
            request = self._served.pop(ticket, None)
            if request is not None:
                self._forget(request)

    def take(self) -> tuple[list[PlacedRequest], list[RefusedRequest]]:
        """What drivers have to be told: requests that were given a place, and those that get none any more."""
        if self._freed:
            self._freed = False
            if self.waiting:
                self.pump()
        placed, self._placed = self._placed, []
        refused, self._refused = self._refused, []
        return placed, refused

    @property
    def tickets(self) -> list[int]:
        """All that are not over."""
        return list(self._served)

    @property
    def requests(self) -> list[ServedRequest]:
        """Likewise."""
        return list(self._served.values())

    def close(self) -> None:
        """Nothing is placed any more."""
        self.waiting.clear()
        self._served.clear()
        self.admission = None

    def _forget(self, request: ServedRequest) -> None:
        self._leave(request)
        self.waiting.remove(request.want.ticket)
        if self.admission is not None:
            self.admission.forget(request.key)

    def _leave(self, request: ServedRequest) -> None:
        """It has no place any more."""
        request.replica = -1
        self.router.remove(request.key)
        if self.admission is not None:
            self.admission.settle_promise(request.key)
        self._on_left()

    def _refuse(self, request: ServedRequest, error: RaykError) -> None:
        self._served.pop(request.want.ticket, None)
        self._forget(request)
        if request.driver and isinstance(error, (OverloadedError, NoReplicaError)):
            error = type(error)(request.want.request_id, *error.args[1:])
        self._refused.append(RefusedRequest(request.want.ticket, error))

    def _fail(self, request: ServedRequest, raised: Exception) -> None:
        log.warning("request %r cannot be placed", request.key, exc_info=raised)
        self._refuse(request, RequestError(request.want.request_id, f"it cannot be placed or sent: {told(raised)}"))

    # -- what replicas say -----------------------------------------------------------------------------

    def on_report(self, replica: int, report: Report, first: Sequence[int]) -> None:
        """A replica's next report, in which the requests with the tickets `first` have their first tokens. Who waits
        gets what room that makes with take(), after those that lose their places with it."""
        self._freed = True
        if replica in self._suspected:
            self.lifecycle.answers(replica, self._suspected.pop(replica), False, False)
        self.router.apply_cache_changes(replica, report.pages)
        self.router.set_prefill_rate(replica, report.prefill_rate)
        if report.answered:
            self.scripts.on_report(report)
        if first:
            begun = [self._served[ticket].key for ticket in first if ticket in self._served]
            self.router.prefilled(replica, begun)
            for key in begun if self.admission is not None else ():
                self.admission.settle_promise(key)  # type: ignore[union-attr]  # not None, see above
        if self.admission is not None:
            self.admission.report(replica, report.used_pages)
        for end in report.ended:
            request = self._served.get(end.number)
            if request is not None and end.moved:
                self._leave(request)
            elif request is not None:
                self.drop([end.number])

    def lose(self, replica: int, reason: str) -> None:
        """A replica is gone with what it had, which is forgotten: drivers ask again for what is not over, and of some
        ends only they may have heard."""
        if replica not in self.members.known:
            return
        self.why_lost = reason
        lost, epoch = self._on(replica), self.members.epochs[replica]
        for lose in (partial(self.supervisor.lose, epoch=epoch, reason=reason), self.scripts.lose):
            try:
                lose(replica)
            except Exception:  # the requests have to be told whatever it is
                log.exception("replica %d is lost, and not all took note of it", replica)
        for request in lost:
            del self._served[request.ticket]
            self._leave(request)
            if self.admission is not None:
                self.admission.lose(request.key)
        self._on_left()

    def suspect(self, replica: int, start: int) -> None:
        """A driver hears nothing of the replica of that start any more: it gets nothing new until it reports again."""
        if replica in self.members.here and self.members.epochs[replica] == start:
            self.lifecycle.answers(replica, start, True, True)
            self._suspected[replica] = start

    def _replica_gone(self, replica: int) -> None:
        if self.admission is not None:
            self.admission.replica_gone(replica)

    # -- placing -------------------------------------------------------------------------------------

    @property
    def hopeful(self) -> bool:
        """Whether there are replicas, or will be."""
        return bool(self.members.here) or self.supervisor.hopeful

    def pump(self) -> None:
        """Place what waits; end what cannot go on any more. Without replicas, now or to come, nothing will be
        placed."""
        if not self.hopeful:
            for request in self.waiting.requests:
                lost = ReplicaLostError(-1, 0, [request.want.request_id], self.why_lost)
                self._refuse(request, lost)
        for request in self.waiting.late(self._clock()):
            self._refuse(request, RequestTimeoutError(request.want.request_id, request.want.timeout or 0.0))
        while (first := self.waiting.first()) is not None:
            try:
                if not self._choose(first):
                    break
            except Exception as raised:
                self._fail(first, raised)
        if self.admission is not None:
            self._admit(self.admission)

    def _admit(self, admission: ClusterAdmission) -> None:
        for request, error in admission.turned_away():
            self._refuse(request, error)
        while self.waiting.first() is None and (admitted := admission.next()) is not None:
            chosen: ServedRequest = admitted.queued.what
            try:
                self._place(chosen, admitted.replica, admitted.wish)
            except Exception as raised:
                self._fail(chosen, raised)
        for request, error in admission.turned_away():
            self._refuse(request, error)

    def _route(self, request: ServedRequest) -> RouteRequest:
        want, keys = request.want, NO_KEYS
        if self.router.keys is not None:
            keys = split_keys(want.keys) if self._keys_of is None else self._keys_of(want.ticket)
        return RouteRequest(want.tokens, keys, want.session)

    def _choose(self, request: ServedRequest) -> bool:
        """Find a request a place; False when no replica has room."""
        route = self._route(request)
        open_ = self.admission.open(route) if self.admission is not None else None
        replica = self._beside(request, route, open_) if request.want.beside else -1
        if replica < 0 and (open_ is None or open_.any()):
            replica = self.router.choose(request.key, route, open_)
        if replica < 0:
            return False
        self._place(request, replica, route)
        return True

    def _beside(self, request: ServedRequest, route: RouteRequest, open_: BoolArray | None) -> int:
        """The replica where another answer to the same prompt is made; -1 where that one takes no more."""
        other = self._served.get(request.want.beside)
        if other is None or other.replica < 0:
            return -1
        there = np.arange(len(self.router.loads)) == other.replica
        there &= self.router.loads.ready if open_ is None else self.router.loads.ready & open_
        return self.router.choose(request.key, route, there) if there.any() else -1

    def _place(self, request: ServedRequest, replica: int, route: RouteRequest) -> None:
        router = self.router
        spans = router.fetching.plan(replica, route.keys) if router.fetching is not None and route.keys else ()
        router.place(request.key, replica, route, spans[-1].stop if spans else 0)
        self.waiting.take(request)
        request.replica = replica
        self.placing.add(max(1e-6, self._clock() - request.since))
        if self.admission is not None:
            self.admission.promise(request.key, replica, route)
        self._placed.append(PlacedRequest(request.want.ticket, replica, spans))

    # -- replicas that come and go ---------------------------------------------------------------------

    def _on(self, replica: int) -> list[ServedRequest]:
        return [request for request in self._served.values() if request.replica == replica]

    def ids_on(self, replica: int) -> list[str]:
        """The requests that are placed there."""
        return [request.want.request_id for request in self._on(replica)]

    def enlist(self, count: int, driver: str = "") -> list[int]:
        """Indices for `count` replicas that a driver is starting: those of lost ones, then new ones."""
        return self._started(self.supervisor.enlist(count, driver))

    def take_due(self, driver: str = "") -> list[int]:
        """Indices of lost replicas at which a driver is to start others now, as after enlist()."""
        return self._started(self.supervisor.take(driver))

    def _started(self, replicas: list[int]) -> list[int]:
        for replica in replicas:
            self.lifecycle.start(replica)
        return replicas

    def give_up(self, replicas: Sequence[int], why: str, placeless: bool = False) -> None:
        """Those could not be started; `placeless`: there was no place for them. A scheduler before this one may have
        granted them."""
        for replica in replicas:
            if self.members.state(replica) is State.starting:
                self.supervisor.give_up(replica, why, placeless)
        self.pump()

    def meet(self, replica: int, epoch: int, endpoint: Endpoint | None) -> None:
        """Pages can be copied to and from that replica."""
        if self.router.fetching is not None and endpoint is not None:
            self.router.fetching.joined(replica, epoch, endpoint)

    def disconnect(self) -> None:
        """Have links to replicas that are gone closed at the others."""
        if self.router.fetching is not None:
            for replica, gone in self.router.fetching.links.peers_to_disconnect().items():
                self._post(replica, Query(0, m.DropLines(gone)))

    def join(self, replica: int, pages: int, epoch: int, endpoint: Endpoint | None, start: int | None = None) -> None:
        """A replica of enlist(), with so many pages, takes requests from now on; see meet(). Where a scheduler before
        this one had granted it, nobody else has to start another."""
        if self.members.state(replica) is State.lost:
            self._started(self.lifecycle.enlist_at([replica]))
        self.supervisor.join(replica, start or self.members.version, pages)
        self.meet(replica, epoch, endpoint)
        self.pump()

    def drain(self, replica: int, leaving: bool = True) -> None:
        """Give a replica nothing new; what it has goes on there. ReplicaStateError for a lost one. Without `leaving`
        another is to take its place."""
        self.supervisor.drain(replica, leaving)

    def resume(self, replica: int) -> None:
        """Let a draining replica take requests again."""
        self.supervisor.resume(replica)
        self._post(replica, HandOver(False))
        self.pump()

    def hand_over(self, replica: int) -> None:
        """Have a draining replica let go of all that it has, and of what is on its way there."""
        assert self.members.state(replica) is not State.ready
        if self.members.state(replica) is State.draining:
            self._post(replica, HandOver(True))

    def check_live(self, replica: int) -> None:
        """Nothing, for a replica that answers: else the error of membership, or ReplicaLostError."""
        self.members.check(replica)
        state = self.members.state(replica)
        if state is State.lost:
            raise ReplicaLostError(replica, 0, [], self.why_lost)
        if state not in HERE:
            raise ReplicaStateError(replica, state, "be asked")

    def offer(self, replica: int) -> None:
        """Begin to offer what a draining replica has cached to those that take requests."""
        if self.members.state(replica) is State.draining:
            self.evacuations.begin(replica)

    def remove(self, replica: int) -> Removed:
        """Forget a draining or lost replica; what became of its pages. DrainError while requests are there."""
        removed, left = self.evacuations.end(replica), self.ids_on(replica)
        if left:
            raise DrainError(replica, dict.fromkeys(left, "it runs there"))
        if self.members.state(replica) is State.ready:  # the drain was taken back
            raise ReplicaStateError(replica, State.ready, "be removed")
        self.supervisor.remove(replica)
        self.scripts.lose(replica)
        self.disconnect()
        return removed

    # -- questions -------------------------------------------------------------------------------------

    def explain(self, request_id: str) -> m.Explained:
        """Why a request went where it went; ConfigError when no decision for it is remembered."""
        return self.router.explain(request_id)

    def admission_state(self) -> AdmissionState | None:
        """A snapshot of the queue, if there is an admission policy."""
        return self.admission.state() if self.admission is not None else None
