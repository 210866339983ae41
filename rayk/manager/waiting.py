"""The way into a cluster that has an admission policy, for callers that wait: blocking (Line) and awaiting (Door).

Both offer requests and look again, soon at first and then less often, until it is known what became of each. A look
is one message for all that wait; whatever else is to be said (a release, new offers) is a look, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from rayk.context import TextContext
from rayk.errors import AlreadyClaimedError, ClosedError, RaykError
from rayk.kvcache.tick import Admission

SHORTEST, LONGEST = 0.002, 0.05  # seconds between looks

Became = list[tuple[TextContext, Admission]]


def _twice(ctxs: Sequence[TextContext], waiting: Iterable[str] = ()) -> dict[int, Admission]:
    """Positions of contexts whose id waits already, or stands before them, and what that is answered with."""
    seen, twice = set(waiting), dict[int, Admission]()
    for at, ctx in enumerate(ctxs):
        if ctx.request_id in seen:
            twice[at] = Admission(-1, AlreadyClaimedError(ctx.request_id, -1))
        seen.add(ctx.request_id)
    return twice


class BlockingAdmission:
    """`enter` offers requests, gives others up, and says what is settled; `release` gives back what was placed for a
    caller that was interrupted."""

    def __init__(
        self,
        enter: Callable[[Sequence[TextContext], Sequence[str]], Became],
        release: Callable[[str, int], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._enter = enter
        self._release = release
        self._sleep = sleep
        self._kept: Became = []  # settled while somebody waited for others
        self._unwanted: dict[int, TextContext] = {}  # of interrupted callers, and not settled yet; by identity

    def look(self, ctxs: Sequence[TextContext], give_up: Sequence[str]) -> Became:
        """Offer, and do not wait."""
        became = self._settled(ctxs, give_up)
        kept, self._kept = self._kept, []
        return kept + became

    def _settled(self, ctxs: Sequence[TextContext], give_up: Sequence[str]) -> Became:
        """What is settled; what was placed for callers that were interrupted is released."""
        became = Became()
        for ctx, admission in self._enter(ctxs, give_up):
            unwanted = self._unwanted.pop(id(ctx), None) is ctx
            if unwanted and admission.error is None:
                self._give_back(ctx, admission)
            else:
                became.append((ctx, admission))
        return became

    def _give_back(self, ctx: TextContext, admission: Admission) -> None:
        if admission.error is None:
            with suppress(RaykError):  # where that fails, it is gone, too
                self._release(ctx.request_id, admission.replica)

    def wait(self, ctxs: Sequence[TextContext]) -> list[Admission]:
        """Offer, and wait until each is settled. Should that be interrupted, they are given up: nothing of them stays
        placed."""
        results = _twice(ctxs)
        due = {id(ctx): at for at, ctx in enumerate(ctxs) if at not in results}
        mine: Became = []
        offers: Sequence[TextContext] = [ctx for at, ctx in enumerate(ctxs) if at not in results]
        pause = SHORTEST
        try:
            while due:
                became, offers = self._settled(offers, ()), ()
                for ctx, admission in became:
                    at = due.pop(id(ctx), None)
                    if at is None:
                        self._kept.append((ctx, admission))
                    else:
                        results[at] = admission
                        mine.append((ctx, admission))
                if due:
                    self._sleep(pause)
                    pause = SHORTEST if became else min(2 * pause, LONGEST)
        except BaseException:
            left = [ctxs[at] for at in due.values()]
            self._unwanted.update((id(ctx), ctx) for ctx in left)
            for ctx, admission in mine:
                self._give_back(ctx, admission)
            with suppress(RaykError):
                self._kept += self._settled((), [ctx.request_id for ctx in left])
            raise
        return [results[at] for at in range(len(ctxs))]


class _Waiter(NamedTuple):
    ctx: TextContext
    future: asyncio.Future[Admission]


class AsyncAdmission:
    """The same for an event loop, with one message under way at a time. `release` gives back what was placed for
    nobody."""

    def __init__(
        self,
        enter: Callable[[Sequence[TextContext], Sequence[str]], Awaitable[Became]],
        release: Callable[[str, int], Awaitable[None]],
    ) -> None:
        self._enter = enter
        self._release = release
        self._guests: dict[int, _Waiter] = {}  # who waits, by the identity of the context
        self._offers: list[TextContext] = []
        self._given_up: list[str] = []
        self._news = False  # something was released and not told of yet
        self._knock = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Future[None]] = set()
        self._closed = False

    async def enter(self, ctxs: Sequence[TextContext]) -> list[Admission]:
        """What became of each; OverloadedError is the error of those that were turned away. Not to be cancelled: who
        loses interest calls give_up(), and then this comes to its end."""
        if self._closed:
            raise ClosedError("this AsyncPagedKVCacheManager")
        twice = _twice(ctxs, (guest.ctx.request_id for guest in self._guests.values()))
        loop = asyncio.get_running_loop()
        guests = {at: _Waiter(ctx, loop.create_future()) for at, ctx in enumerate(ctxs) if at not in twice}
        for guest in guests.values():
            self._guests[id(guest.ctx)] = guest
            self._offers.append(guest.ctx)
        if guests:
            self._look()
        admitted = dict(zip(guests, await asyncio.gather(*(g.future for g in guests.values())), strict=True))
        return [admitted[at] if at in admitted else twice[at] for at in range(len(ctxs))]

    def give_up(self, ctxs: Sequence[TextContext]) -> None:
        """Those are not wanted any more; what waits is turned away, what was placed meanwhile is not."""
        given_up = [ctx.request_id for ctx in ctxs if id(ctx) in self._guests]
        if given_up:
            self._given_up += given_up
            self._look()

    def _give_back(self, ctx: TextContext, admission: Admission) -> None:
        if admission.error is None:
            task = asyncio.ensure_future(self._release(ctx.request_id, admission.replica))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    def released(self) -> None:
        """This driver gave pages back: whoever waits for them has to hear of it."""
        self._news = True
        self._look()

    def _look(self) -> None:
        self._knock.set()
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        pause = SHORTEST
        while not self._closed and (self._guests or self._given_up or self._news):
            released, self._news = self._news, False
            (offers, self._offers), (given_up, self._given_up) = (self._offers, []), (self._given_up, [])
            self._knock.clear()
            try:
                became = await self._enter(offers, given_up)
            except Exception as error:
                self._fail(error)
                break
            for ctx, admission in became:
                self._settle(ctx, admission)
            pause = SHORTEST if became or released else min(2 * pause, LONGEST)
            if self._guests:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._knock.wait(), pause)
        self._task = None

    def _settle(self, ctx: TextContext, admission: Admission) -> None:
        guest = self._guests.pop(id(ctx), None)
        if guest is not None and not guest.future.done():
            guest.future.set_result(admission)
        else:  # nobody waits for it any more
            self._give_back(ctx, admission)

    def _fail(self, error: Exception) -> None:
        guests, self._guests = self._guests, {}
        for guest in guests.values():
            if not guest.future.done():
                guest.future.set_exception(error)

    def close(self) -> None:
        """Nobody is let in any more; ClosedError for those who wait."""
        self._closed = True
        self._knock.set()
        self._fail(ClosedError("this AsyncPagedKVCacheManager"))
