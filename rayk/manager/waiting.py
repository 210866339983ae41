"""Callers that wait for their admission to a cluster that has a policy: blocking, and on an event loop.

Both offer requests and poll, soon at first and then less often, until it is known what became of each. A poll is one
message for all that wait; whatever else is to be said (a release, new offers) is a poll, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from rayk.context import TextContext
from rayk.errors import AlreadyClaimedError, ClosedError, RaykError
from rayk.kvcache.tick import Admission, Settled

SHORTEST, LONGEST = 0.002, 0.05  # seconds between polls

GiveBack = Callable[[list[str]], object]  # releases what was placed for callers that do not want it any more


def _twice(ctxs: Sequence[TextContext], waiting: Iterable[str] = ()) -> dict[int, Admission]:
    """Positions of contexts whose id waits already, or stands before them, and what that is answered with."""
    seen, twice = set(waiting), dict[int, Admission]()
    for at, ctx in enumerate(ctxs):
        if ctx.request_id in seen:
            twice[at] = Admission(-1, AlreadyClaimedError(ctx.request_id, -1))
        seen.add(ctx.request_id)
    return twice


class BlockingAdmission:
    """`enter` offers requests, gives others up, and says what is settled."""

    def __init__(
        self,
        enter: Callable[[Sequence[TextContext], Sequence[str]], Settled],
        give_back: GiveBack,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._enter = enter
        self._give_back = give_back
        self._sleep = sleep
        self._kept: Settled = []  # settled while others were waited for
        self._unwanted: dict[int, TextContext] = {}  # of interrupted callers, and not settled yet; by identity

    def poll(self, ctxs: Sequence[TextContext], give_up: Sequence[str]) -> Settled:
        """Offer, and do not wait."""
        settled = self._settled(ctxs, give_up)
        kept, self._kept = self._kept, []
        return kept + settled

    def _settled(self, ctxs: Sequence[TextContext], give_up: Sequence[str]) -> Settled:
        """What is settled; what was placed for callers that were interrupted is given back."""
        settled, unwanted = Settled(), list[str]()
        for ctx, admission in self._enter(ctxs, give_up):
            if self._unwanted.pop(id(ctx), None) is ctx and admission.error is None:
                unwanted.append(ctx.request_id)
            else:
                settled.append((ctx, admission))
        if unwanted:
            self._give_back(unwanted)
        return settled

    def wait(self, ctxs: Sequence[TextContext]) -> list[Admission]:
        """Offer, and wait until each is settled. Should that be interrupted, they are given up: nothing of them stays
        placed."""
        results = _twice(ctxs)
        due = {id(ctx): at for at, ctx in enumerate(ctxs) if at not in results}
        mine: Settled = []
        offers: Sequence[TextContext] = [ctx for at, ctx in enumerate(ctxs) if at not in results]
        pause = SHORTEST
        try:
            while due:
                settled, offers = self._settled(offers, ()), ()
                for ctx, admission in settled:
                    at = due.pop(id(ctx), None)
                    if at is None:
                        self._kept.append((ctx, admission))
                    else:
                        results[at] = admission
                        mine.append((ctx, admission))
                if due:
                    self._sleep(pause)
                    pause = SHORTEST if settled else min(2 * pause, LONGEST)
        except BaseException:
            left = [ctxs[at] for at in due.values()]
            self._unwanted.update((id(ctx), ctx) for ctx in left)
            self._give_back([ctx.request_id for ctx, admission in mine if admission.error is None])
            with suppress(RaykError):
                self._kept += self._settled((), [ctx.request_id for ctx in left])
            raise
        return [results[at] for at in range(len(ctxs))]


class _Waiter(NamedTuple):
    ctx: TextContext
    future: asyncio.Future[Admission]


class AsyncAdmission:
    """The same for an event loop, with one message under way at a time."""

    def __init__(
        self,
        enter: Callable[[Sequence[TextContext], Sequence[str]], Awaitable[Settled]],
        give_back: GiveBack,
    ) -> None:
        self._enter = enter
        self._give_back = give_back
        self._waiters: dict[int, _Waiter] = {}  # by the identity of the context
        self._offers: list[TextContext] = []
        self._given_up: list[str] = []
        self._untold = False  # something was released since the last poll
        self._wakeup = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def enter(self, ctxs: Sequence[TextContext]) -> list[Admission]:
        """What became of each; OverloadedError is the error of those that were turned away. Not to be cancelled: a
        caller that loses interest calls give_up(), and then this comes to its end."""
        if self._closed:
            raise ClosedError("this AsyncPagedKVCacheManager")
        twice = _twice(ctxs, (waiter.ctx.request_id for waiter in self._waiters.values()))
        loop = asyncio.get_running_loop()
        waiters = {at: _Waiter(ctx, loop.create_future()) for at, ctx in enumerate(ctxs) if at not in twice}
        for waiter in waiters.values():
            self._waiters[id(waiter.ctx)] = waiter
            self._offers.append(waiter.ctx)
        if waiters:
            self.poll()
        admitted = dict(zip(waiters, await asyncio.gather(*(w.future for w in waiters.values())), strict=True))
        return [admitted[at] if at in admitted else twice[at] for at in range(len(ctxs))]

    def give_up(self, ctxs: Sequence[TextContext]) -> None:
        """Those are not wanted any more; what waits is turned away, what was placed meanwhile is not."""
        given_up = [ctx.request_id for ctx in ctxs if id(ctx) in self._waiters]
        if given_up:
            self._given_up += given_up
            self.poll()

    def released(self) -> None:
        """This driver gave pages back, for which others may wait."""
        self._untold = True
        self.poll()

    def poll(self) -> None:
        """Do it now."""
        self._wakeup.set()
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        pause = SHORTEST
        while not self._closed and (self._waiters or self._given_up or self._untold):
            released, self._untold = self._untold, False
            (offers, self._offers), (given_up, self._given_up) = (self._offers, []), (self._given_up, [])
            self._wakeup.clear()
            try:
                settled = await self._enter(offers, given_up)
            except Exception as error:
                self._fail(error)
                break
            self._settle(settled)
            pause = SHORTEST if settled or released else min(2 * pause, LONGEST)
            if self._waiters:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wakeup.wait(), pause)
        self._task = None

    def _settle(self, settled: Settled) -> None:
        unwanted = []
        for ctx, admission in settled:
            waiter = self._waiters.pop(id(ctx), None)
            if waiter is not None and not waiter.future.done():
                waiter.future.set_result(admission)
            elif admission.error is None:  # its caller was told of an error meanwhile
                unwanted.append(ctx.request_id)
        if unwanted:
            self._give_back(unwanted)

    def _fail(self, error: Exception) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def close(self) -> None:
        """Admit nothing any more; ClosedError for those who wait."""
        self._closed = True
        self._wakeup.set()
        self._fail(ClosedError("this AsyncPagedKVCacheManager"))
