"""What one engine has to report, until it is read: all of it by its one driver, or of each driver's requests by that
driver and the rest by the scheduler, which sees no tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rayk.protocol.engine_reports import Begun, Event, Finished, PagesChanged, Tokens
from rayk.protocol.serving import DRIVER_SHIFT, driver_of

SCHEDULER = 0  # reads what is of no driver; without a scheduler it is the only driver


class Outbox:
    """Of one engine; `shared` by several drivers or not. Its users hold a lock."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.gone: set[int] = set()
        """Drivers that will read nothing any more."""
        self.events: dict[int, list[Event]] = {}
        """By reader, what there is for it; take() takes it."""
        self.current: dict[int, object] = {}
        """By reader, the iterator that has what there is for it: one that comes later takes the place of the one
        before, which may wait for a driver that gave it up."""
        self.unread = 0
        """Tokens that its one driver has not read. A driver among several holds up nobody: what lies here for it is
        bounded by what its requests may generate, and goes with its lease."""
        self._expected: set[int] = set()  # requests without a token

    def expect(self, numbers: Iterable[int]) -> None:
        """Those requests come: the first token of each will be told of."""
        if self.shared:
            self._expected.update(numbers)

    def add(self, events: Sequence[Event]) -> None:
        """More has happened."""
        if not self.shared:
            self.events.setdefault(SCHEDULER, []).extend(events)
            self.unread += sum(len(event.tokens) for event in events if type(event) is Tokens)
            return
        for event in events:
            if isinstance(event, Tokens):
                self._add_tokens(event)
            elif isinstance(event, Begun | PagesChanged):
                self._put(SCHEDULER, event)
            else:
                self._put(driver_of(event.number), event)
                if isinstance(event, Finished):
                    self._expected.discard(event.number)
                    self._put(SCHEDULER, Finished(event.number, event.reason))

    def _add_tokens(self, event: Tokens) -> None:
        numbers = event.numbers
        if self._expected:
            begun = self._expected.intersection(numbers.tolist())
            if begun:
                self._expected -= begun
                self._put(SCHEDULER, Begun(list(begun)))
        drivers = numbers >> DRIVER_SHIFT
        for driver in np.unique(drivers).tolist():
            mine = drivers == driver
            logprobs = {n: found for n, found in event.logprobs.items() if driver_of(n) == driver}
            self._put(driver, Tokens(numbers[mine], event.tokens[mine], logprobs))

    def _put(self, reader: int, event: Event) -> None:
        if reader not in self.gone:
            self.events.setdefault(reader, []).append(event)

    def renew(self, pages: PagesChanged) -> None:
        """Another scheduler reads: it is told of all that is cached, and not how that came to be."""
        rest = [event for event in self.events.pop(SCHEDULER, []) if not isinstance(event, PagesChanged)]
        self.events[SCHEDULER] = [pages, *rest]

    def take(self, reader: int) -> list[Event]:
        """What there is for that reader, in order."""
        events = self.events.pop(reader, [])
        if not self.shared:
            self.unread = 0
        return events

    def forget(self, driver: int) -> None:
        """That driver is gone."""
        self.gone.add(driver)
        self.events.pop(driver, None)
