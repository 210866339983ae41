"""Prefixes of placed requests that other engines have: exported there, told to the request's engine, and acknowledged.

    exporting  --Exported-->  sent with the request  --Arrivals, or the request's end-->  acknowledged

While pages are only being exported, their request has not gone to its replica. A source that does not answer in WAIT
seconds, or is lost, costs a recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rayk import protocol as m
from rayk.dispatch.output import Handle
from rayk.protocol.engine import Report
from rayk.protocol.engine_request import Imports
from rayk.scheduler.serving.engine_scripts import EngineScripts
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.transfer import Copies, CopyOrder, ExportedSpan, PageTransfers

WAIT = 5.0  # seconds


class PendingCopies:
    """Of the requests of a driver, under their lock. `send` has one go to its replica, with a copy or without; copies
    go over the lines of `transfers()`."""

    def __init__(
        self,
        scripts: EngineScripts,
        send: Callable[[Handle, Imports | None], None],
        transfers: Callable[[], PageTransfers],
        clock: Callable[[], float],
    ) -> None:
        self._scripts = scripts
        self._send = send
        self._transfers = transfers
        self._clock = clock
        self._exporting: dict[int, tuple[Handle, float]] = {}  # by the request's ticket, with the time, oldest first
        self._sent: dict[int, list[ExportedSpan]] = {}  # likewise

    def waits(self, number: int) -> bool:
        """Whether the request has not gone to its replica yet."""
        return number in self._exporting

    def order(self, handle: Handle, spans: Sequence[Span]) -> None:
        """A placed request wants a copy."""
        assert handle.replica is not None
        transfers = self._transfers()
        number, target, tokens = handle.ticket, handle.replica, spans[-1].stop * transfers.page_size
        origin = m.Origin(tokens + 1, handle.cache_salt)
        view = m.ContextView("copy", 0, handle.prompt[:tokens].tobytes(), 0, tokens, origin=origin)
        script = transfers.export([CopyOrder(number, target, view, span) for span in spans])
        self._exporting[number] = handle, self._clock()
        self._scripts.start(("copy", number), script, lambda copies: self._exported(number, copies))

    def _exported(self, number: int, copies: Copies) -> None:
        handle, _ = self._exporting.pop(number)
        imports = None
        if copies:
            parts = self._sent[number] = copies[number]
            told = self._transfers().import_descriptors([parts])
            imports = Imports(told.imports, told.data)
        self._send(handle, imports)

    def on_report(self, report: Report) -> None:
        """What arrived at a replica; what has been exporting for too long goes without."""
        for arrivals in report.arrivals:
            parts = self._sent.pop(arrivals.number, None)
            if parts is not None:
                self._acknowledge(arrivals.number, parts, self._transfers().arrived(parts, arrivals.arrivals))
        if not self._exporting:
            return
        late = [handle for handle, since in self._exporting.values() if since + WAIT < self._clock()]
        for handle in late:
            self.forget(handle.ticket)
            self._send(handle, None)

    def forget(self, number: int) -> None:
        """The request is over, or goes elsewhere: nothing is kept for it. Unknown ones are ignored."""
        if self._exporting.pop(number, None) is not None:
            self._scripts.give_up(("copy", number))
        parts = self._sent.pop(number, None)
        if parts is not None:
            self._acknowledge(number, parts)

    def _acknowledge(self, number: int, parts: list[ExportedSpan], broken: Any = ()) -> None:
        self._scripts.start(("acknowledge", number), self._transfers().acknowledge({number: parts}, broken))
