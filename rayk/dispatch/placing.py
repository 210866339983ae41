"""Requests of a Cluster on their way to replicas: they wait, are given a place, and are sent, with what a peer has of
their prefix or without.

Without an admission policy calls take turns (rayk.dispatch.waiting) while a replica has room by the router's limit;
with one, rayk.dispatch.admission says whose turn it is. Requests that lost their place go first in both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rayk.dispatch.admission import ClusterAdmission
from rayk.dispatch.engine_scripts import EngineScripts
from rayk.dispatch.output import Handle
from rayk.dispatch.pending_copies import PendingCopies
from rayk.dispatch.waiting import Waiting
from rayk.errors import RaykError
from rayk.protocol.engine import Ask, Command, Report, Submit
from rayk.protocol.engine_request import Imports, Request
from rayk.request_errors import RequestError, RequestTimeoutError
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.replica_loads import BoolArray
from rayk.scheduler.router.router import Router, RouterSettings
from rayk.values import told

log = logging.getLogger("rayk.engine")

MESSAGE_BYTES = 90_000  # of one message: beyond 100 KiB Ray goes through its object store, which costs twice

Batches = dict[int, list[tuple[Handle, Ask]]]  # by replica, what is to be sent there


class Placing:
    """The dispatcher's, under its lock. `end` ends a request that cannot go on."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        scripts: EngineScripts,
        router: Router,
        settings: RouterSettings,
        clock: Callable[[], float],
        end: Callable[[Handle, RaykError], None],
    ) -> None:
        self.waiting = Waiting()
        self.copies = PendingCopies(scripts, self._send, router, clock)
        self.admission: ClusterAdmission | None = None
        """Whose turn it is, if there is a policy."""
        if settings.admission is not None:
            self.admission = ClusterAdmission(settings.admission, router, settings.page_size, clock)
        self._post = post
        self._scripts = scripts
        self._router = router
        self._clock = clock
        self._end = end
        self._batches: Batches = {}  # that pump() sends

    def add(self, handle: Handle) -> None:
        """A new request."""
        if self.admission is None:
            self.waiting.add(handle)
            return
        self.waiting.enter(handle)
        try:
            self.admission.offer(handle, self._request(handle))
        except Exception as raised:
            self._fail(handle, raised)
        self._admit(self.admission)  # what finds room makes no other wait

    def put_back(self, handle: Handle) -> None:
        """It lost its place: it is the next one."""
        self._leave(handle)
        handle.replica = None
        self.waiting.put_back(handle)

    def close(self) -> None:
        """Nothing is placed any more."""
        self.waiting.clear()
        self.admission = None

    def forget(self, handle: Handle) -> None:
        """It is over."""
        self._leave(handle)
        self.waiting.remove(handle)
        if self.admission is not None:
            self.admission.forget(handle)

    def _leave(self, handle: Handle) -> None:
        self.copies.forget(handle.number)
        self._router.remove(handle.id)
        if self.admission is not None:
            self.admission.settle_promise(handle.id)

    # -- what replicas say ---------------------------------------------------------------------------

    def report(self, replica: int, report: Report, first: Sequence[str]) -> None:
        """A replica's report, in which the requests `first` have their first tokens."""
        self._router.apply_cache_changes(replica, report.pages)
        self._router.set_prefill_rate(replica, report.prefill_rate)
        self._scripts.on_report(report)
        self.copies.on_report(report)
        self._router.prefilled(replica, first)
        if self.admission is not None:
            self.admission.report(replica, report.used_pages)
            for request_id in first:
                self.admission.settle_promise(request_id)

    def replica_gone(self, replica: int) -> None:
        """It is lost or removed, or another one takes its place."""
        if self.admission is not None:
            self.admission.replica_gone(replica)

    # -- placing -------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send what waits to replicas with room; end what cannot go on any more."""
        for handle in self.waiting.late(self._clock()):
            self._end(handle, RequestTimeoutError(handle.id, handle.timeout or 0.0))
        while (first := self.waiting.first()) is not None:
            try:
                if not self._choose(first):
                    break
            except Exception as raised:
                self._fail(first, raised)
        if self.admission is not None:
            self._admit(self.admission)
        batches, self._batches = self._batches, {}
        for replica, batch in batches.items():
            for part in _parts([each for each in batch if not each[0].unwanted]):
                self._submit(replica, part)

    def _admit(self, admission: ClusterAdmission) -> None:
        for handle, error in admission.turned_away():
            self._end(handle, error)
        while self.waiting.first() is None and (admitted := admission.next()) is not None:
            chosen: Handle = admitted.queued.what
            try:
                self._place(chosen, admitted.replica, admitted.wish)
            except Exception as raised:
                self._fail(chosen, raised)
        for handle, error in admission.turned_away():
            self._end(handle, error)

    def _request(self, handle: Handle) -> RouteRequest:
        make = self._router.keys
        keys = make.of(handle.prompt.tobytes(), (handle.cache_salt, None)) if make is not None else ()
        return RouteRequest(len(handle.prompt) + len(handle.tokens), keys, handle.session)

    def _choose(self, handle: Handle) -> bool:
        """Find a request a place; False when no replica has room."""
        request = self._request(handle)
        open_ = self.admission.open(request) if self.admission is not None else None
        replica = self._beside(handle, request, open_)
        if replica < 0 and (open_ is None or open_.any()):
            replica = self._router.choose(handle.id, request, open_)
        if replica < 0:
            return False
        self._place(handle, replica, request)
        return True

    def _beside(self, handle: Handle, request: RouteRequest, open_: BoolArray | None) -> int:
        """The replica where another answer to the same prompt is made, whose pages it shares; -1 without, or where
        that one takes no more."""
        if handle.first is None or (replica := handle.first.replica) is None or handle.first.done:
            return -1
        there = np.arange(len(self._router.loads)) == replica
        there &= self._router.loads.ready if open_ is None else self._router.loads.ready & open_
        return self._router.choose(handle.id, request, there) if there.any() else -1

    def _place(self, handle: Handle, replica: int, request: RouteRequest) -> None:
        """Count the request at its replica; pump() sends it, unless it waits for a copy."""
        router = self._router
        spans = router.fetching.plan(replica, request.keys) if router.fetching is not None and request.keys else ()
        router.place(handle.id, replica, request, spans[-1].stop if spans else 0)
        self.waiting.take(handle)
        handle.replica, handle.prefilling = replica, True
        if self.admission is not None:
            self.admission.promise(handle.id, replica, request)
        if spans:
            self.copies.order(handle, spans)
        else:
            self._batches.setdefault(replica, []).append((handle, self._ask(handle)))

    # -- sending -------------------------------------------------------------------------------------

    def _submit(self, replica: int, batch: list[tuple[Handle, Ask]]) -> None:
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
        log.warning("request %r cannot be placed", handle.id, exc_info=raised)
        self._end(handle, RequestError(handle.id, f"it cannot be placed or sent: {told(raised)}"))

    def _send(self, handle: Handle, imports: Imports | None) -> None:
        """A request goes to its replica, with what others have pinned for it or without."""
        assert handle.replica is not None
        self._submit(handle.replica, [(handle, self._ask(handle, imports))])

    def _ask(self, handle: Handle, imports: Imports | None = None) -> Ask:
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
                imports=imports,
            )
        )


def _parts(batch: list[tuple[Handle, Ask]]) -> Iterator[list[tuple[Handle, Ask]]]:
    """Split so that a message stays small, unless one request is large."""
    part: list[tuple[Handle, Ask]] = []
    size = 0
    for handle, ask in batch:
        if part and size + len(ask.tokens) > MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append((handle, ask))
        size += len(ask.tokens) + 100
    if part:
        yield part
