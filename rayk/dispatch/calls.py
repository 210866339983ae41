"""The requests of one call of generate() or stream(): sent on as others end, read in order or as news come.

A call ends what is left of it when it is closed, however its caller leaves it: by an error, a cancelled task, an
interrupt, a loop that was left early, or a generator that nobody closes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from queue import SimpleQueue
from typing import Protocol

from rayk.dispatch.output import Handle, Output, Update


class Taker(Protocol):
    """Who takes requests: a rayk.dispatch.requests.Requests."""

    def submit(self, handles: Sequence[Handle]) -> None: ...
    def abandon(self, handles: Sequence[Handle]) -> None: ...


class Call:
    """`handles` are made when their turn comes: about `ahead` of them are with `taker` at a time."""

    def __init__(self, taker: Taker, handles: Iterator[Handle], ahead: int) -> None:
        self._taker = taker
        self._handles = handles
        self._ahead = ahead
        self._open: dict[int, Handle] = {}  # by number, those that were sent and not read to their end

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End what is not over; nothing more is sent."""
        self._handles, left, self._open = iter(()), list(self._open.values()), {}
        if left:
            self._taker.abandon(left)

    def _send(self) -> list[Handle]:
        """Send more when half of what may be under way is over."""
        if 2 * len(self._open) > self._ahead:
            return []
        more = []
        for handle in islice(self._handles, self._ahead - len(self._open)):
            self._open[handle.number] = handle  # before anything can interrupt this
            more.append(handle)
        if more:
            self._taker.submit(more)
        return more

    # -- outputs, in the order of the prompts --------------------------------------------------------------

    def outputs(self) -> list[Output]:
        """Wait for all of them."""
        found, queue = list[Output](), deque(self._send())
        while queue:
            handle = queue.popleft()
            found.append(handle.result())
            del self._open[handle.number]
            queue += self._send()
        return found

    async def outputs_async(self) -> list[Output]:
        """The same without blocking the event loop."""
        found, queue = list[Output](), deque(self._send())
        while queue:
            handle = queue.popleft()
            found.append(await asyncio.wrap_future(handle.future))
            del self._open[handle.number]
            queue += self._send()
        return found

    # -- news, as they come --------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether all of it was read."""
        return not (self._open or self._send())

    def news(self, handle: Handle) -> Update | None:
        """What is new of a handle that told so; None when that was read already."""
        if handle.number not in self._open:
            return None
        update = handle.take()
        if update.output is not None:
            del self._open[handle.number]
            self._send()
        return update if update.output is not None or update.tokens or update.text else None


class News:
    """Handles that told of news, for whoever reads them in a thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Handle] = SimpleQueue()
        self.tell: Callable[[Handle], None] = self._queue.put

    def next(self) -> Handle:
        """Wait for one."""
        return self._queue.get()


class AsyncNews:
    """The same for a coroutine of the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Handle]()

    def tell(self, handle: Handle) -> None:
        """From any thread. RuntimeError when the loop is closed."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, handle)

    async def next(self) -> Handle:
        """Wait for one."""
        return await self._queue.get()
