"""The requests of one driver of a Cluster, between their submission and their end: prompts, answers so far, handles.

    asked for -> placed -> over
        ^          |
        +----------+    its replica was lost (a retry), or hands it over (none): prompt and answer so far are the prompt

The scheduler (rayk.scheduler.serving), in this process or not, says where each goes; prompts go straight to that
replica, and tokens come straight from it. What goes wrong with one request here (it cannot be sent) ends that request,
never the thread that found out.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from rayk.dispatch.output import Handle, deliver, end_as_reported
from rayk.dispatch.pending_copies import PendingCopies
from rayk.errors import RaykError, ReplicaLostError
from rayk.protocol.engine import Ask, Cancel, Command, Ended, Report, Submit
from rayk.protocol.engine_request import Imports, Request
from rayk.protocol.serving import PlaceRequest
from rayk.request_errors import RequestCancelledError, RequestError
from rayk.scheduler.serving.engine_scripts import EngineScripts
from rayk.scheduler.serving.requests import PlacedRequest, RefusedRequest
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.values import told

log = logging.getLogger("rayk.engine")

MESSAGE_BYTES = 90_000  # of one message: beyond 100 KiB Ray goes through its object store, which costs twice

Batch = list[tuple[Handle, Ask]]  # of one replica


class Scheduler(Protocol):
    """Who says where requests go. All of it is called in a turn of the requests, and must not block."""

    def place(self, wants: Sequence[PlaceRequest]) -> None:
        """These want a place."""
        ...

    def drop(self, tickets: Sequence[int]) -> None:
        """These are over, and no replica has them."""
        ...

    def on_report(self, replica: int, report: Report, first: Sequence[int]) -> None:
        """A report came, with the first tokens of the requests with those tickets."""
        ...

    def take(self) -> tuple[list[PlacedRequest], list[RefusedRequest]]:
        """What it says by now; asked at the end of each turn."""
        ...


class Requests:
    """Safe to use from several threads. `post` sends a command to a replica and must not block; `max_retries`: how
    often a request may lose its replica; `tickets` number attempts, and queries to replicas; `here()` are the replicas
    that answer, `hopeful()` says whether there are any, or will be; copies go over the lines of `transfers()`."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        scheduler: Scheduler,
        max_retries: int,
        clock: Callable[[], float],
        tickets: Iterator[int],
        here: Callable[[], Collection[int]],
        hopeful: Callable[[], bool],
        transfers: Callable[[], PageTransfers],
    ) -> None:
        self._post = post
        self._scheduler = scheduler
        self._max_retries = max_retries
        self._clock = clock
        self._tickets = tickets
        self._hopeful = hopeful
        self._handles: dict[int, Handle] = {}  # by ticket; those that are not over
        self._ids: set[str] = set()
        self._abandoned: deque[Sequence[Handle]] = deque()  # to be cancelled by whoever has the lock next
        self._inside = 0  # the thread that is in a _turn()
        self._over: list[tuple[Handle, RaykError]] = []  # to be told their end once the lock is free
        self._lock = threading.RLock()
        self._scripts = EngineScripts(post, here, tickets)
        self._copies = PendingCopies(self._scripts, self._send, transfers, clock)
        self.closed = False

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
                    self._settle()
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
            wants = []
            for handle in handles:
                if handle.done:
                    continue
                if self.closed:
                    self._over.append((handle, RequestCancelledError(handle.id, 0)))
                elif handle.id in self._ids:
                    used = RequestError(handle.id, "this id is in use; wait for its end or take another")
                    self._over.append((handle, used))
                else:
                    handle.ticket = next(self._tickets)
                    self._handles[handle.ticket] = handle
                    self._ids.add(handle.id)
                    wants.append(self._want(handle))
            self._scheduler.place(wants)

    def _want(self, handle: Handle, again: int = 0) -> PlaceRequest:
        left = handle.timeout
        if left is not None:
            left -= self._clock() - handle.submitted_at
        return PlaceRequest(
            handle.ticket,
            handle.id,
            len(handle.prompt) + len(handle.tokens),
            handle.sampling.max_new_tokens,
            handle.call,
            self._keys(handle),
            handle.session,
            handle.tenant,
            handle.priority,
            handle.deadline,
            handle.timeout,
            left,
            again,
            handle.first.ticket if handle.first is not None else 0,
        )

    def _keys(self, handle: Handle) -> bytes:
        """Keys of the pages of its prompt, for a scheduler that cannot ask for them later."""
        return b""

    def _ask_again(self, handles: Sequence[Handle]) -> None:
        """Those lost their places: they are the next ones, the last of them first."""
        wants = []
        for handle in handles:
            before = handle.ticket
            self._copies.forget(before)
            del self._handles[before]
            handle.begin_again(next(self._tickets))
            self._handles[handle.ticket] = handle
            wants.append(self._want(handle, before))
        self._scheduler.place(wants)

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
            if self._handles.get(handle.ticket) is not handle:
                continue
            if handle.replica is not None and not self._copies.waits(handle.ticket):
                handle.unwanted = True  # should it leave its replica before it hears of this
                told.setdefault(handle.replica, []).append(handle.ticket)
            else:
                self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
        for replica, tickets in told.items():
            self._post(replica, Cancel(tickets))

    def _end(self, handle: Handle, error: RaykError) -> None:
        self._scheduler.drop([handle.ticket])
        self._forget(handle)
        self._over.append((handle, error))

    def _forget(self, handle: Handle) -> None:
        if self._handles.pop(handle.ticket, None) is not None:
            self._ids.discard(handle.id)
        self._copies.forget(handle.ticket)

    def close(self) -> list[Handle]:
        """Take and place nothing any more; the requests that were not over, which are forgotten."""
        with self._lock:
            self.closed = True
            left = list(self._handles.values())
            self._handles.clear()
            self._ids.clear()
        return left

    # -- what the scheduler says -------------------------------------------------------------------------

    def _settle(self) -> None:
        """At the end of each turn."""
        placed, refused = self._scheduler.take()
        while placed or refused:  # one that cannot be sent makes room for another
            self._carry_out(placed, refused)
            placed, refused = self._scheduler.take()

    def _carry_out(self, placed: Sequence[PlacedRequest], refused: Sequence[RefusedRequest]) -> None:
        """Send requests to their replicas, and end those that get no place."""
        for ticket, error in refused:
            handle = self._handles.get(ticket)
            if handle is not None:
                self._forget(handle)
                self._over.append((handle, error))
        batches: dict[int, Batch] = {}
        for ticket, replica, spans in placed:
            handle = self._handles.get(ticket)
            if handle is None or handle.replica is not None:
                continue  # it was dropped meanwhile, which the scheduler hears, too; or that was said twice
            handle.replica, handle.prefilling = replica, True
            if handle.trace is not None:
                handle.trace.mark("placed")
            try:
                if spans:
                    self._copies.order(handle, spans)
                else:
                    batches.setdefault(replica, []).append((handle, self._ask(handle)))
            except Exception as raised:
                self._fail(handle, raised)
        for replica, batch in batches.items():
            for part in _parts(batch):
                self._submit(replica, part)

    def _submit(self, replica: int, batch: Batch) -> None:
        """Where a message cannot be sent, each of its requests gets one of its own: only the one at fault ends."""
        try:
            self._post(replica, Submit([ask for _, ask in batch]))
        except Exception as raised:
            if len(batch) == 1:
                self._fail(batch[0][0], raised)
                return
            for each in batch:
                self._submit(replica, [each])

    def _fail(self, handle: Handle, raised: Exception) -> None:
        log.warning("request %r cannot be sent", handle.id, exc_info=raised)
        self._end(handle, RequestError(handle.id, f"it cannot be placed or sent: {told(raised)}"))

    def _send(self, handle: Handle, imports: Imports | None) -> None:
        """A request goes to its replica, with what others have pinned for it or without."""
        assert handle.replica is not None
        self._submit(handle.replica, [(handle, self._ask(handle, imports))])

    def _ask(self, handle: Handle, imports: Imports | None = None) -> Ask:
        if handle.trace is not None:
            handle.trace.mark("sent")
        tokens, left = handle.prompt, handle.timeout
        if handle.tokens:
            tokens = np.concatenate((tokens, np.array(handle.tokens, np.int32)))
        if left is not None:
            left = max(1e-3, left - (self._clock() - handle.submitted_at))
        return Ask.of(
            Request(
                handle.ticket,
                handle.id,
                tokens,
                handle.sampling,
                len(handle.tokens),
                left,
                handle.stream_text,
                handle.cache_salt,
                imports=imports,
            )
        )

    # -- what replicas say -----------------------------------------------------------------------------

    def on_report(self, replica: int, report: Report) -> None:
        """A replica's next report."""
        first = deliver(report, self._handles)
        ended: list[tuple[Handle, Ended]] = []
        try:
            with self._turn():
                if report.answered:
                    self._scripts.on_report(report)
                self._copies.on_report(report)
                ended = [(self._handles[e.number], e) for e in report.ended if e.number in self._handles]
                moved = []
                for handle, end in ended:
                    if end.moved:
                        handle.record_end(end)
                        moved.append(handle)
                    else:
                        self._forget(handle)
                self._scheduler.on_report(replica, report, first)
                if moved:
                    self._moved(moved)
        finally:  # they are forgotten: nobody else would tell them
            for handle, end in ended:
                if not end.moved:
                    end_as_reported(handle, end)

    def _moved(self, handles: Sequence[Handle]) -> None:
        """Their replica let go of them, in this order."""
        for handle in handles:
            if handle.unwanted:
                self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
        self._ask_again([handle for handle in reversed(handles) if not handle.unwanted])

    def _lost(self, replica: int, reason: str) -> None:
        """A replica is gone: what it had goes on elsewhere, as often as was allowed."""
        self._scripts.lose(replica)
        again, ended = [], 0
        for handle in reversed([handle for handle in self._handles.values() if handle.replica == replica]):
            if handle.unwanted:
                self._end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
            elif handle.retries >= self._max_retries or not self._hopeful():
                ended += 1
                self._end(handle, ReplicaLostError(replica, 0, [handle.id], reason))
            else:
                handle.retries += 1
                again.append(handle)
        if again or ended:
            log.warning("replica %d is lost: %d request(s) go on elsewhere, %d end with it", replica, len(again), ended)
        self._ask_again(again)


def _parts(batch: Batch) -> Iterator[Batch]:
    """Split so that a message stays small, unless one request is large."""
    part: Batch = []
    size = 0
    for handle, ask in batch:
        if part and size + len(ask.tokens) > MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append((handle, ask))
        size += len(ask.tokens) + 100
    if part:
        yield part
