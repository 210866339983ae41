"""The continuous-batching loop: admission, chunked prefill, decode, preemption and release over all replicas.

One iteration is `try_admit` for what may enter, where there is any, and then exactly one `manager.tick`:

    step     what the last forward processed
    release  what finished in it, and what had to make room
    alloc    decoding requests whose next token needs a page
    execute  the next batch: every decoding request, and prefill in chunks up to the replica's token budget

`--concurrency` requests are in flight over the whole cluster: waiting, running, or finished but not yet released.
With round robin request i (in order of arrival) goes to replica i mod N and waits there, first come first served;
otherwise all wait in one queue and the manager's router places the head. After a refusal nothing more is admitted to
that replica (that queue) until pages were given back. A decoding request whose alloc is refused makes the newest
running request of its replica start over: released, reset, and put back at the front of its queue.

With `--speed` requests are sent when they arrive, however many are in flight. With `--prefill-rate` a prefill is in a
forward only when its time is over, and begins with another look at what is cached; the loop waits when there is
nothing else to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from typing import TYPE_CHECKING

from rayk.bench.capacity import too_large
from rayk.bench.clocked import Arrivals, Prefill
from rayk.bench.in_flight import Flight, Lane
from rayk.bench.lru import Event
from rayk.bench.measure import Measured, ReplicaCounts, Sample
from rayk.bench.request import Workload
from rayk.bench.request_source import Feed
from rayk.bench.verify import forward
from rayk.errors import InsufficientBlocksError
from rayk.kvcache.tick import Admission, Tick, TickResult

if TYPE_CHECKING:
    from rayk.manager.manager import PagedKVCacheManager

SAMPLE_S = 0.1
IDLE_REFUSALS = 20


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How the loop batches. `token_budget` bounds the tokens of one forward on one replica (None: no bound).

    `duration_s` stops sending new requests after that time; what is in flight is finished. `round_robin` places
    requests here, otherwise the manager's router does. `verify` runs the verify model, otherwise tokens just advance.
    `speed`: requests arrive as recorded, so many times as fast, within the clock's tick as `seed` says; there is no
    bound on how many are in flight then. `prefill_rate`: tokens a second of each replica (None: no time).
    """

    replicas: int
    page_size: int
    pages: int
    concurrency: int
    max_batch_size: int
    round_robin: bool
    verify: bool
    token_budget: int | None = None
    duration_s: float | None = None
    speed: float | None = None
    prefill_rate: float | None = None
    seed: int = 0


