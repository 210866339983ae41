"""Prefixes of placed requests that peers copy: ordered at their source, told to their target, and taken back.

    ordered  --Shipped-->  on its way with its request  --Arrived, or the request's end-->  unpinned

While a copy is only ordered, its request has not gone to its replica. A source that does not answer in WAIT seconds, or
is lost, costs a recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rayk.dispatch.output import Handle
from rayk.protocol.engine import Command, Report, Ship, Unpin
from rayk.protocol.engine_reports import Arrived, Shipped

if TYPE_CHECKING:
    from rayk.scheduler.router.steering import Steering
    from rayk.scheduler.transfers.fetching import CopyPlan

WAIT = 5.0  # seconds


class _Order(NamedTuple):
    handle: Handle
    fetch: CopyPlan
    since: float


class _Way(NamedTuple):
    """Pages that are pinned at `source` for a request on `target`. `seconds`: what pinning took."""

    source: int
    target: int
    kind: str
    export_id: int
    seconds: float


class PendingCopies:
    """The dispatcher's, under its lock. `send` has a request go to its replica, with a copy or without."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        send: Callable[[Handle, Shipped | None], None],
        steering: Steering,
        clock: Callable[[], float],
    ) -> None:
        self._post = post
        self._send = send
        self._steering = steering
        self._clock = clock
        self._orders: dict[int, _Order] = {}  # by the request's number, oldest first
        self._ways: dict[int, _Way] = {}  # likewise

    def waits(self, number: int) -> bool:
        """Whether the request has not gone to its replica yet."""
        return number in self._orders

    def order(self, handle: Handle, fetch: CopyPlan) -> None:
        """A placed request wants a copy."""
        fetching = self._steering.fetching
        assert fetching is not None and handle.replica is not None
        self._orders[handle.number] = _Order(handle, fetch, self._clock())
        tokens = handle.prompt[: fetch.stop * fetching.page_size].tobytes()
        to = fetching.lines.peer(handle.replica)
        ship = Ship(handle.number, tokens, handle.cache_salt, fetch.start, fetch.stop, fetch.kind, to.replica, to.epoch)
        self._post(fetch.source, ship)

    def hear(self, replica: int, report: Report) -> None:
        """What a replica shipped, and what arrived there."""
        for shipped in report.shipped:
            self._shipped(replica, shipped)
        for arrived in report.arrived:
            self._arrived(arrived)
        if self._orders:
            late = [number for number, order in self._orders.items() if order.since + WAIT < self._clock()]
            for number in late:
                self._without(number)

    def _shipped(self, replica: int, shipped: Shipped) -> None:
        order = self._orders.get(shipped.number)
        if order is None or order.fetch.source != replica:  # nobody wants it any more
            if shipped.hashes:
                self._post(replica, Unpin([shipped.export_id]))
            return
        del self._orders[shipped.number]
        target = order.handle.replica
        assert target is not None and self._steering.fetching is not None
        if shipped.trouble:
            self._steering.fetching.lines.failed(replica, target, shipped.kind, shipped.trouble)
        if shipped.hashes:
            self._ways[shipped.number] = _Way(replica, target, shipped.kind, shipped.export_id, shipped.seconds)
        self._send(order.handle, shipped if shipped.hashes else None)

    def _arrived(self, arrived: Arrived) -> None:
        way = self._ways.get(arrived.number)
        if way is None or self._steering.fetching is None:
            return
        lines = self._steering.fetching.lines
        if arrived.trouble:
            lines.failed(way.source, way.target, way.kind, arrived.trouble)
        elif arrived.pages:
            seconds = way.seconds + arrived.seconds
            lines.carried(way.source, way.target, way.kind, arrived.pages, seconds)
        self.forget(arrived.number)

    def forget(self, number: int) -> None:
        """The request is over, goes elsewhere, or has its pages: nothing is kept for it. Unknown ones are ignored."""
        self._orders.pop(number, None)
        way = self._ways.pop(number, None)
        if way is not None:
            self._post(way.source, Unpin([way.export_id]))

    def _without(self, number: int) -> None:
        self._send(self._orders.pop(number).handle, None)

    def lose(self, replica: int) -> None:
        """A replica is gone: what it was to send will not come."""
        for number in [number for number, order in self._orders.items() if order.fetch.source == replica]:
            self._without(number)
        for number in [number for number, way in self._ways.items() if way.source == replica]:
            del self._ways[number]
