"""Where all drivers of a cluster wait for their turn: one queue, watermarks of the replicas, outcomes.

A driver offers requests with a message and hears, with its answer and those that follow, what became of them. A
request is let in by whichever message finds room for it: one that reports a release, an offer, a look. Nobody is
called: what is settled lies here until its driver asks, and is dropped with the driver.

The controller knows nothing of messages. Who uses it (the scheduler's scripts, a Cluster's dispatcher) claims and
allocates what next() lets in, and says how that went.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rayk.errors import AlreadyClaimedError, NoReplicaError, OverloadedError, RaykError
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.contexts import Traits
from rayk.request_errors import RequestError
from rayk.scheduler.admission.queue import AdmissionQueue, QueueEntry
from rayk.scheduler.admission.watermarks import Watermarks
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import Router
from rayk.values import told

log = logging.getLogger("rayk.scheduler")


class AdmissionOutcome(NamedTuple):
    """What became of a request: placed, with whatever says how, or turned away with an error."""

    request_id: str
    replica: int
    outcome: Any = None
    error: RaykError | None = None


class QueuedRequest(NamedTuple):
    """Who waits: a driver's request, and what it is for those who admit it."""

    client: str
    wish: Callable[[], RouteRequest]
    what: Any


class Admitted(NamedTuple):
    """A request that is let in, and where; it counts there from now on."""

    ticket: QueueEntry
    replica: int
    wish: RouteRequest

    @property
    def queued(self) -> QueuedRequest:
        """Whose it is."""
        queued: QueuedRequest = self.ticket.payload
        return queued


