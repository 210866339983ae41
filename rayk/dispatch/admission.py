"""Admission by policy for the requests of a Cluster: the controller of the managers, with the Cluster as its driver.

A page is promised from the moment that a request is placed until its first token: from then on it is among those that
its replica reports in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rayk.dispatch.output import Handle
from rayk.errors import RaykError
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.contexts import Traits
from rayk.scheduler.admission.controller import AdmissionController, Admitted, QueuedRequest
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.replica_loads import BoolArray
from rayk.scheduler.router.router import Router

_CLIENT = ""  # the one driver


class ClusterAdmission:
    """See the module; `clock` in seconds."""

    def __init__(self, policy: AdmissionPolicy, router: Router, page_size: int, clock: Callable[[], float]) -> None:
        self._controller = AdmissionController(policy, router, page_size, clock)
        self._page_size = page_size
        self._offered: dict[str, Handle] = {}  # that wait, by id
        self._refused: dict[int, tuple[Handle, RaykError]] = {}  # and their end is still to be told
        self._promised: dict[str, tuple[int, int]] = {}  # by id: the replica, and pages promised there
        self._reports = 0

    def _pages(self, request: RouteRequest) -> int:
        return -(-(request.tokens + 1) // self._page_size)

    # -- requests ------------------------------------------------------------------------------------

    def offer(self, handle: Handle, request: RouteRequest) -> None:
        """A new request waits, or is among those turned_away()."""
        self._offered[handle.id] = handle
        traits = Traits(tenant=handle.tenant, priority=handle.priority, deadline=handle.deadline)
        queued = QueuedRequest(_CLIENT, lambda: request, handle)
        self._controller.offer(queued, handle.id, request.tokens, handle.sampling.max_new_tokens, traits)

    def turned_away(self) -> Iterator[tuple[Handle, RaykError]]:
        """Those that will not be served, with the reason."""
        self._controller.expire()
        self._collect()
        while self._refused:
            yield self._refused.pop(next(iter(self._refused)))

    def _collect(self) -> None:
        for outcome in self._controller.settled(_CLIENT)[0]:
            handle = self._offered.pop(outcome.request_id, None)
            if handle is not None and outcome.error is not None:
                self._refused[handle.number] = handle, outcome.error

    def next(self) -> Admitted | None:
        """Whose turn it is, and where it goes; None while nobody has room."""
        admitted = self._controller.next()
        if admitted is not None:
            self._controller.placed(admitted, None)
            self._promised[admitted.ticket.request_id] = (admitted.replica, admitted.ticket.pages)
        return admitted

    def forget(self, handle: Handle) -> None:
        """A request is over, wherever it was."""
        self._refused.pop(handle.number, None)
        if self._offered.pop(handle.id, None) is not None:
            self._controller.give_up(_CLIENT, [handle.id])
            self._collect()  # before another one has this id
        self._controller.on_release([handle.id])

    # -- replicas ------------------------------------------------------------------------------------

    def open(self, request: RouteRequest) -> BoolArray:
        """Which replicas would take a request that lost its place, [replicas]."""
        return self._controller.watermarks.open(self._pages(request))

    def promise(self, request_id: str, replica: int, request: RouteRequest) -> None:
        """A request goes to that replica; next() has promised its pages already."""
        if request_id not in self._promised:
            self._promised[request_id] = (replica, self._pages(request))
            self._controller.watermarks.promise(*self._promised[request_id])

    def settle_promise(self, request_id: str) -> None:
        """Its pages are among those that its replica reports, or it left; unknown ones are ignored."""
        promised = self._promised.pop(request_id, None)
        if promised is not None:
            self._controller.watermarks.settle_promise(*promised)

    def report(self, replica: int, used: int) -> None:
        """A replica has so many pages in use."""
        self._reports += 1
        self._controller.watermarks.report(replica, self._reports, used)

    def replica_gone(self, replica: int) -> None:
        """Nothing is in use or promised there any more."""
        self._promised = {i: each for i, each in self._promised.items() if each[0] != replica}
        self._controller.watermarks.forget(replica)

    def state(self) -> AdmissionState:
        """A snapshot of the queue."""
        return self._controller.state()

    def check_integrity(self) -> None:
        """AssertionError when the books of the queue are wrong."""
        self._controller.check_integrity()
