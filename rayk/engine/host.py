"""A thread that turns engines, with an inbox and an outbox: control calls are answered while it computes.

One engine in a replica's process; several, one after the other, where everything is in one process and shares one
model. Both boxes are bounded: the engines refuse requests beyond their queues, and they rest while their reader is
`backlog` tokens behind.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Condition, Thread
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from rayk.engine.engine import Engine
from rayk.engine.events import Event, Finished, Tokens
from rayk.engine.settings import EngineStats
from rayk.engine.wire import Cancel, Command, Report, Submit
from rayk.errors import RaykError, RemoteError

log = logging.getLogger("rayk.engine")

HEARTBEAT = 1.0  # seconds between reports when nothing happens
HELD_UP = 0.0005  # seconds between looks at the tiers when everything waits for them
BACKLOG = 1 << 16  # tokens

T = TypeVar("T")


class _Asked(NamedTuple):
    """Something to be done to an engine between two steps, and who waits for it."""

    what: Callable[[Engine], Any]
    answer: Future[Any]


class EngineHost:
    """Owns its engines from start() to stop(). post(), reports() and stop() may be called from any thread."""

    def __init__(self, engines: Sequence[Engine], backlog: int = BACKLOG, heartbeat: float = HEARTBEAT) -> None:
        self.engines = tuple(engines)
        self._backlog = backlog
        self._heartbeat = heartbeat
        self._inbox: deque[tuple[int, Command | _Asked]] = deque()
        self._changed = Condition()
        self._events: list[list[Event]] = [[] for _ in engines]
        self._unread = 0  # tokens in `_events`
        self._stopped = False
        self._failure: RemoteError | None = None
        self._thread = Thread(target=self._run, name="rayk-engine", daemon=True)

    def start(self) -> EngineHost:
        """Begin to work."""
        self._thread.start()
        return self

    def post(self, engine: int, command: Command) -> None:
        """Give engine number `engine` something to do; what comes of it is in its reports."""
        with self._changed:
            self._inbox.append((engine, command))
            self._changed.notify_all()

    def reports(self, engine: int) -> Iterator[Report]:
        """What one engine has done, as it does it; empty reports now and then. Ends with stop(); one reader each.

        RemoteError when the thread died: then nothing more will come.
        """
        events: list[Event] = []
        while True:
            with self._changed:
                deadline = monotonic() + self._heartbeat
                while not (self._events[engine] or self._stopped or self._failure):
                    left = deadline - monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                events, self._events[engine] = self._events[engine], []
                self._unread -= _count(events)
                over, failure = self._stopped and not events, self._failure
                self._changed.notify_all()
            if failure is not None and not events:
                raise failure
            if over:
                return
            yield Report.of(events, self.engines[engine].steps)

    def call(self, engine: int, what: Callable[[Engine], T]) -> T:
        """What `what` returns or raises, done to one engine between two steps."""
        answer: Future[T] = Future()
        with self._changed:
            self._inbox.append((engine, _Asked(what, answer)))
            self._changed.notify_all()
        while self._thread.is_alive():
            with suppress(TimeoutError):
                return answer.result(timeout=0.1)
        return answer.result() if answer.done() else what(self.engines[engine])

    def stats(self, engine: int) -> EngineStats:
        """One engine's counters."""
        return self.call(engine, Engine.stats)

    def stop(self) -> None:
        """End the thread after the step that it is in, and the reports; what goes to the tiers arrives there."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for engine in self.engines:
            try:
                engine.core.shutdown()
            except Exception as error:  # its thread may have ended with anything half done
                log.warning("replica %d did not leave its tiers in order", engine.core.replica, exc_info=error)

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                for index, engine in enumerate(self.engines):
                    if engine.busy:
                        self._report(index, engine.step())
        except BaseException as error:
            with self._changed:
                trace = "".join(traceback.format_exception(error))
                replica = self.engines[0].core.replica if self.engines else -1
                self._failure = RemoteError(replica, type(error).__name__, str(error), trace)
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Until there is something to do; what arrived is done with. False when it is over."""
        while True:
            with self._changed:
                arrived = list(self._inbox)
                self._inbox.clear()
                if self._stopped:
                    return False
                behind = self._unread >= self._backlog
                busy = [engine for engine in self.engines if engine.busy]
                held_up = all(engine.held_up for engine in busy)
                if not arrived and (behind or held_up):
                    self._changed.wait(HELD_UP if busy and not behind else self._heartbeat)
                    arrived = list(self._inbox)
                    self._inbox.clear()
            for index, command in arrived:
                self._obey(index, command)
            for engine in self.engines:
                engine.expire()
                if not engine.busy:
                    engine.poll()
            if not behind and any(engine.busy for engine in self.engines):
                return True

    def _obey(self, index: int, command: Command | _Asked) -> None:
        engine = self.engines[index]
        match command:
            case Submit(asks):
                for ask in asks:
                    try:
                        engine.submit(ask.request())
                    except RaykError as error:
                        self._report(index, [Finished(ask.number, "error", error=error)])
            case _Asked(what, answer):
                try:
                    answer.set_result(what(engine))
                except Exception as error:
                    answer.set_exception(error)
            case Cancel(numbers):
                for number in numbers:
                    engine.cancel(number)

    def _report(self, index: int, events: list[Event]) -> None:
        if events:
            with self._changed:
                self._events[index] += events
                self._unread += _count(events)
                self._changed.notify_all()


def _count(events: Sequence[Event]) -> int:
    return sum(len(event.tokens) for event in events if isinstance(event, Tokens))
