"""Answers of a Cluster for an event loop: what replicas report in other threads, read here by the request that asked.

One wake-up of the loop serves all that was reported meanwhile. What a client does not read stays in its Handle, once:
a slow reader costs no more than its answer, and holds up nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

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
        news = self._news
        while news:
            answers, handle = news.popleft()
            answers.put(handle)


class Answers:
    """The answers to one HTTP request: `handles` are set once they are submitted. `stop()` ends the wait for them."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.handles: list[Handle] = []
        self.stopped: HttpError | None = None
        self._mailbox = mailbox
        self._ready: list[Handle] = []
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._read_at = 0.0
        self._open = 0

    def tell(self, handle: Handle) -> None:
        """That handle has news (`on_news` of Cluster.submit_all())."""
        self._mailbox.tell(self, handle)

    def put(self, handle: Handle) -> None:
        """The same in the loop."""
        self._ready.append(handle)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _beat(self, seconds: float) -> None:
        """Wake who waits for so long; one timer that is set again, not one for each wait."""
        left = self._read_at + seconds - self._loop.time()
        if left <= 0:
            self._wake()
        self._timer = None if self.over else self._loop.call_later(left if left > 0 else seconds, self._beat, seconds)

    def stop(self, error: HttpError) -> None:
        """End it for that reason; the requests are cancelled."""
        if self.stopped is None:
            self.stopped = error
            self._wake()
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

    async def next(self, seconds: float | None = None) -> list[Update]:
        """What is new, in order of arrival; empty after so many seconds without. HttpError when it was stopped."""
        if not self._ready and self.stopped is None:
            self._read_at = self._loop.time()
            if self._timer is None and seconds is not None:
                self._timer = self._loop.call_later(seconds, self._beat, seconds)
            self._waiter = self._loop.create_future()
            await self._waiter
        if self.stopped is not None:
            raise self.stopped
        ready, self._ready = self._ready, []
        updates = []
        for handle in ready if len(ready) < 2 else dict.fromkeys(ready):
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
            await self.next()
        return [handle.result() for handle in self.handles]