class AdmissionController:
    """`router` chooses the replicas; `clock` in seconds."""

    def __init__(self, policy: AdmissionPolicy, router: Router, page_size: int, clock: Callable[[], float]) -> None:
        self.queue = AdmissionQueue(policy, clock)
        self.watermarks = Watermarks(policy, router.loads, page_size)
        self._router = router
        self._page_size = page_size
        self._tickets: dict[str, QueueEntry] = {}  # who waits, by id
        self._open: dict[str, set[str]] = {}  # by driver, what it offered and is not settled
        self._fates: dict[str, list[AdmissionOutcome]] = {}  # by driver, until it asks

    # -- coming ------------------------------------------------------------------------------------

    def offer(self, queued: QueuedRequest, request_id: str, tokens: int, output: int, traits: Traits) -> None:
        """A request of so many tokens, which may generate `output` more, comes in or is turned away."""
        pages, mine = -(-(tokens + 1) // self._page_size), self._open.setdefault(queued.client, set())
        try:
            if request_id in self._tickets or request_id in mine:
                raise AlreadyClaimedError(request_id, -1)
            mine.add(request_id)
            if not self._hopeful:
                raise NoReplicaError(request_id)
            self._tickets[request_id] = self.queue.offer(
                request_id, pages, traits.tenant, traits.priority, traits.deadline, queued,
                most=self.watermarks.most, room=self.watermarks.fits(pages), output=output,
            )  # fmt: skip
        except AlreadyClaimedError as error:  # the other one's fate is still to come
            self.reject(queued.client, AdmissionOutcome(request_id, -1, None, error))
        except RaykError as error:
            self.settle(queued.client, AdmissionOutcome(request_id, -1, None, error))

    def give_up(self, client: str, request_ids: Iterable[str]) -> None:
        """The driver does not want those any more. What was let in already stays its own."""
        for request_id in request_ids:
            ticket = self._tickets.get(request_id)
            if ticket is not None and ticket.payload.client == client and self.queue.give_up(ticket):
                self._turn_away(ticket, OverloadedError(request_id, "it was given up", 0.0))

    def expire(self) -> None:
        """Turn away who cannot be served in time, and everybody when there is no replica left."""
        if self._tickets and not self._hopeful:
            for ticket in list(self._tickets.values()):
                self.queue.give_up(ticket)
                self._turn_away(ticket, NoReplicaError(ticket.request_id))
        for ticket, error in self.queue.expire():
            self._turn_away(ticket, error)

    @property
    def _hopeful(self) -> bool:
        """Whether a replica takes requests, or will when it answers again."""
        loads = self._router.loads
        return bool(loads.ready.any() or loads.away.any())

    def _turn_away(self, ticket: QueueEntry, error: RaykError) -> None:
        if self._tickets.get(ticket.request_id) is ticket:
            del self._tickets[ticket.request_id]
            self.settle(ticket.payload.client, AdmissionOutcome(ticket.request_id, -1, None, error))

    # -- going in ----------------------------------------------------------------------------------

    def next(self) -> Admitted | None:
        """Let the next one in, if there is room. Nobody may be placed between this and Placer.add()."""
        ticket = self.queue.take(self.watermarks.fits)
        if ticket is None:
            return None
        del self._tickets[ticket.request_id]
        try:
            wish: RouteRequest = ticket.payload.wish()
            replica = self._router.choose(ticket.request_id, wish, self.watermarks.open(ticket.pages))
            assert replica >= 0, "a replica is below its marks"
        except Exception as raised:  # a policy of somebody's own: a matter of this request alone
            log.warning("request %r cannot be placed", ticket.request_id, exc_info=raised)
            failed = RequestError(ticket.request_id, f"it cannot be placed: {told(raised)}")
            self.failed(Admitted(ticket, -1, RouteRequest(0)), failed)
            return self.next()
        self.watermarks.promise(replica, ticket.pages)
        return Admitted(ticket, replica, wish)

    def answered(self, admitted: Admitted) -> None:
        """The replica has answered, or never will; to be called once."""
        self.watermarks.settle_promise(admitted.replica, admitted.ticket.pages)

    def placed(self, admitted: Admitted, outcome: Any) -> None:
        """It is claimed and has its pages."""
        request_id = admitted.ticket.request_id
        self.settle(admitted.queued.client, AdmissionOutcome(request_id, admitted.replica, outcome))

    def refused(self, admitted: Admitted, error: RaykError) -> None:
        """Its replica had no room after all, or was lost: its turn comes again, unless it has left meanwhile."""
        if self.queue.returned(admitted.ticket):
            self._tickets[admitted.ticket.request_id] = admitted.ticket
        else:
            self.settle(
                admitted.queued.client, AdmissionOutcome(admitted.ticket.request_id, admitted.replica, None, error)
            )

    def failed(self, admitted: Admitted, error: RaykError) -> None:
        """It could not be placed."""
        self.queue.forget(admitted.ticket.request_id)
        self.settle(admitted.queued.client, AdmissionOutcome(admitted.ticket.request_id, admitted.replica, None, error))

    # -- hearing and leaving -----------------------------------------------------------------------

    def settle(self, client: str, fate: AdmissionOutcome) -> None:
        """Keep what became of a request for its driver, unless that is gone."""
        mine = self._open.get(client)
        if mine is not None and fate.request_id in mine:
            mine.discard(fate.request_id)
            self._fates.setdefault(client, []).append(fate)

    def reject(self, client: str, fate: AdmissionOutcome) -> None:
        """Keep why a request was not even looked at."""
        self._fates.setdefault(client, []).append(fate)

    def settled(self, client: str) -> tuple[list[AdmissionOutcome], int]:
        """What became of the driver's requests since it asked last, and of how many that is not known yet."""
        mine = self._open.get(client)
        if mine is not None and not mine:
            del self._open[client]
        return self._fates.pop(client, []), len(mine or ())

    def unknown(self, client: str, request_ids: Iterable[str]) -> list[str]:
        """Those of the driver's requests that neither wait nor are settled."""
        known = {*self._open.get(client, ()), *(fate.request_id for fate in self._fates.get(client, ()))}
        return [request_id for request_id in request_ids if request_id not in known]

    def on_release(self, request_ids: Iterable[str]) -> None:
        """Those have no place any more; unknown ones are ignored."""
        for request_id in request_ids:
            self.queue.left(request_id)

    def on_replica_lost(self, replica: int, request_ids: Iterable[str]) -> None:
        """A replica is gone, with those requests."""
        self.watermarks.forget(replica)
        for request_id in request_ids:
            self.queue.forget(request_id)

    def drop(self, client: str) -> None:
        """The driver is gone: nobody waits for it any more."""
        for request_id, ticket in list(self._tickets.items()):
            if ticket.payload.client == client:
                self.queue.give_up(ticket)  # or it lost its place already
                del self._tickets[request_id]
        self._fates.pop(client, None)
        self._open.pop(client, None)

    def state(self) -> AdmissionState:
        """A snapshot of the queue."""
        return self.queue.state()

    def check_integrity(self) -> None:
        """AssertionError when the queue's books or the tickets are wrong."""
        self.queue.check_integrity()
        assert len(self._tickets) == len(self.queue)
        assert all(request_id in self._open[t.payload.client] for request_id, t in self._tickets.items())
