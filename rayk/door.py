"""The way into a cluster for an event loop: an admission queue, and who waits in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from rayk.admission import AdmissionQueue, Ticket
from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError, OverloadedError
from rayk.ticks import Admission

Admit = Callable[[Sequence[TextContext]], Awaitable[list[Admission]]]
LOOK_AGAIN = 0.02  # seconds after which those who wait are looked at without a release


class Door:
    """Lets requests in as the queue says. `admit` claims and allocates those that are let in, one result each."""

    def __init__(self, queue: AdmissionQueue, page_size: int, admit: Admit) -> None:
        self.queue = queue
        self._page_size = page_size
        self._admit = admit
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, ctxs: Sequence[TextContext]) -> list[Admission]:
        """What became of each; OverloadedError is the error of those that were turned away."""
        futures = [self._offer(ctx) for ctx in ctxs]
        self._let_in()
        return list(await asyncio.gather(*futures))

    def _offer(self, ctx: TextContext) -> asyncio.Future[Admission]:
        future: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()
        pages = -(-(ctx.tokens.length + 1) // self._page_size)
        try:
            self.queue.offer(ctx.request_id, pages, ctx.tenant, ctx.priority, ctx.deadline, (ctx, future))
        except OverloadedError as error:
            future.set_result(Admission(-1, error))
        return future

    def left(self, request_ids: Sequence[str]) -> None:
        """Those were released: there is room for others."""
        for request_id in request_ids:
            self.queue.left(request_id)
        self._let_in()

    def _let_in(self) -> None:
        for ticket, error in self.queue.expire():
            _, future = ticket.payload
            if not future.done():
                future.set_result(Admission(-1, error))
        entering: list[Ticket] = []
        while (ticket_ := self.queue.take()) is not None:
            if ticket_.payload[1].done():  # cancelled while it waited
                self.queue.left(ticket_.request_id)
            else:
                entering.append(ticket_)
        loop = asyncio.get_running_loop()
        if entering:
            task = loop.create_task(self._enter(entering))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if len(self.queue) and self._timer is None:
            self._timer = loop.call_later(LOOK_AGAIN, self._look)

    def _look(self) -> None:
        self._timer = None
        self._let_in()

    async def _enter(self, tickets: list[Ticket]) -> None:
        try:
            admissions = await self._admit([ticket.payload[0] for ticket in tickets])
        except Exception as failed:
            for ticket in tickets:
                self.queue.left(ticket.request_id)
                if not ticket.payload[1].done():
                    ticket.payload[1].set_exception(failed)
            return
        for ticket, admission in zip(tickets, admissions, strict=True):
            _, future = ticket.payload
            error = admission.error
            full = isinstance(error, InsufficientBlocksError) and error.needed <= error.total
            if full and not future.done():
                self.queue.returned(ticket)  # its turn comes again with the next release, or a moment later
                continue
            if error is not None:
                self.queue.left(ticket.request_id)
            if not future.done():
                future.set_result(admission)
        if len(self.queue) and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN, self._look)

    def close(self) -> None:
        """Nobody is looked after any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
