"""The closed loop: sends a workload's requests, so many in flight or as they arrive, and measures what becomes of them.

What serves them is a driver, which takes a request and goes on for a step: ManagerDriver batches over the caches of a
manager, ClusterDriver hands requests to a Cluster's engines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import sleep
from typing import Any

from rayk.bench.measure import Measured, ReplicaCounts, Sample
from rayk.bench.request_source import Arrivals, Feed, Source, Users
from rayk.bench.settings import BenchSettings
from rayk.workloads.request import BenchRequest, Workload

SAMPLE_S = 0.1


class ClosedLoop(ABC):
    """Serves one workload, once. `measured` is complete up to the moment, whenever run() ends.

    Sending stops after `duration_s`; what is in flight is finished. With `speed` requests are sent when they arrive,
    however many are in flight; with a think time so many users ask one after the other (rayk.bench.request_source).
    What ends in the first `warmup_s` seconds is left out.
    """

    def __init__(
        self,
        workload: Workload,
        settings: BenchSettings,
        clock: Callable[[], float],
        on_tick: Callable[[Any], None] = lambda driver: None,
        wait: Callable[[float], None] = sleep,
    ) -> None:
        self.workload, self.settings = workload, settings
        self.measured = Measured([ReplicaCounts() for _ in range(settings.replicas)])
        speed = settings.speed
        self._feed: Source
        if settings.think_time is not None:
            self._feed = Users(workload, settings.concurrency, settings.think_time, settings.seed)
        else:
            self._feed = Feed(workload.requests, None if speed is None else Arrivals(workload, speed, settings.seed))
        self._timed = settings.prefill_rate is not None or speed is not None or settings.think_time is not None
        self._clock, self._wait, self._on_tick = clock, wait, on_tick
        self._start = self._now = 0.0
        self._in_flight = 0
        self._sampled_at = -SAMPLE_S

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, as of the last reply."""
        return self._now - self._start

    @property
    @abstractmethod
    def running(self) -> int:
        """Requests that hold pages."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Requests that were sent and wait for admission."""

    @abstractmethod
    def _take(self, request: BenchRequest) -> None:
        """A request is sent."""

    @abstractmethod
    def _step(self) -> None:
        """Serve until something came of it."""

    def _look(self) -> None:
        """Bring up to date what a sample shows."""
        return

    def run(self) -> Measured:
        """Serve the workload. Errors of what serves it end the run and pass through; `measured` then has the fault."""
        self._start = self._now = self._clock()
        try:
            while True:
                self._send()
                if not self._in_flight and not (self._sending and self._feed.next_at < math.inf):
                    break
                self._step()
                if not self.measured.warmup and self.elapsed >= (self.settings.warmup_s or math.inf):
                    self.measured.warm(self.elapsed, self._in_flight)
                self._on_tick(self)
            self._look()
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, what was measured is kept
            self._now = self._clock()
            self.measured.fault(error, self.elapsed)
            self.measured.failed += self._in_flight
            raise
        finally:
            self._append_sample()
            self.measured.elapsed = self.elapsed
        return self.measured

    @property
    def _sending(self) -> bool:
        """Whether requests are still sent."""
        if self.settings.duration_s is None:
            return True
        return self.elapsed < self.settings.duration_s + (self.settings.warmup_s or 0.0)

    def _send(self) -> None:
        most = self.settings.concurrency if not self.settings.open_loop else math.inf
        while self._sending and self._in_flight < most and (request := self._feed.take(self.elapsed)) is not None:
            self.measured.submitted += 1
            self._in_flight += 1
            self._take(request)

    def _left(self, request: BenchRequest, error: Exception | None = None) -> None:
        """A request is done, or failed for good; the next turn of its session may be sent."""
        self._in_flight -= 1
        self._feed.finished(request.index, self.elapsed)
        if error is None:
            self.measured.completed += 1
        else:
            self.measured.failed += 1
            self.measured.fault(error, self.elapsed, request.request_id)

    def _sample(self) -> None:
        if self._now - self._sampled_at >= SAMPLE_S:
            self._look()
            self._append_sample()

    def _append_sample(self) -> None:
        measured, self._sampled_at = self.measured, self._now
        used = [counts.used_pages for counts in measured.replicas]
        counts = measured.completed, measured.prompt, measured.cached, measured.generated
        measured.samples.append(Sample(self.elapsed, used, self.running, self.waiting, *counts))
