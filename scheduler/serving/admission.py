"""Admission by policy for the requests of a Cluster: the controller of the managers, with the scheduler of the Cluster
as its one driver.

A page is promised from the moment that a request is placed until its first token: from then on it is among those that
its replica reports in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rayk.errors import RaykError
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.contexts import Traits
from rayk.scheduler.admission.controller import AdmissionController, Admitted, QueuedRequest
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.replica_loads import BoolArray
from rayk.scheduler.router.router import Router
from rayk.scheduler.serving.requests import ServedRequest

_CLIENT = ""  # the one driver


class ClusterAdmission:
    """See the module; `clock` in seconds."""

    def __init__(self, policy: AdmissionPolicy, router: Router, page_size: int, clock: Callable[[], float]) -> None:
        self._controller = AdmissionController(policy, router, page_size, clock)
        self._page_size = page_size
        self._offered: dict[str, ServedRequest] = {}  # that wait, by key
        self._refused: dict[str, tuple[ServedRequest, RaykError]] = {}  # and their end is still to be told
        self._promised: dict[str, tuple[int, int]] = {}  # by key: the replica, and pages promised there
        self._reports = 0

    def _pages(self, route: RouteRequest) -> int:
        return -(-(route.tokens + 1) // self._page_size)

    # -- requests ------------------------------------------------------------------------------------

    def offer(self, request: ServedRequest, route: RouteRequest) -> None:
        """A new request waits, or is among those turned_away()."""
        self._offered[request.key] = request
        want = request.want
        traits = Traits(tenant=_tenant(request), priority=want.priority, deadline=want.deadline)
        queued = QueuedRequest(_CLIENT, lambda: route, request)
        self._controller.offer(queued, request.key, route.tokens, want.new_tokens, traits)

    def adopt(self, request: ServedRequest, route: RouteRequest) -> None:
        """A request was let in by another queue; it holds its pages, and its tenant's quota."""
        self._controller.queue.adopt(request.key, self._pages(route), _tenant(request), request.want.new_tokens)

    def lose(self, key: str) -> None:
        """A request lost its replica; should it come again it is adopted."""
        self._controller.queue.forget(key)

    def turned_away(self) -> Iterator[tuple[ServedRequest, RaykError]]:
        """Those that will not be served, with the reason."""
        self._controller.expire()
        self._collect()
        while self._refused:
            yield self._refused.pop(next(iter(self._refused)))

    def _collect(self) -> None:
        for outcome in self._controller.settled(_CLIENT)[0]:
            request = self._offered.pop(outcome.request_id, None)
            if request is not None and outcome.error is not None:
                self._refused[request.key] = request, outcome.error

    def next(self) -> Admitted | None:
        """Whose turn it is, and where it goes; None while nobody has room."""
        admitted = self._controller.next()
        if admitted is not None:
            self._controller.placed(admitted, None)
            self._promised[admitted.ticket.request_id] = (admitted.replica, admitted.ticket.pages)
        return admitted

    def forget(self, key: str) -> None:
        """A request is over, wherever it was."""
        self._refused.pop(key, None)
        if self._offered.pop(key, None) is not None:
            self._controller.give_up(_CLIENT, [key])
            self._collect()  # before another one has this key
        self._controller.on_release([key])

    # -- replicas ------------------------------------------------------------------------------------

    def open(self, route: RouteRequest) -> BoolArray:
        """Which replicas would take a request that lost its place, [replicas]."""
        return self._controller.watermarks.open(self._pages(route))

    def promise(self, key: str, replica: int, route: RouteRequest) -> None:
        """A request goes to that replica; next() has promised its pages already."""
        if key not in self._promised:
            self._promised[key] = (replica, self._pages(route))
            self._controller.watermarks.promise(*self._promised[key])

    def settle_promise(self, key: str) -> None:
        """Its pages are among those that its replica reports, or it left; unknown ones are ignored."""
        promised = self._promised.pop(key, None)
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


def _tenant(request: ServedRequest) -> str | None:
    if request.want.tenant is None and request.driver:  # drivers take turns, too
        return f"driver {request.driver}"
    return request.want.tenant
