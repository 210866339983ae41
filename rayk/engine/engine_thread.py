"""The thread that steps engines, with an inbox and an outbox: control calls are answered while it computes.

One engine in a replica's process; several, one after the other, where everything is in one process and shares one
model. Both boxes are bounded: the engines refuse requests beyond their queues, and they rest while their one driver
is `backlog` tokens behind. An engine that raises ends alone: its reports say why, the others go on.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Condition, Lock, Thread
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from rayk.engine.engine import Engine
from rayk.engine.outbox import SCHEDULER, Outbox
from rayk.engine.settings import EngineStats
from rayk.errors import RaykError, RemoteError
from rayk.kvcache.progress import Progress
from rayk.protocol.engine import Cancel, Command, Forget, HandOver, Query, Report, Submit
from rayk.protocol.engine_reports import MOVED, Event, Finished
from rayk.protocol.serving import driver_of
from rayk.request_errors import RequestCancelledError

log = logging.getLogger("rayk.engine")

HEARTBEAT = 1.0  # seconds between reports when nothing happens
HELD_UP = 0.0005  # seconds between looks at the tiers when everything waits for them
BACKLOG = 1 << 16  # tokens
AHEAD = 8  # steps that engines may be ahead of the event loop that delivers what they report: then they rest,
GIVE_WAY = 0.02  # for so many seconds a step at most, since the loop and they take turns at one interpreter
SWITCH_SECONDS = 5.0  # for readers of reports to be done with what they have

T = TypeVar("T")
InLoop = Callable[[Callable[[], None]], object]
OnReport = Callable[[int, Report], None]


class _Asked(NamedTuple):
    """A function that is called between two steps, and the future of its result."""

    what: Callable[[], Any]
    answer: Future[Any]


class EngineThread:
    """Owns its engines, by number, until remove() or stop(). All methods may be called from any thread."""

    def __init__(
        self,
        engines: Sequence[Engine] = (),
        backlog: int = BACKLOG,
        heartbeat: float = HEARTBEAT,
        shared: bool = False,
    ) -> None:
        self._engines = dict(enumerate(engines))
        self._shared = shared
        self._backlog = backlog
        self._heartbeat = heartbeat
        self._inbox: deque[tuple[int, Command] | _Asked] = deque()
        self._changed = Condition()
        self._outboxes = {number: Outbox(shared) for number in self._engines}
        self._letting_go: set[int] = set()  # engines whose requests, also new ones, go on elsewhere
        self._stopped = False
        self._failures: dict[int, RemoteError] = {}  # of engines that raised
        self._failure: RemoteError | None = None  # of the thread, and so of all
        self._progress = Progress()
        self._loop: tuple[InLoop, OnReport] | None = None
        self._called = False  # the loop was, and has not come yet
        self._ahead = 0  # reports since it came
        self._delivery = Lock()  # held by the loop while it delivers
        self._reading = 0  # reports that readers have and are not done with
        self._switching = False
        self._thread = Thread(target=self._run, name="rayk-engine", daemon=True)

    def start(self) -> EngineThread:
        """Begin to work."""
        self._thread.start()
        return self

    @property
    def failed(self) -> bool:
        """Whether the thread died: nothing will come of its engines any more."""
        return self._failure is not None

    # -- engines -----------------------------------------------------------------------------------------

    def add(self, number: int, make: Callable[[], Engine]) -> Engine:
        """Serve one more engine, made between two steps: nothing else computes meanwhile."""

        def made() -> Engine:
            engine = make()
            with self._changed:
                self._engines[number], self._outboxes[number] = engine, Outbox(self._shared)
                self._failures.pop(number, None)
            return engine

        return self._ask(made)

    def remove(self, number: int) -> None:
        """Serve that engine no more: its reports end, what it still had is forgotten, its tiers are left in order."""

        def taken() -> Engine | None:
            with self._changed:
                self._changed.notify_all()
                self._failures.pop(number, None)
                self._letting_go.discard(number)
                return self._engines.pop(number, None)

        engine = self._ask(taken)
        if engine is not None:
            _leave(engine)

    def stop(self) -> None:
        """End the thread after the step that it is in, and the reports; what goes to the tiers arrives there."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for engine in self._engines.values():
            _leave(engine)

    # -- talking to one ----------------------------------------------------------------------------------

    def post(self, engine: int, command: Command) -> None:
        """Give engine number `engine` a command; its effects are in that engine's reports."""
        with self._changed:
            self._inbox.append((engine, command))
            self._changed.notify_all()

    def reports(self, engine: int, reader: int = SCHEDULER) -> Iterator[Report]:
        """What one engine has done, as it does it; empty reports now and then. Ends with it, when the reader counts as
        gone, and when the same reader began another one: what happens from then on is in that one's reports. A
        scheduler that begins anew is told of all that is cached.

        RemoteError when the engine or the thread raised: then nothing more will come.
        """
        watched, outbox, batch, me = self._engines.get(engine), self._outboxes.get(engine), 0, object()
        if outbox is not None:
            with self._changed:
                if outbox.shared and reader == SCHEDULER and reader in outbox.current:
                    self._inbox.append(_Asked(lambda: self._tell_pages(engine), Future()))
                outbox.current[reader] = me
                self._changed.notify_all()
        while watched is not None and outbox is not None:
            with self._changed:
                deadline = monotonic() + self._heartbeat
                while not (self._readable(outbox, reader) or self._over(engine, watched) or self._failed(engine)):
                    left = deadline - monotonic()
                    if left <= 0 or reader in outbox.gone or outbox.current[reader] is not me:
                        break
                    self._changed.wait(left)
                if outbox.current[reader] is not me:
                    return
                failure, over = self._failed(engine), self._over(engine, watched) or reader in outbox.gone
                events = outbox.take(reader) if failure or over or self._readable(outbox, reader) else []
                counts = bool(events) and not (failure or over)
                self._reading += counts
                self._changed.notify_all()
            try:
                if failure or over:
                    with self._delivery:  # what the loop took before is delivered
                        pass
                if failure is not None and not events:
                    raise failure
                if over and not events:
                    return
                batch += 1
                yield _report_of(watched, events, batch)
            finally:
                if counts:
                    with self._changed:
                        self._reading -= 1
                        if self._switching:
                            self._changed.notify_all()

    def _readable(self, outbox: Outbox, reader: int) -> bool:
        return self._loop is None and bool(outbox.events.get(reader))

    def deliver_in(self, loop: InLoop | None, on_report: OnReport) -> None:
        """Have `on_report` called with what engines have done by an event loop, which `loop` hands a call to (it is
        call_soon_threadsafe), so that no other thread has to run for it. The iterators of reports() then have only
        empty ones, and the end. None, and a loop that is closed: they have all of it again."""
        with self._delivery, self._changed:
            self._loop, self._called = None if loop is None else (loop, on_report), False
            self._switching = True
            self._changed.wait_for(lambda: not self._reading, SWITCH_SECONDS)  # what readers have comes first
            self._switching = False
            if any(outbox.events for outbox in self._outboxes.values()):
                self._call_loop()
            self._changed.notify_all()

    def _call_loop(self) -> None:
        """There is something to report."""
        if self._loop is not None and not self._called:
            try:
                self._loop[0](self._deliver)
                self._called = True
            except RuntimeError:  # it is closed
                self._loop = None
        if self._loop is None:
            self._changed.notify_all()

    def _deliver(self) -> None:
        """In the loop."""
        with self._delivery:
            with self._changed:
                self._called, loop = False, self._loop
                if self._ahead >= AHEAD or self._behind:
                    self._changed.notify_all()
                self._ahead = 0
                sound = self._sound if loop is not None else []
                taken = [(n, engine, events) for n, engine in sound if (events := self._outboxes[n].take(SCHEDULER))]
            for number, engine, events in taken:
                assert loop is not None
                try:
                    loop[1](number, _report_of(engine, events))
                except Exception as error:  # nobody reads what comes from there any more
                    self.fail(number, error)

    def _tell_pages(self, number: int) -> None:
        engine = self._engines[number]
        if engine.settings.report_pages:
            pages = engine.tell_pages()
            with self._changed:
                self._outboxes[number].renew(pages)
                self._changed.notify_all()

    def _failed(self, number: int) -> RemoteError | None:
        return self._failures.get(number) or self._failure

    def stalled(self) -> float:
        """Seconds for which a step did not get on; to be asked every second. See rayk.kvcache.progress."""
        return self._progress.stalled()

    def fail(self, number: int, error: Exception) -> None:
        """Mark that engine as lost: its reports end with the reason, and it is not stepped again."""
        with self._changed:
            engine = self._engines.get(number)
            if engine is not None and number not in self._failures:
                self._failures[number] = _remote(engine, error)
                self._changed.notify_all()

    def _over(self, number: int, engine: Engine) -> bool:
        return self._stopped or self._engines.get(number) is not engine

    def stats(self, engine: int) -> EngineStats:
        """One engine's counters."""
        return self.call(engine, Engine.stats)

    def call(self, engine: int, what: Callable[[Engine], T]) -> T:
        """What `what` returns or raises, done to one engine between two steps. KeyError when it is not there."""
        return self._ask(lambda: what(self._engines[engine]))

    def _ask(self, what: Callable[[], T]) -> T:
        answer: Future[T] = Future()
        with self._changed:
            self._inbox.append(_Asked(what, answer))
            self._changed.notify_all()
        while self._thread.is_alive():
            with suppress(TimeoutError):
                return answer.result(timeout=0.1)
        return answer.result() if answer.done() else what()

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                for number, engine in self._sound:
                    if engine.busy:
                        self._try(number, lambda n=number, e=engine: self._report(n, e.step()))  # type: ignore[misc]  # mypy does not infer defaults
        except BaseException as error:
            with self._changed:
                self._failure = _remote(next(iter(self._engines.values()), None), error)
                self._changed.notify_all()

    @property
    def _sound(self) -> list[tuple[int, Engine]]:
        return [each for each in self._engines.items() if each[0] not in self._failures]

    def _try(self, number: int, what: Callable[[], None]) -> None:
        """Do something to one engine. What it raises belongs to no request: the engine is lost, with that reason."""
        self._progress.begin()
        try:
            what()
        except Exception as error:
            self.fail(number, error)
        finally:
            self._progress.end()

    def _wait(self) -> bool:
        """Until there is something to do; what arrived is done with. False when it is over."""
        while True:
            with self._changed:
                arrived = list(self._inbox)
                self._inbox.clear()
                if self._stopped:
                    return False
                behind = self._behind
                busy = [engine for _, engine in self._sound if engine.busy]
                held_up = all(engine.held_up for engine in busy)
                if not arrived and (behind or held_up):
                    self._changed.wait(HELD_UP if busy and not behind else self._heartbeat)
                    arrived = list(self._inbox)
                    self._inbox.clear()
            self._take(arrived)
            for number, engine in self._sound:
                self._try(number, engine.rest)
            if not behind and any(engine.busy for _, engine in self._sound):
                return True

    @property
    def _behind(self) -> bool:
        """Whether nobody reads what engines report: they rest."""
        return sum(outbox.unread for outbox in self._outboxes.values()) >= self._backlog

    def _take(self, arrived: Sequence[tuple[int, Command] | _Asked]) -> None:
        for each in arrived:
            if isinstance(each, _Asked):
                _answer(each)
            else:
                self._try(each[0], lambda each=each: self._apply(*each))  # type: ignore[misc]  # as above

    def _apply(self, number: int, command: Command) -> None:
        engine = self._engines.get(number)
        if engine is None or number in self._failures:
            return
        match command:
            case Submit(asks) if number in self._letting_go:
                self._report(number, [Finished(ask.number, MOVED) for ask in asks])
            case Submit(asks):
                outbox = self._outboxes[number]
                if outbox.shared:
                    outbox.expect([ask.number for ask in asks])
                for ask in asks:
                    if outbox.gone and driver_of(ask.number) in outbox.gone:
                        continue
                    try:
                        engine.submit(ask.request())
                    except RaykError as error:
                        self._report(number, [Finished(ask.number, "error", error=error)])
                    except Exception as error:  # an unforeseen request: its own end, not the engine's
                        self._report(number, [Finished(ask.number, "error", error=_remote(engine, error))])
            case Cancel(numbers):
                for each in numbers:
                    if not engine.cancel(each):  # it is over, or never came: its waiter is told
                        unknown = RequestCancelledError("", 0)
                        self._report(number, [Finished(each, "cancelled", error=unknown)])
            case HandOver(on):
                (self._letting_go.add if on else self._letting_go.discard)(number)
                for each in engine.numbers if on else ():
                    engine.hand_over(each)
            case Forget(driver):
                with self._changed:
                    self._outboxes[number].forget(driver)
                    self._changed.notify_all()
                for each in [n for n in engine.numbers if driver_of(n) == driver]:
                    engine.cancel(each)
            case Query():
                engine.query(command)

    def _report(self, number: int, events: list[Event]) -> None:
        if events:
            with self._changed:
                self._outboxes[number].add(events)
                self._call_loop()
                self._ahead += self._called
                if self._ahead >= AHEAD:
                    self._changed.wait_for(lambda: self._stopped or not self._called, GIVE_WAY)


def _report_of(engine: Engine, events: Sequence[Event], batch: int = 0) -> Report:
    return Report.of(events, engine.steps, engine.prefill_rate, engine.core.usage.used, batch)


def _remote(engine: Engine | None, error: BaseException) -> RemoteError:
    trace = "".join(traceback.format_exception(error))
    return RemoteError(engine.core.replica if engine is not None else -1, type(error).__name__, str(error), trace)


def _answer(asked: _Asked) -> None:
    try:
        asked.answer.set_result(asked.what())
    except Exception as error:
        asked.answer.set_exception(error)


def _leave(engine: Engine) -> None:
    try:
        if engine.peers is not None:
            engine.peers.close()
        engine.core.shutdown()
    except Exception as error:  # its thread may have ended with anything half done
        log.warning("replica %d did not leave its tiers in order", engine.core.replica, exc_info=error)
