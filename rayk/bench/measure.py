"""What a run measures while it runs: counters, latencies, samples over time, and the log of cache events.

The driver writes, `result.py` and `progress.py` read. Recording is appending to lists: a run of 20,000 ticks and
700,000 tokens keeps a few megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from rayk.bench.verify import Verified
from rayk.kvcache.tick import Admission, Tick, TickResult
from rayk.simulate.replay import Event


class Latency:
    """Durations in seconds, each standing for a number of equal ones (its weight)."""

    __slots__ = ("_seconds", "_weights")

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._weights: list[int] = []

    def add(self, seconds: float, weight: int = 1) -> None:
        """Record `weight` durations of `seconds` each."""
        self._seconds.append(seconds)
        self._weights.append(weight)

    def __bool__(self) -> bool:
        return bool(self._seconds)

    def quantiles(self, points: list[float]) -> list[float]:
        """The durations below which the shares `points` (0..1) lie. At least one duration must be recorded."""
        seconds = np.array(self._seconds)
        order = np.argsort(seconds, kind="stable")
        reach = np.cumsum(np.array(self._weights)[order])
        at = np.searchsorted(reach, np.ceil(np.array(points) * reach[-1]).clip(1), side="left")
        return [float(value) for value in seconds[order][at]]

    @property
    def mean(self) -> float:
        """Weighted mean in seconds."""
        return float(np.average(self._seconds, weights=self._weights))

    @property
    def count(self) -> int:
        """How many durations were recorded, weights counted."""
        return sum(self._weights)


LATENCIES = ("claim", "alloc", "step", "admit", "tick", "ttft", "itl", "e2e")
"""claim, alloc, step: inside a replica. admit, tick: round trips that the driver sees. The rest: of requests."""


COUNTS = (
    *("completed", "preempted", "prompt", "device_tokens", "peer_tokens", "host_tokens", "disk_tokens"),
    *("recomputed", "retried", "generated"),
)
"""What begins at 0 after a warm-up."""


@dataclass(slots=True)
class ReplicaCounts:
    """What one replica did. `used_pages` is the last known number, None before the first reply."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    used_pages: int | None = None
    peak_used_pages: int | None = None
    restarts: int = 0  # times that it was lost and another was to take its place

    def see(self, used_pages: int) -> None:
        """Take note of how many pages are in use now."""
        self.used_pages = used_pages
        self.peak_used_pages = max(used_pages, self.peak_used_pages or 0)


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that went wrong `at` so many seconds into the run.

    By itself: `kind` is the class of an error and `message` its text, with replica and request if known. Or on purpose
    (rayk.bench.chaos): `kind` as in --chaos, `target` who was hit, seconds until it was noticed and until it was over:
    the replica was replaced and took requests, another scheduler answered, the dead driver's lease had ended, the
    sockets were back, the disk was as before. Absent: that did not happen before the run ended.
    """

    kind: str
    at: float
    message: str | None = None
    replica: int | None = None
    request: str | None = None
    target: str | None = None
    noticed_s: float | None = None
    recovered_s: float | None = None


class Answered(NamedTuple):
    """A request that was served to its end: seconds to its first token, between its tokens (mean), and altogether."""

    ttft: float
    itl: float
    e2e: float


@dataclass(slots=True)
class Sample:
    """The state of the run at one moment, `t` seconds in. `used_pages`: one per replica, None if not known yet."""

    t: float
    used_pages: list[int | None]
    running: int
    waiting: int
    completed: int
    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(slots=True)
class Measured:
    """Everything that was measured. Times are seconds since the start of the run."""

    replicas: list[ReplicaCounts]
    submitted: int = 0
    completed: int = 0
    failed: int = 0
    preempted: int = 0
    prompt: int = 0
    device_tokens: int = 0
    peer_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    recomputed: int = 0
    retried: int = 0
    generated: int = 0
    slots_checked: int = 0
    mismatches: int = 0
    first_mismatch: str | None = None
    ticks: int = 0
    elapsed: float = 0.0
    latency: dict[str, Latency] = field(default_factory=lambda: {name: Latency() for name in LATENCIES})
    admitted: list[tuple[float, int, int]] = field(default_factory=list)  # t, prompt tokens, cached tokens
    events: list[Event] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    warmup: float = 0.0  # until then nothing counts but what failed

    @property
    def cached(self) -> int:
        """Prompt tokens reused at first admissions, from all sources."""
        return self.device_tokens + self.peer_tokens + self.host_tokens + self.disk_tokens

    @property
    def computed(self) -> int:
        """Prompt tokens that were not."""
        return self.prompt - self.cached

    @property
    def hit_rate(self) -> float | None:
        """Cached over prompt tokens of first admissions; None before the first."""
        return self.cached / self.prompt if self.prompt else None

    def warm(self, t: float, in_flight: int) -> None:
        """The warm-up ends, with so many requests in flight: what ended or was admitted by now counts no more."""
        self.warmup, self.submitted = t, in_flight
        for name in COUNTS:
            setattr(self, name, 0)
        self.latency = {name: Latency() for name in LATENCIES}
        self.answered = []
        for counts in self.replicas:
            counts.requests = counts.prompt = counts.cached = 0

    def counts(self, t: float) -> bool:
        """Whether an admission at `t` does."""
        return t >= self.warmup

    def admit(self, t: float, replica: int, prompt: int, admission: Admission) -> None:
        """Count the first admission of a request."""
        if not self.counts(t):
            self.admitted.append((t, prompt, admission.reused_tokens))
            return
        self.prompt += prompt
        for tier in ("device_tokens", "peer_tokens", "host_tokens", "disk_tokens"):
            setattr(self, tier, getattr(self, tier) + getattr(admission, tier))
        self.admitted.append((t, prompt, admission.reused_tokens))
        counts = self.replicas[replica]
        counts.requests += 1
        counts.prompt += prompt
        counts.cached += admission.reused_tokens

    def gain(self, admission: int, replica: int, tokens: int) -> None:
        """So many more tokens of the request of that admission (a place in `admitted`) were cached when its prefill
        began."""
        t, prompt, cached = self.admitted[admission]
        self.admitted[admission] = t, prompt, cached + tokens
        if self.counts(t):
            self.device_tokens += tokens
            self.replicas[replica].cached += tokens

    def lose(self, replica: int, tokens: int) -> None:
        """So many tokens that an admission counted did not arrive from a tier: they were computed."""
        from_disk = min(tokens, self.disk_tokens)
        self.disk_tokens -= from_disk
        self.host_tokens -= tokens - from_disk
        self.replicas[replica].cached -= tokens

    def tick(self, replica: int, tick: Tick, result: TickResult) -> None:
        """Add what one replica did in a tick that was not empty."""
        if tick.step:
            self.latency["step"].add(result.step_seconds)
        if tick.alloc:
            self.latency["alloc"].add(result.alloc_seconds / len(tick.alloc), len(tick.alloc))
        self.replicas[replica].see(result.used_pages)
        if isinstance(result.value, Verified):
            self.slots_checked += result.value.slots_checked
            self.mismatches += result.value.mismatches
            self.first_mismatch = self.first_mismatch or result.value.first

    def fault(self, error: BaseException, t: float, request_id: str | None = None) -> None:
        """Note what went wrong, with the replica that the error names, if any."""
        text = str(error) or "stopped by the user"
        replica = getattr(error, "replica", None)
        self.faults.append(Fault(kind=type(error).__name__, at=t, message=text, replica=replica, request=request_id))