class Driver:
    """Serves one workload from one manager, once. `measured` is complete up to the moment, whenever run() ends."""

    def __init__(
        self,
        manager: PagedKVCacheManager,
        workload: Workload,
        settings: LoopSettings,
        clock: Callable[[], float],
        on_tick: Callable[[Driver], None] = lambda driver: None,
        wait: Callable[[float], None] = sleep,
    ) -> None:
        self.manager = manager
        self.workload = workload
        self.settings = settings
        self.measured = Measured([ReplicaCounts() for _ in range(settings.replicas)])
        rate, speed = settings.prefill_rate, settings.speed
        self.lanes = [
            Lane(replica, settings.pages, None if rate is None else Prefill(rate))
            for replica in range(settings.replicas)
        ]
        self._queue = Lane(-1, 0)  # for all replicas, when a router places
        self._feed = Feed(workload.requests, None if speed is None else Arrivals(workload, speed, settings.seed))
        self._clock = clock
        self._wait = wait
        self._on_tick = on_tick
        self._start = self._now = self._tick_end = 0.0
        self._admissions = 0
        self._in_flight = 0
        self._sampled_at = -SAMPLE_S

    # -- state for readers -------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, as of the last reply."""
        return self._now - self._start

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return sum(len(lane.running) for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Requests that were sent and wait for admission."""
        return len(self._queue.waiting) + sum(len(lane.waiting) for lane in self.lanes)

    # -- the run ---------------------------------------------------------------------------------------

    def run(self) -> Measured:
        """Serve the workload. Errors of the manager end the run and pass through; `measured` then has the fault."""
        self._start = self._now = self._clock()
        try:
            while True:
                self._submit()
                self._admit()
                if self._over():
                    break
                if not self._tick():
                    self._idle()
                self._on_tick(self)
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, what was measured is kept
            self._now = self._clock()
            self.measured.fault(error, self.elapsed)
            self.measured.failed += self._in_flight
            raise
        finally:
            self._sample()
            self.measured.elapsed = self.elapsed
        return self.measured

    @property
    def _sending(self) -> bool:
        """Whether requests are still sent."""
        return self.settings.duration_s is None or self.elapsed < self.settings.duration_s

    def _over(self) -> bool:
        """Whether nothing is in flight and nothing will be sent any more."""
        return not self._in_flight and not (self._sending and self._feed.next_at < math.inf)

    def _idle(self) -> None:
        """Wait for the next arrival, or the end of the next prefill."""
        until = min(lane.due for lane in self.lanes)
        if self._sending:
            until = min(until, self._start + self._feed.next_at)
        if math.isfinite(until):
            self._wait(max(0.0, until - self._clock()))
        self._now = self._clock()

    def _submit(self) -> None:
        settings = self.settings
        if not self._sending:
            return
        most = settings.concurrency if settings.speed is None else math.inf
        while self._in_flight < most and (request := self._feed.take(self.elapsed)) is not None:
            replica = self.measured.submitted % settings.replicas if settings.round_robin else -1
            self.measured.submitted += 1
            if request.pages(settings.page_size) > settings.pages:
                self.measured.failed += 1
                self.measured.fault(
                    too_large(request, settings.page_size, settings.pages), self.elapsed, request.request_id
                )
                continue
            self._in_flight += 1
            flight = Flight(request, self._now, replica)
            lane = self.lanes[replica] if settings.round_robin else self._queue
            lane.waiting.append(flight)

    # -- admission ---------------------------------------------------------------------------------------

    def _admit(self) -> None:
        chosen: list[Flight] = []
        for lane in self.lanes if self.settings.round_robin else [self._queue]:
            if lane.waiting and not (lane.blocked and self._busy(lane)):
                chosen += self._next_of(lane)
        if not chosen:
            return
        began = self._clock()
        replicas = [flight.replica for flight in chosen] if self.settings.round_robin else None
        admissions = self.manager.try_admit([flight.context for flight in chosen], replicas)
        self._now = self._clock()
        self.measured.latency["admit"].add(self._now - began)
        refused: dict[int, list[Flight]] = {}
        for flight, admission in zip(chosen, admissions, strict=True):
            if admission.error is None:
                self.measured.latency["claim"].add(admission.claim_seconds)
                self.measured.latency["alloc"].add(admission.alloc_seconds)
                flight.replica = admission.replica
                self._enter(flight, admission)
            elif isinstance(admission.error, InsufficientBlocksError):
                if not self._refuse_for_good(flight, admission.replica, admission.error):
                    refused.setdefault(flight.replica, []).append(flight)
            else:
                raise admission.error
        for replica, flights in refused.items():
            lane = self.lanes[replica] if self.settings.round_robin else self._queue
            lane.requeue(flights)
            lane.blocked = True

    def _busy(self, lane: Lane) -> bool:
        return any(lane.running or lane.finished for lane in (self.lanes if lane is self._queue else [lane]))

    def _next_of(self, lane: Lane) -> list[Flight]:
        """Take from the queue what may enter: a place in the batch, pages, and prefill that this tick can begin.

        Only the head may be too large for the free pages (what it reuses may be in use already): those behind it
        must not overtake it when it is refused.
        """
        settings, lanes = self.settings, self.lanes if lane is self._queue else [lane]
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
        self.measured.fault(error, self.elapsed, flight.request_id)
        self.measured.failed += 1
        self._in_flight -= 1
        return True

    # -- one iteration ---------------------------------------------------------------------------------

    def _tick(self) -> bool:
        """Whether there was anything to do. Where time is not kept there always is, or a request waits for pages."""
        settings, verify = self.settings, self.settings.verify
        self._now = self._clock() if settings.prefill_rate is not None else self._now
        batches = [lane.next_batch(settings.max_batch_size, settings.token_budget, self._now) for lane in self.lanes]
        whole = [flight.request_id for batch in batches for flight in batch if flight.checked_whole] if verify else []
        ticks = [
            Tick(
                step=[flight.context for flight in lane.executed],
                release=[flight.request_id for flight in (*lane.finished, *lane.preempted)],
                alloc=[flight.context for flight in lane.growing],
                execute=[flight.context for flight in batch] if verify else (),
            )
            for lane, batch in zip(self.lanes, batches, strict=True)
        ]
        timed = settings.prefill_rate is not None or settings.speed is not None
        if timed and not any(batches) and all(tick.empty for tick in ticks):
            return False
        began = self._clock()
        results = self.manager.tick(ticks, forward(whole) if verify else None)
        self._now = self._clock()
        self.measured.latency["tick"].add(self._now - began)
        self.measured.ticks += 1
        decoded = 0
        for lane, batch, tick, result in zip(self.lanes, batches, ticks, results, strict=True):
            if not tick.empty:
                self.measured.tick(lane.replica, tick, result)
                lane.free_pages = result.free_pages
            self._after_release(lane)
            decoded += self._advance(lane, batch, result)
        if decoded:
            self.measured.latency["itl"].add(self._now - self._tick_end, decoded)
        self._tick_end = self._now
        if self._now - self._sampled_at >= SAMPLE_S:
            self._sample()
        return True

    def _after_release(self, lane: Lane) -> None:
        """What was released with this tick leaves, or waits again."""
        events = self.measured.events
        for flight in lane.finished:
            events.append(Event("release", flight.request.index, flight.length - 1))
            self.measured.completed += 1
            self._in_flight -= 1
            self._feed.finished(flight.request.index)
        for flight in lane.preempted:
            events.append(Event("release", flight.request.index, flight.context.tokens.processed_length))
            flight.context.reset()
        if lane.finished or lane.preempted:
            if self.settings.round_robin:
                lane.requeue(lane.preempted)
            else:
                self._queue.requeue(lane.preempted)
            if lane.finished:
                lane.blocked = self._queue.blocked = False
            lane.finished, lane.preempted = [], []

    def _advance(self, lane: Lane, batch: list[Flight], result: TickResult) -> int:
        """Move every row past what its forward did; the number of rows that decoded one tick after their last token."""
        settings, measured, now, tick = self.settings, self.measured, self._now, self.measured.ticks
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
            context = flight.context
            if flight.request_id in result.waiting:  # for pages from a tier
                context.tokens.end = context.tokens.length
                continue
            executed.append(flight)
            if flight.entering:
                flight.entering = False
                self._count_lost(flight)
            if flight.prefill:
                chunked = context.tokens.end < context.tokens.length
                context.update(flight.next_token)
                flight.prefill = context.tokens.active_length if chunked else 0  # also after a window moved back
                processed = context.tokens.processed_length
                measured.events.append(Event("commit", flight.request.index, processed))
                if flight.prefill:
                    continue
                if flight.first_token_at is None:
                    flight.first_token_at = now
                    measured.latency["ttft"].add(now - flight.submitted_at)
                else:
                    measured.latency["itl"].add(now - flight.last_token_at)
            else:
                context.update(flight.next_token)
                if flight.last_tick == tick - 1:
                    decoded += 1
                else:
                    measured.latency["itl"].add(now - flight.last_token_at)
            generated += 1
            flight.last_tick, flight.last_token_at = tick, now
            flight.next_token -= 1
            flight.length += 1
            flight.left -= 1
            if not flight.left:
                lane.finished.append(flight)
                measured.latency["e2e"].add(now - flight.submitted_at)
            elif (flight.length - 1) % settings.page_size == 0:
                lane.growing.append(flight)
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
        self._queue.blocked = not self.settings.round_robin
        self.measured.preempted += 1

    def _sample(self) -> None:
        measured = self.measured
        self._sampled_at = self._now
        used = [counts.used_pages for counts in measured.replicas]
        measured.samples.append(Sample(self.elapsed, used, self.running, self.waiting, measured.completed))
