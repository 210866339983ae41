"""Requests of a Cluster between their submission and their end: they wait here, are placed on a replica, may have to
leave it, and are over. No threads and no transport: commands go out through `post`, reports come in through hear().

    waiting -> placed -> over
       ^          |
       +----------+    its replica was lost (a retry), or hands it over (none): prompt and answer so far are the prompt

A replica is ready, draining (it takes nothing new), lost, or removed; an index is used again for the replacement of a
lost one only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from rayk.engine.errors import RequestCancelledError, RequestError, RequestTimeoutError
from rayk.engine.events import Shipped
from rayk.engine.fetches import Fetches
from rayk.engine.offering import Offers
from rayk.engine.output import Handle
from rayk.engine.request import Request
from rayk.engine.wire import Ask, Cancel, Command, Ended, Farewell, HandOver, Report, Submit
from rayk.errors import (
    DrainError,
    RaykError,
    ReplicaIndexError,
    ReplicaLostError,
    ReplicaRemovedError,
    ReplicaStateError,
)
from rayk.scaling import Removed
from rayk.transport.choice import Station

if TYPE_CHECKING:
    from rayk.scheduler.steering import Steering

OFFER_SECONDS = 60.0  # after which a replica goes though somebody has not answered; no round begins after half of it
MESSAGE_BYTES = 90_000  # of one message: beyond 100 KiB Ray goes through its object store, which costs twice


class Standing(StrEnum):
    """How a replica stands; see the module."""

    ready = "ready"
    draining = "draining"
    lost = "lost"
    removed = "removed"


class Dispatcher:
    """Safe to use from several threads. `steering` chooses replicas and is this object's alone; `post` sends a command
    to a replica and must not block; `max_retries`: how often a request may lose its replica."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        steering: Steering,
        replicas: int,
        max_retries: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._post = post
        self.steering = steering
        self._max_retries = max_retries
        self._clock = clock
        self._standing = [Standing.ready] * replicas
        self._handles: dict[int, Handle] = {}  # not over
        self._ids: set[str] = set()
        self._pending: deque[Handle] = deque()
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)  # a request left its replica
        self._why_lost = ""
        self.closed = False
        self._fetches = Fetches(post, self._send, steering, clock)
        self._offers = Offers(post, steering, lambda: self._who(Standing.ready), lambda: self.live, self._tell, clock)

    # -- requests ------------------------------------------------------------------------------------

    def submit(self, handles: Sequence[Handle]) -> None:
        """Take new requests. One whose id is in use is refused: it ends with a RequestError."""
        over: list[tuple[Handle, RaykError]] = []
        with self._lock:
            for handle in handles:
                if handle.done:
                    continue
                if handle.id in self._ids:
                    used = RequestError(handle.id, "this id is in use; wait for its end or take another")
                    over.append((handle, used))
                    continue
                self._handles[handle.number] = handle
                self._ids.add(handle.id)
                self._pending.append(handle)
            over += self._pump()
        _end_all(over)

    def cancel(self, handle: Handle) -> None:
        """End a request; one that is over is left alone."""
        with self._lock:
            if handle.number not in self._handles:
                return
            if handle.replica is not None and not self._fetches.waits(handle.number):
                handle.unwanted = True  # should it leave its replica before it hears of this
                self._post(handle.replica, Cancel([handle.number]))
                return
            if handle.replica is None:
                self._pending.remove(handle)
            self._forget(handle)
        handle.end(RequestCancelledError(handle.id, len(handle.tokens)))

    def close(self) -> list[Handle]:
        """Take and place nothing any more; the requests that were not over, which are forgotten."""
        with self._lock:
            self.closed = True
            left = list(self._handles.values())
            self._handles.clear()
            self._ids.clear()
            self._pending.clear()
            self._left.notify_all()
        return left

    def _pump(self) -> list[tuple[Handle, RaykError]]:
        """Send what waits to replicas with room (the lock is held); what cannot go on any more, to be ended."""
        asks: dict[int, list[Ask]] = {}
        over = self._expired()
        while self._pending and not self.closed:
            handle = self._pending[0]
            if not self.live:
                self._pending.popleft()
                over.append((handle, self._lost_error(handle)))
                self._forget(handle)
                continue
            keys = self.steering.keys(handle.prompt, handle.cache_salt)
            replica = self.steering.place(handle.number, len(handle.prompt), keys, handle.session)
            if replica < 0:
                break
            self._pending.popleft()
            handle.replica = replica
            fetch = self.steering.fetch(handle.number)
            if fetch is None:
                asks.setdefault(replica, []).append(self._ask(handle))
            else:
                self._fetches.order(handle, fetch)
        for replica, batch in asks.items():
            for part in _parts(batch):
                self._post(replica, Submit(part))
        return over

    def _send(self, handle: Handle, shipped: Shipped | None) -> None:
        """A request goes to its replica, with what a peer has for it or without."""
        assert handle.replica is not None
        self._post(handle.replica, Submit([self._ask(handle, shipped)]))

    def _ask(self, handle: Handle, shipped: Shipped | None = None) -> Ask:
        tokens, left = handle.prompt, handle.timeout
        if handle.tokens:
            tokens = np.concatenate((tokens, np.array(handle.tokens, np.int32)))
        if left is not None:
            left = max(1e-3, left - (self._clock() - handle.submitted_at))
        return Ask.of(
            Request(
                handle.number,
                handle.id,
                tokens,
                handle.sampling,
                len(handle.tokens),
                left,
                handle.stream_text,
                handle.cache_salt,
                shipped=shipped,
            )
        )

    def _expired(self) -> list[tuple[Handle, RaykError]]:
        """Requests whose time was up before a replica had room."""
        over: list[tuple[Handle, RaykError]] = []
        if any(handle.timeout is not None for handle in self._pending):
            now, kept = self._clock(), deque[Handle]()
            for handle in self._pending:
                timeout = handle.timeout
                if timeout is not None and timeout <= now - handle.submitted_at:
                    over.append((handle, RequestTimeoutError(handle.id, timeout)))
                    self._forget(handle)
                else:
                    kept.append(handle)
            self._pending = kept
        return over

    def _forget(self, handle: Handle) -> None:
        self._handles.pop(handle.number, None)
        self._ids.discard(handle.id)
        self._fetches.forget(handle.number)
        self.steering.remove(handle.number)
        self._left.notify_all()

    # -- what replicas say -----------------------------------------------------------------------------

    def hear(self, replica: int, report: Report) -> None:
        """A replica's next report."""
        first: list[int] = []
        numbers, tokens = report.columns()
        order = np.argsort(numbers, kind="stable")
        numbers, tokens = numbers[order], tokens[order]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for number, part in zip(numbers[starts].tolist(), np.split(tokens, starts[1:]), strict=False):
            handle = self._handles.get(number)
            if handle is not None:
                if not handle.tokens:
                    first.append(number)
                handle.add(part.tolist(), report.logprobs.get(number, []))
        for number, piece in report.texts:
            if (handle := self._handles.get(number)) is not None:
                handle.add_text(piece)
        over: list[tuple[Handle, RaykError]] = []
        with self._lock:
            self.steering.hear(replica, report.pages)
            self.steering.paces(replica, report.prefill_rate)
            self._fetches.hear(replica, report)
            self._offers.hear(report)
            for number in first:
                self.steering.prefilled(number)
            ended = [(self._handles[e.number], e) for e in report.ended if e.number in self._handles]
            for handle, end in reversed(ended):  # so that those which were handed over wait in their order
                if end.moved:
                    over += self._moved(handle, end)
                else:
                    self._forget(handle)
            if self._pending:
                over += self._pump()
        for handle, end in ended:
            if not end.moved:
                handle.note(end)
                handle.finish(end.reason, end.error, end.text)
        _end_all(over)

    def _moved(self, handle: Handle, end: Ended) -> list[tuple[Handle, RaykError]]:
        handle.note(end)
        if handle.unwanted:
            self._forget(handle)
            return [(handle, RequestCancelledError(handle.id, len(handle.tokens)))]
        self._wait_again(handle)
        return []

    def _wait_again(self, handle: Handle) -> None:
        self._fetches.forget(handle.number)
        self.steering.remove(handle.number)
        handle.replica = None
        self._pending.appendleft(handle)
        self._left.notify_all()

    def lose(self, replica: int, reason: str) -> None:
        """A replica is gone: what it had goes on elsewhere, as often as was allowed."""
        with self._lock:
            if self.closed or self._standing[replica] is Standing.removed:
                return
            self._standing[replica] = Standing.lost
            self._why_lost = reason
            self.steering.lose(replica)
            self._fetches.lose(replica)
            self._offers.lose(replica)
            over: list[tuple[Handle, RaykError]] = []
            for handle in reversed(self._on(replica)):
                if handle.unwanted:
                    over.append((handle, RequestCancelledError(handle.id, len(handle.tokens))))
                    self._forget(handle)
                elif handle.retries >= self._max_retries or not self.live:
                    over.append((handle, self._lost_error(handle)))
                    self._forget(handle)
                else:
                    handle.retries += 1
                    self._wait_again(handle)
            over += self._pump()
            self._farewell()
            self._left.notify_all()
        _end_all(over)

    def _on(self, replica: int) -> list[Handle]:
        return [handle for handle in self._handles.values() if handle.replica == replica]

    def _lost_error(self, handle: Handle) -> RaykError:
        return ReplicaLostError(-1 if handle.replica is None else handle.replica, 0, [handle.id], self._why_lost)

    # -- replicas that come and go ---------------------------------------------------------------------

    @property
    def standing(self) -> list[Standing]:
        """How each replica stands."""
        with self._lock:
            return list(self._standing)

    @property
    def live(self) -> list[int]:
        """Replicas that answer: ready and draining ones."""
        with self._lock:
            return self._who(Standing.ready, Standing.draining)

    def _who(self, *standing: Standing) -> list[int]:
        return [r for r, each in enumerate(self._standing) if each in standing]

    def _tell(self) -> None:
        self._left.notify_all()

    def vacant(self, count: int) -> list[int]:
        """Indices for `count` more replicas: those of lost ones, then new ones."""
        with self._lock:
            lost = [r for r, each in enumerate(self._standing) if each is Standing.lost][:count]
            return lost + list(range(len(self._standing), len(self._standing) + count - len(lost)))

    def meet(self, replica: int, epoch: int, station: Station | None) -> None:
        """Pages can be copied to and from that replica."""
        with self._lock:
            if self.steering.fetching is not None and station is not None:
                self.steering.fetching.joined(replica, epoch, station)

    def _farewell(self) -> None:
        """Have lines to replicas that are gone closed at the others."""
        if self.steering.fetching is not None:
            for replica, gone in self.steering.fetching.lines.farewells().items():
                self._post(replica, Farewell(gone))

    def join(self, replica: int, capacity: int) -> None:
        """A new replica, whose pages hold `capacity` tokens, takes requests from now on; `replica` is from vacant()."""
        with self._lock:
            if replica == len(self._standing):
                self._standing.append(Standing.ready)
            else:
                assert self._standing[replica] is Standing.lost
                self._standing[replica] = Standing.ready
            self.steering.join(replica, capacity)
            over = self._pump()
        _end_all(over)

    def drain(self, replica: int) -> None:
        """Give a replica nothing new; what it has goes on there. ReplicaStateError for a lost one."""
        with self._lock:
            self._expect(replica, "drain")
            self._standing[replica] = Standing.draining
            self.steering.take_off(replica)

    def resume(self, replica: int) -> None:
        """Let a draining replica take requests again."""
        with self._lock:
            self._expect(replica, "take requests again")
            self._standing[replica] = Standing.ready
            self.steering.put_on(replica)
            over = self._pump()
        _end_all(over)

    def _expect(self, replica: int, action: str) -> None:
        self.check(replica)
        if self._standing[replica] is Standing.lost:
            raise ReplicaStateError(replica, Standing.lost, action)

    def check(self, replica: int) -> None:
        """ReplicaIndexError unless there is such a replica, ReplicaRemovedError when there is none any more."""
        with self._lock:
            if not 0 <= replica < len(self._standing):
                raise ReplicaIndexError(replica, len(self._standing))
            if self._standing[replica] is Standing.removed:
                raise ReplicaRemovedError(replica, len(self._standing))

    def hand_over(self, replica: int) -> None:
        """Have a draining replica let go of all that it has; hear() places it elsewhere."""
        with self._lock:
            assert self._standing[replica] is not Standing.ready
            there = self._on(replica)
            if self._standing[replica] is not Standing.draining:
                return
            for handle in reversed(there):
                if self._fetches.waits(handle.number):  # it has not gone there yet
                    self._wait_again(handle)
            numbers = [handle.number for handle in there if handle.replica == replica]
            if numbers:
                self._post(replica, HandOver(numbers))
            over = self._pump()
        _end_all(over)

    def offer(self, replica: int) -> None:
        """Begin to offer what a draining replica has cached to those that take requests."""
        with self._lock:
            if self._standing[replica] is Standing.draining:
                self._offers.begin(replica)

    def remove(self, replica: int, timeout: float | None, offer_seconds: float | None = None) -> Removed:
        """Wait until nothing is on a draining or lost replica, offer others what it has cached, and forget it.

        DrainError when something is still there after `timeout` seconds: it drains on. What was not taken after
        `offer_seconds` (OFFER_SECONDS when None) goes with it.
        """
        with self._lock:
            self._left.wait_for(lambda: self.closed or not self._on(replica), timeout)
            if not (self.closed or self._on(replica) or offer_seconds == 0):
                self.offer(replica)
                patience = OFFER_SECONDS if offer_seconds is None else offer_seconds
                self._left.wait_for(lambda: self.closed or not self._offers.under_way(replica), patience)
            removed, left = self._offers.end(replica), [handle.id for handle in self._on(replica)]
            if left:
                raise DrainError(replica, dict.fromkeys(left, "it runs there"))
            if self._standing[replica] is Standing.ready:  # somebody took the drain back
                raise ReplicaStateError(replica, Standing.ready, "be removed")
            if self._standing[replica] is not Standing.lost:
                self.steering.lose(replica)
                self._fetches.lose(replica)
            self._standing[replica] = Standing.removed
            self._offers.lose(replica)
            self._farewell()
            return removed


def _parts(asks: list[Ask]) -> Iterator[list[Ask]]:
    """Split so that a message stays small, unless one request is large."""
    part: list[Ask] = []
    size = 0
    for ask in asks:
        if part and size + len(ask.tokens) > MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(ask)
        size += len(ask.tokens) + 100
    if part:
        yield part


def _end_all(over: Sequence[tuple[Handle, RaykError]]) -> None:
    for handle, error in over:
        handle.end(error)
