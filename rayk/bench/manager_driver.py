"""Continuous batching over the replicas of a manager: admission, chunked prefill, decode, preemption and release.

One step is `try_admit` for what may enter, where there is any, and then exactly one `manager.tick`:

    step     what the last forward processed
    release  what finished in it, and what had to make room
    alloc    decoding requests whose next token needs a page
    execute  the next batch: every decoding request, and prefill in chunks up to the replica's token budget

With round robin request i (in order of arrival) goes to replica i mod N and waits there, first come first served;
otherwise all wait in one queue and the manager's router places the head. After a refusal nothing more is admitted to
that replica (that queue) until pages were given back. A decoding request whose alloc is refused makes the newest
running request of its replica start over: released, reset, and put back at the front of its queue. When a replica is
lost, its requests start over on the others; where lost ones are replaced, any number of times, and the replacement
takes requests as soon as it is there.

With `--prefill-rate` a prefill is in a forward only when its time is over, and begins with another look at what is
cached; the loop waits when there is nothing else to do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from time import sleep
from typing import TYPE_CHECKING, Any

from rayk.bench.in_flight import Flight, Lane, Prefill
from rayk.bench.loop import ClosedLoop
from rayk.bench.measure import Answered
from rayk.bench.settings import BenchSettings
from rayk.bench.verify import forward
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    InsufficientBlocksError,
    NoReplicaError,
    NotClaimedError,
    RaykError,
    ReplicaLostError,
    SchedulerLostError,
    StaleEpochError,
)
from rayk.kvcache.tick import Admission, TickResult
from rayk.scheduler.membership import State
from rayk.simulate.replay import Event
from rayk.workloads.request import BenchRequest, Workload

if TYPE_CHECKING:
    from rayk.manager.manager import PagedKVCacheManager

log = logging.getLogger("rayk.bench")

IDLE_REFUSALS = 20
MAX_RETRIES = 2  # replicas that a request may lose, where they are not replaced
LOOK_SECONDS = 0.25  # between two looks whether a replacement is there
PAUSE_SECONDS = 0.02  # before what failed for a moment is tried again
PASSING = (ReplicaLostError, NoReplicaError, CallTimeoutError, SchedulerLostError, StaleEpochError)
"""Of the cluster, not of a request: over when another replica, or another scheduler, is there."""
UNDONE = (*PASSING, NotClaimedError, AlreadyClaimedError)
"""What an admission or a tick may meet then, too: a claim that went with a replica, or is still being taken back."""


class ManagerDriver(ClosedLoop):
    """Serves a workload from one manager."""

    def __init__(
        self,
        manager: PagedKVCacheManager,
        workload: Workload,
        settings: BenchSettings,
        clock: Callable[[], float],
        on_tick: Callable[[Any], None] = lambda driver: None,
        wait: Callable[[float], None] = sleep,
    ) -> None:
        super().__init__(workload, settings, clock, on_tick, wait)
        self.manager = manager
        rate = settings.prefill_rate
        self.lanes = [
            Lane(replica, settings.pages, None if rate is None else Prefill(rate))
            for replica in range(settings.replicas)
        ]
        self.lost: dict[int, RaykError] = {}
        self._replaced, self._looked_at = settings.chaos is not None, 0.0
        self._queue = Lane(-1)  # for all replicas, when a router places
        self._round_robin, self._verify = settings.router == "round-robin", settings.forward == "verify"
        self._tick_end, self._admissions = 0.0, 0

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return sum(len(lane.running) for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Requests that were sent and wait for admission."""
        return len(self._queue.waiting) + sum(len(lane.waiting) for lane in self.lanes)

    def _take(self, request: BenchRequest) -> None:
        error = request.too_large(self.settings.page_size, self.settings.pages)
        if error is not None:
            self._left(request, error)
            return
        flight = Flight(request, self._now)
        self._queue_of(flight, self.measured.submitted - 1).waiting.append(flight)

    def _queue_of(self, flight: Flight, number: int) -> Lane:
        """Where a request waits: with round robin that of the next replica that is not lost."""
        if self._round_robin:
            there = [lane for lane in self.lanes if lane.replica not in self.lost] or self.lanes
            flight.replica = there[number % len(there)].replica
            return self.lanes[flight.replica]
        return self._queue

    def _step(self) -> None:
        if self.lost and self._replaced:
            self._await_replacements()
        self._admit()
        if (self._in_flight or self._timed) and not self._tick():
            self._idle()

    def _await_replacements(self) -> None:
        """Those that are there take requests again."""
        if len(self.lost) == len(self.lanes):
            self._wait(PAUSE_SECONDS)
            self._now = self._clock()
        if self._clock() < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = self._clock()
        with suppress(*PASSING):
            for replica, state in enumerate(self.manager.replica_states()):
                if state == State.ready:
                    self.lost.pop(replica, None)
        self._now = self._clock()

    def _idle(self) -> None:
        """Wait for the next arrival, or the end of the next prefill."""
        until = min(lane.due for lane in self.lanes)
        if self._sending:
            until = min(until, self._start + self._feed.next_at)
        if math.isfinite(until):
            self._wait(max(0.0, until - self._clock()))
        self._now = self._clock()

    def _admit(self) -> None:
        chosen: list[Flight] = []
        for lane in self.lanes if self._round_robin else [self._queue]:
            if lane.waiting and not (lane.blocked and self._busy(lane)):
                chosen += self._next_of(lane)
        if not chosen:
            return
        began = self._clock()
        replicas = [flight.replica for flight in chosen] if self._round_robin else None
        try:
            admissions = self.manager.try_admit([flight.context for flight in chosen], replicas)
        except PASSING as error:
            if not self._replaced:
                raise
            log.info("an admission has to be made again: %s", error)
            self._send_again(chosen, lost=False)
            self._wait(PAUSE_SECONDS)
            self._now = self._clock()
            return
        self._now = self._clock()
        self.measured.latency["admit"].add(self._now - began)
        refused: dict[int, list[Flight]] = {}
        again: list[Flight] = []
        for flight, admission in zip(chosen, admissions, strict=True):
            if admission.error is None:
                self.measured.latency["claim"].add(admission.claim_seconds)
                self.measured.latency["alloc"].add(admission.alloc_seconds)
                flight.replica = admission.replica
                self._enter(flight, admission)
            elif isinstance(admission.error, InsufficientBlocksError):
                if not self._refuse_for_good(flight, admission.replica, admission.error):
                    refused.setdefault(flight.replica, []).append(flight)
            elif isinstance(admission.error, ReplicaLostError):
                self._lose(admission.error, admission.error.replica)
                again.append(flight)
            elif self._replaced and isinstance(admission.error, UNDONE):
                again.append(flight)
            else:
                raise admission.error
        for replica, flights in refused.items():
            lane = self.lanes[replica] if self._round_robin else self._queue
            lane.requeue(flights)
            lane.blocked = True
        self._send_again(again, lost=not self._replaced)
        if len(again) == len(chosen):  # nobody takes any now
            self._wait(PAUSE_SECONDS)
            self._now = self._clock()

    def _busy(self, lane: Lane) -> bool:
        return any(lane.running or lane.finished for lane in (self.lanes if lane is self._queue else [lane]))

    def _next_of(self, lane: Lane) -> list[Flight]:
        """Take from the queue what may enter: a place in the batch, pages, and prefill that this tick can begin.

        Only the head may be too large for the free pages (what it reuses may be in use already): those behind it
        must not overtake it when it is refused.
        """
        settings = self.settings
        lanes = [each for each in self.lanes if each.replica not in self.lost] if lane is self._queue else [lane]
        places = settings.max_batch_size * len(lanes) - sum(len(each.running) for each in lanes)
        pages = sum(each.free_pages for each in lanes)
        room: float = float("inf")
        if settings.token_budget is not None and settings.prefill_rate is None:  # else what waits is placed, too
            room = settings.token_budget * len(lanes) - sum(each.prefill for each in lanes)
        chosen: list[Flight] = []
        while lane.waiting and places > 0 and room > 0:
            pages -= -(-lane.waiting[0].length // settings.page_size)
            if chosen and pages < 0:
                break
            chosen.append(lane.waiting.popleft())
            places -= 1
            room -= chosen[-1].length
        return chosen

    def _enter(self, flight: Flight, admission: Admission) -> None:
        measured, lane = self.measured, self.lanes[flight.replica]
        flight.prefill = flight.context.tokens.active_length
        flight.admission, self._admissions = self._admissions, self._admissions + 1
        flight.entering = True
        flight.entered_at = self._now
        flight.refusals = 0
        flight.again = flight.counted
        flight.late = lane.pace is not None and lane.prefill > 0
        if flight.counted:
            measured.recomputed += flight.prefill
        else:
            flight.counted = True
            flight.counted_at = len(measured.admitted)
            flight.reused = admission.reused_tokens
            measured.admit(self.elapsed, flight.replica, flight.length, admission)
        measured.events.append(Event("admit", flight.request.index, flight.length))
        lane.running.append(flight)
        lane.free_pages -= -(-flight.length // self.settings.page_size)

    def _refuse_for_good(self, flight: Flight, replica: int, error: InsufficientBlocksError) -> bool:
        """Give a request up that an idle replica refused again and again; whether it was given up."""
        if self._busy(self.lanes[replica]):
            flight.refusals = 0
            return False
        flight.refusals += 1
        if flight.refusals < IDLE_REFUSALS:
            return False
        self._left(flight.request, error)
        return True

    def _tick(self) -> bool:
        """Whether there was anything to do. Where time is not kept there always is, or a request waits for pages."""
        settings, verify = self.settings, self._verify
        self._now = self._clock() if settings.prefill_rate is not None else self._now
        batches = [lane.next_batch(settings.max_batch_size, settings.token_budget, self._now) for lane in self.lanes]
        whole = [flight.request_id for batch in batches for flight in batch if flight.checked_whole] if verify else []
        ticks = [lane.tick(batch, verify) for lane, batch in zip(self.lanes, batches, strict=True)]
        if self._timed and not any(batches) and all(tick.empty for tick in ticks):
            return False
        began = self._clock()
        results = self.manager.tick(ticks, forward(whole) if verify else None, raise_errors=False)
        self._now = self._clock()
        self.measured.latency["tick"].add(self._now - began)
        self.measured.ticks += 1
        decoded = 0
        for lane, batch, tick, result in zip(self.lanes, batches, ticks, results, strict=True):
            if isinstance(result.error, UNDONE if self._replaced else ReplicaLostError):
                self._lose(result.error, lane.replica)
                continue
            if result.error is not None:
                raise result.error
            if not tick.empty:
                self.measured.tick(lane.replica, tick, result)
                lane.free_pages = result.free_pages
            self._after_release(lane)
            decoded += self._advance(lane, batch, result)
        if decoded:
            self.measured.latency["itl"].add(self._now - self._tick_end, decoded)
        self._tick_end = self._now
        self._sample()
        return True

    def _after_release(self, lane: Lane) -> None:
        """What was released with this tick leaves, or waits again."""
        for flight in lane.finished:
            self._released(flight, flight.length - 1)
            self._left(flight.request)
        for flight in lane.preempted:
            self._released(flight, flight.context.tokens.processed_length)
            flight.context.reset()
        if lane.finished or lane.preempted:
            (lane if self._round_robin else self._queue).requeue(lane.preempted)
            if lane.finished:
                lane.blocked = self._queue.blocked = False
            lane.finished, lane.preempted = [], []

    def _released(self, flight: Flight, tokens: int) -> None:
        self.measured.events.append(Event("release", flight.request.index, tokens))

    def _advance(self, lane: Lane, batch: list[Flight], result: TickResult) -> int:
        """Move every row past what its forward did; the number of rows that decoded one tick after their last token."""
        page_size, measured, now, tick = self.settings.page_size, self.measured, self._now, self.measured.ticks
        grown, lane.growing = lane.growing, []
        refused = result.refused
        for flight in grown:
            if flight.prefill:
                self._look_again(flight)
            elif flight.request_id in refused:
                lane.growing.append(flight)
            else:
                measured.events.append(Event("grow", flight.request.index, flight.length))
        decoded = generated = 0
        executed: list[Flight] = []
        for flight in batch:
            if refused and flight.request_id in refused:
                continue
            if flight.request_id in result.waiting:  # for pages from a tier
                flight.context.tokens.end = flight.context.tokens.length
                continue
            executed.append(flight)
            if flight.entering:
                flight.entering = False
                self._count_lost(flight)
            prefilled = flight.prefill > 0
            sampled = lane.advance(flight, page_size)
            if prefilled:
                measured.events.append(Event("commit", flight.request.index, flight.context.tokens.processed_length))
                if not sampled:
                    continue
            if flight.first_token_at is None:
                flight.first_token_at = now
                measured.latency["ttft"].add(now - flight.submitted_at)
            elif not prefilled and flight.last_tick == tick - 1:
                decoded += 1
            else:
                measured.latency["itl"].add(now - flight.last_token_at)
            generated += 1
            flight.last_tick, flight.last_token_at = tick, now
            if not flight.left:
                e2e, first = now - flight.submitted_at, flight.first_token_at - flight.submitted_at
                measured.latency["e2e"].add(e2e)
                measured.answered.append(Answered(first, (e2e - first) / max(1, flight.request.output_length - 1), e2e))
        measured.generated += generated
        lane.executed = executed
        if lane.finished:
            lane.running = [flight for flight in lane.running if flight.left]
        if refused and not lane.finished:
            self._preempt(lane)
        return decoded

    def _look_again(self, flight: Flight) -> None:
        """Its turn has come to be prefilled, and its alloc moved it past what others had cached since its admission."""
        left = flight.context.tokens.active_length
        found, flight.prefill = flight.prefill - left, left
        if found and flight.again:
            self.measured.recomputed -= found
        elif found:
            self.measured.gain(flight.counted_at, flight.replica, found)

    def _count_lost(self, flight: Flight) -> None:
        """Pages that a tier did not deliver were computed after all."""
        lost = flight.reused - (flight.context.cached_prefix_length or 0)
        if flight.reused and lost > 0:
            self.measured.lose(flight.replica, lost)
        flight.reused = 0

    def _preempt(self, lane: Lane) -> None:
        """Make the newest running request start over. Alone on its replica it tries again: pages may be in transit."""
        newest = max(lane.running, key=lambda flight: flight.admission)
        if len(lane.running) == 1:
            newest.refusals += 1
            if newest.refusals < IDLE_REFUSALS:
                return
        lane.running.remove(newest)
        if newest in lane.growing:
            lane.growing.remove(newest)
        lane.preempted.append(newest)
        lane.blocked = True
        self._queue.blocked = not self._round_robin
        self.measured.preempted += 1

    def _lose(self, error: RaykError, replica: int) -> None:
        """A replica is lost: what was finished leaves, all else that was on it is sent again. The last one's error ends
        the run, unless it is replaced."""
        if replica in self.lost:
            return
        self.lost[replica] = error
        if self._replaced:
            self.measured.replicas[replica].restarts += 1
        elif len(self.lost) == len(self.lanes):
            raise error
        else:
            self.measured.fault(error, self.elapsed)
        lane, self.lanes[replica] = self.lanes[replica], Lane(replica)
        for flight in lane.finished:  # its answer is whole
            self._released(flight, flight.length - 1)
            self._left(flight.request)
        held = [*lane.running, *lane.preempted]
        for flight in held:
            self._released(flight, flight.context.tokens.processed_length)
            if self.manager.holder(flight.request_id) is not None:  # it was not the replica that was lost
                with suppress(RaykError):
                    self.manager.release(flight.request_id, replica)
            flight.context.reset()
        for flight in reversed(lane.waiting):
            self._queue_of(flight, flight.request.index).requeue([flight])
        self._send_again(held)
        for each in (*self.lanes, self._queue):
            each.blocked = False

    def _send_again(self, flights: list[Flight], lost: bool = True) -> None:
        """To the front of the queue: requests that were `lost` with a replica, unless they lost too many, or that
        nobody takes now."""
        for flight in reversed(flights):
            if lost:
                if flight.retries == MAX_RETRIES and not self._replaced:
                    self._left(flight.request, self.lost[flight.replica])
                    continue
                flight.retries += 1
                self.measured.retried += 1
            self._queue_of(flight, flight.request.index).requeue([flight])
