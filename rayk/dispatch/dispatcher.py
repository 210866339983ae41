"""Requests of a Cluster between their submission and their end: they wait here, are placed on a replica, may have to
leave it, and are over. No threads and no transport: commands go out through `post`, reports come in by on_report().

    waiting -> placed -> over
       ^          |
       +----------+    its replica was lost (a retry), or hands it over (none): prompt and answer so far are the prompt

What goes wrong with one request here (it cannot be placed or sent) ends that request, never the thread that found out.
Replicas come and go as rayk.scheduler.membership says.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic

from rayk import protocol as m
from rayk.dispatch.engine_scripts import EngineScripts
from rayk.dispatch.evacuation import Evacuations
from rayk.dispatch.output import Handle, deliver, end_as_reported
from rayk.dispatch.placing import Placing
from rayk.errors import DrainError, NoPlaceError, RaykError, ReplicaLostError, ReplicaStateError
from rayk.protocol.admission import AdmissionState
from rayk.protocol.engine import Cancel, Command, Ended, HandOver, Query, Report
from rayk.request_errors import RequestCancelledError, RequestError
from rayk.scheduler.lifecycle import ReplicaLifecycle
from rayk.scheduler.membership import HERE, Membership, State
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.scaling import Removed
from rayk.scheduler.supervisor import Replacement, Supervisor
from rayk.transport.choice import Endpoint
from rayk.values import told

log = logging.getLogger("rayk.engine")

OFFER_SECONDS = 60.0  # after which a replica goes though somebody has not answered; no round begins after half of it


class Dispatcher:
    """Safe to use from several threads. `settings` are its router's; `post` sends a command to a replica and must not
    block; `max_retries`: how often a request may lose its replica. With `replace` lost replicas are wanted back."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        settings: RouterSettings,
        max_retries: int,
        clock: Callable[[], float] = monotonic,
        replace: bool = False,
    ) -> None:
        self._post = post
        self.router = settings.make(clock)
        self.members = Membership([1] * len(settings.pages))
        self._lifecycle = ReplicaLifecycle(self.members, self.router, self._ids_on, lambda ids: None, settings)
        self._lifecycle.on_replica_gone = lambda replica, ids: self._placing.replica_gone(replica)
        self._supervisor = Supervisor(self._lifecycle, clock, replace)
        self._max_retries = max_retries
        self._clock = clock
        self._handles: dict[int, Handle] = {}  # not over
        self._ids: set[str] = set()
        self._abandoned: deque[Sequence[Handle]] = deque()  # to be cancelled by whoever has the lock next
        self._inside = 0  # the thread that is in a _turn()
        self._over: list[tuple[Handle, RaykError]] = []  # to be told their end once the lock is free
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)  # a request left its replica
        self._why_lost = ""
        self.closed = False
        members = self.members
        self._scripts = EngineScripts(post, lambda: members.here)
        self._placing = Placing(post, self._scripts, self.router, settings, clock, self._end)
        self._evacuations = Evacuations(self._scripts, self.router, lambda: members.ready, self._left.notify_all, clock)

    # -- requests ------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock; afterwards tell those that are over by then, whoever ended them."""
        over: list[tuple[Handle, RaykError]] = []
        try:
            with self._lock:
                before, self._inside = self._inside, threading.get_ident()
                try:
                    yield
                finally:
                    over, self._inside = self._leave(), before
        finally:
            for handle, error in over:
                handle.end(error)

    def _leave(self) -> list[tuple[Handle, RaykError]]:
        while self._abandoned:
            self._cancel(self._abandoned.popleft())
        over, self._over = self._over, []
        return over

    def submit(self, handles: Sequence[Handle]) -> None:
        """Take new requests. One whose id is in use is refused: it ends with a RequestError."""
        with self._turn():
            for handle in handles:
                if handle.done:
                    continue
                if self.closed:
                    self._over.append((handle, RequestCancelledError(handle.id, 0)))
                elif handle.id in self._ids:
                    used = RequestError(handle.id, "this id is in use; wait for its end or take another")
                    self._over.append((handle, used))
                else:
                    self._handles[handle.number] = handle
                    self._ids.add(handle.id)
                    self._placing.add(handle)
            self._pump()

    def cancel(self, *handles: Handle) -> None:
        """End requests; those that are over are left alone."""
        with self._turn():
            self._cancel(handles)

    def abandon(self, handles: Sequence[Handle]) -> None:
        """cancel(), from wherever somebody's generator is collected: waits for no lock. Who holds it now, or at the
        latest the next one that hears of a replica, ends them."""
        self._abandoned.append(handles)
        if self._inside == threading.get_ident() or not self._lock.acquire(blocking=False):
            return
        try:
            over = self._leave()
        finally:
            self._lock.release()
        for handle, error in over:
            handle.end(error)

    def _cancel(self, handles: Sequence[Handle]) -> None:
        told: dict[int, list[int]] = {}
        for handle in handles:
            if handle.number not in self._handles:
                continue
            if handle.replica is not None and not self._placing.copies.waits(handle.number):
                handle.unwanted = True  # should it leave its replica before it hears of this
                told.setdefault(handle.replica, []).append(handle.number)
            else:
                self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
        for replica, numbers in told.items():
            self._post(replica, Cancel(numbers))

    def _end(self, handle: Handle, error: RaykError) -> None:
        self._forget(handle)
        self._over.append((handle, error))

    def close(self) -> list[Handle]:
        """Take and place nothing any more; the requests that were not over, which are forgotten."""
        with self._lock:
            self.closed = True
            left = list(self._handles.values())
            self._handles.clear()
            self._ids.clear()
            self._placing.close()
            self._left.notify_all()
        return left

    def _pump(self) -> None:
        """Place what waits; without replicas that answer, now or to come, nothing will be placed."""
        hopeless = not self.members.here and not self._supervisor.hopeful
        for handle in self._placing.waiting.handles if hopeless else ():
            self._end(handle, self._lost_error(handle))
        self._placing.pump()

    def _lost_error(self, handle: Handle) -> RaykError:
        return ReplicaLostError(-1 if handle.replica is None else handle.replica, 0, [handle.id], self._why_lost)

    def _forget(self, handle: Handle) -> None:
        if self._handles.pop(handle.number, None) is not None:
            self._ids.discard(handle.id)
        self._placing.forget(handle)
        self._left.notify_all()

    # -- what replicas say -----------------------------------------------------------------------------

    def on_report(self, replica: int, report: Report) -> None:
        """A replica's next report."""
        first = deliver(report, self._handles)
        ended: list[tuple[Handle, Ended]] = []
        try:
            with self._turn():
                self._placing.report(replica, report, first)
                ended = [(self._handles[e.number], e) for e in report.ended if e.number in self._handles]
                for handle, end in reversed(ended):  # so that those which were handed over wait in their order
                    if end.moved:
                        self._moved(handle, end)
                    else:
                        self._forget(handle)
                if self._placing.waiting:
                    self._pump()
        finally:  # they are forgotten: nobody else would tell them
            for handle, end in ended:
                if not end.moved:
                    end_as_reported(handle, end)

    def _moved(self, handle: Handle, end: Ended) -> None:
        handle.record_end(end)
        if handle.unwanted:
            self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
        else:
            self._wait_again(handle)

    def _wait_again(self, handle: Handle) -> None:
        self._placing.put_back(handle)
        self._left.notify_all()

    def lose(self, replica: int, reason: str) -> None:
        """A replica is gone: what it had goes on elsewhere, as often as was allowed."""
        with self._turn():
            if self.closed or replica not in self.members.known:
                return
            self._why_lost = reason
            epoch = self.members.epochs[replica]
            for lose in (partial(self._supervisor.lose, epoch=epoch, reason=reason), self._scripts.lose):
                try:
                    lose(replica)
                except Exception:  # the requests have to be told whatever it is
                    log.exception("replica %d is lost, and not all took note of it", replica)
            for handle in reversed(self._on(replica)):
                if handle.unwanted:
                    self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
                elif handle.retries >= self._max_retries or not (self.members.here or self._supervisor.hopeful):
                    self._end(handle, self._lost_error(handle))
                else:
                    handle.retries += 1
                    self._wait_again(handle)
            self._pump()
            self._disconnect()
            self._left.notify_all()

    def _on(self, replica: int) -> list[Handle]:
        return [handle for handle in self._handles.values() if handle.replica == replica]

    def _ids_on(self, replica: int) -> list[str]:
        return [handle.id for handle in self._on(replica)]

    # -- replicas that come and go ---------------------------------------------------------------------

    @property
    def states(self) -> list[State]:
        """The state of each replica."""
        with self._lock:
            return self.members.states

    @property
    def live(self) -> list[int]:
        """Replicas that answer: ready and draining ones."""
        with self._lock:
            return list(self.members.here)

    def enlist(self, count: int) -> list[int]:
        """Indices for `count` replicas that are being started: those of lost ones, then new ones."""
        with self._lock:
            return self._started(self._supervisor.enlist(count, ""))

    def take_due(self) -> list[int]:
        """Indices of lost replicas at which others are to be started now, as after enlist()."""
        with self._lock:
            return self._started(self._supervisor.take("")) if not self.closed else []

    def _started(self, replicas: list[int]) -> list[int]:
        for replica in replicas:
            self._lifecycle.start(replica)
        return replicas

    def seconds(self) -> float | None:
        """Until take_due() has something; None when it will not, as far as it is known now."""
        with self._lock:
            return self._supervisor.seconds() if not self.closed else None

    def replacements(self) -> list[Replacement]:
        """What is done about lost replicas."""
        with self._lock:
            return self._supervisor.replacements() if self._supervisor.replaces else []

    def give_up(self, replicas: Sequence[int], error: BaseException) -> None:
        """Those could not be started."""
        with self._turn():
            for replica in replicas:
                self._supervisor.give_up(replica, told(error), isinstance(error, NoPlaceError))
            if not self.closed:
                self._pump()

    def meet(self, replica: int, epoch: int, endpoint: Endpoint | None) -> None:
        """Pages can be copied to and from that replica."""
        with self._turn():
            if self.router.fetching is not None and endpoint is not None:
                self.router.fetching.joined(replica, epoch, endpoint)

    def _disconnect(self) -> None:
        """Have links to replicas that are gone closed at the others."""
        if self.router.fetching is not None:
            for replica, gone in self.router.fetching.links.peers_to_disconnect().items():
                self._post(replica, Query(0, m.DropLines(gone)))

    def join(self, replica: int, pages: int, epoch: int, endpoint: Endpoint | None) -> None:
        """A replica of enlist(), with so many pages, takes requests from now on; see meet()."""
        with self._turn():
            self._supervisor.join(replica, self.members.version, pages)
            self.meet(replica, epoch, endpoint)
            self._pump()

    def drain(self, replica: int, leaving: bool = True) -> None:
        """Give a replica nothing new; what it has goes on there. ReplicaStateError for a lost one. Without `leaving`
        another is to take its place."""
        with self._turn():
            self._supervisor.drain(replica, leaving)

    def resume(self, replica: int) -> None:
        """Let a draining replica take requests again."""
        with self._turn():
            self._supervisor.resume(replica)
            self._pump()

    def check_live(self, replica: int) -> None:
        """Nothing, for a replica that answers: else the error of membership, or ReplicaLostError."""
        with self._lock:
            self.members.check(replica)
            state = self.members.state(replica)
            if state is State.lost:
                raise ReplicaLostError(replica, 0, [], self._why_lost)
            if state not in HERE:
                raise ReplicaStateError(replica, state, "be asked")

    def hand_over(self, replica: int) -> None:
        """Have a draining replica let go of all that it has; on_report() places it elsewhere."""
        with self._turn():
            there, state = self._on(replica), self.members.state(replica)
            assert state is not State.ready
            if state is not State.draining:
                return
            for handle in reversed(there):
                if self._placing.copies.waits(handle.number):  # it has not gone there yet
                    self._wait_again(handle)
            numbers = [handle.number for handle in there if handle.replica == replica]
            if numbers:
                self._post(replica, HandOver(numbers))
            self._pump()

    def offer(self, replica: int) -> None:
        """Begin to offer what a draining replica has cached to those that take requests."""
        with self._turn():
            if self.members.state(replica) is State.draining:
                self._evacuations.begin(replica)

    def explain(self, request_id: str) -> m.Explained:
        """Why a request went where it went; ConfigError when no decision for it is remembered."""
        with self._lock:
            return self.router.explain(request_id)

    def admission_state(self) -> AdmissionState | None:
        """A snapshot of the queue, if there is an admission policy."""
        with self._lock:
            admission = self._placing.admission
            return admission.state() if admission is not None else None

    def remove(self, replica: int, timeout: float | None, offer_seconds: float | None = None) -> Removed:
        """Wait until nothing is on a draining or lost replica, offer others what it has cached, and forget it.

        DrainError when something is still there after `timeout` seconds: it drains on. What was not taken after
        `offer_seconds` (OFFER_SECONDS when None) goes with it.
        """
        with self._turn():
            self._left.wait_for(lambda: self.closed or not self._on(replica), timeout)
            if not (self.closed or self._on(replica) or offer_seconds == 0):
                self.offer(replica)
                patience = OFFER_SECONDS if offer_seconds is None else offer_seconds
                self._left.wait_for(lambda: self.closed or not self._evacuations.under_way(replica), patience)
            removed, left = self._evacuations.end(replica), self._ids_on(replica)
            if left:
                raise DrainError(replica, dict.fromkeys(left, "it runs there"))
            if self.members.state(replica) is State.ready:  # the drain was taken back
                raise ReplicaStateError(replica, State.ready, "be removed")
            self._supervisor.remove(replica)
            self._scripts.lose(replica)
            self._disconnect()
            return removed
