"""Answers of a Cluster for an event loop: what replicas report in other threads, read here by the request that asked.

One wake-up of the loop serves all that was reported meanwhile. What a client does not read stays in its Handle, once:
a slow reader costs no more than its answer, and holds up nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from rayk.dispatch.output import Handle, Output, Update
from rayk.server.errors import HttpError


class Mailbox:
    """News of handles for the requests of one event loop, the running one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: deque[tuple[Answers, Handle]] = deque()
        self._woken = False

    def tell(self, answers: Answers, handle: Handle) -> None:
        """From any thread; never blocks. RuntimeError when the loop is closed."""
        self._news.append((answers, handle))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        news, told = self._news, list[Answers]()
        for _ in range(len(news)):
            answers, handle = news.popleft()
            if not answers.ready:
                told.append(answers)
            answers.ready.append(handle)
        for answers in told:
            answers.wake()


class Answers:
    """The answers to one HTTP request: `handles` are set once they are submitted. `stop()` ends the wait for them.

    `ready` are handles with news. `on_news`, if set, is called in the pass of the event loop that brings them, while
    the request waits: it goes on only where that returns True.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.handles: list[Handle] = []
        self.ready: list[Handle] = []
        self.on_news: Callable[[], bool] | None = None
        self.stopped: HttpError | None = None
        self._mailbox = mailbox
        self._waiter: asyncio.Future[bool] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._read_at = 0.0
        self._open = 0

    def tell(self, handle: Handle) -> None:
        """That handle has news (`on_news` of Cluster.submit_all())."""
        self._mailbox.tell(self, handle)

    def wake(self) -> None:
        """There is news; in the loop."""
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self.on_news is None or self.on_news()):
            waiter.set_result(True)

    def _go_on(self, news: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(news)

    def _beat(self, seconds: float) -> None:
        """Wake who waits for so long; one timer that is set again, not one for each wait."""
        left = self._read_at + seconds - self._loop.time()
        if left <= 0:
            self._go_on(False)
        self._timer = None if self.over else self._loop.call_later(left if left > 0 else seconds, self._beat, seconds)

    def stop(self, error: HttpError) -> None:
        """End it for that reason; the requests are cancelled."""
        if self.stopped is None:
            self.stopped = error
            self._go_on(True)
            for handle in self.handles:
                handle.cancel()

    def follow(self, handles: Sequence[Handle]) -> None:
        """These are the requests."""
        self.handles = list(handles)
        self._open = len(self.handles)
        if self.stopped is not None:  # meanwhile
            for handle in self.handles:
                handle.cancel()

    @property
    def over(self) -> bool:
        """Whether all of it was read."""
        return self._open == 0

    async def wait(self, seconds: float | None = None) -> bool:
        """Until there is something to take; False after so many seconds without."""
        if self.ready or self.stopped is not None:
            return True
        self._read_at = self._loop.time()
        if self._timer is None and seconds is not None:
            self._timer = self._loop.call_later(seconds, self._beat, seconds)
        self._waiter = self._loop.create_future()
        return await self._waiter

    def take(self) -> list[Update]:
        """What is new, in order of arrival. HttpError when it was stopped."""
        if self.stopped is not None:
            raise self.stopped
        self._read_at = self._loop.time()
        ready, self.ready = self.ready, []
        updates = []
        for handle in ready:
            update = handle.take()
            if update.output is not None:
                self._open -= 1
            elif not (update.tokens or update.text):
                continue
            updates.append(update)
        return updates

    def close(self) -> None:
        """Nobody reads any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def outputs(self) -> list[Output]:
        """Wait for all of them, in their order; for requests that were submitted without on_news."""
        for handle in self.handles:
            handle.future.add_done_callback(lambda _, handle=handle: self.tell(handle))  # type: ignore[misc]  # mypy does not infer defaults
        while not self.over:
            await self.wait()
            self.take()
        return [handle.result() for handle in self.handles]
