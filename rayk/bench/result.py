"""result.json: the forms of what `rayk bench` reports, and how a run becomes one.

Times in seconds, sizes in bytes, rates 0..1. What was not measured is absent, never 0: optional fields default to
None and defaults are left out when encoding. CLI.md's fields keep their names; everything else is in addition.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

import rayk
from rayk.bench.chaos.run import ChaosResult
from rayk.bench.measure import Fault, Latency, Measured
from rayk.bench.settings import BenchSettings
from rayk.errors import ConfigError
from rayk.simulate.replay import Replayed, replay
from rayk.workloads.request import Workload

MAX_POINTS = 400
T = TypeVar("T", bound=msgspec.Struct)
_PERCENT = [p / 100 for p in range(101)]


class _Form(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Requests(_Form, frozen=True, kw_only=True):
    """Counts of requests. `failed` were refused for good or lost; `preempted` counts preemptions."""

    submitted: int
    completed: int
    failed: int
    preempted: int
    retried: int


class Tokens(_Form, frozen=True, kw_only=True):
    """Tokens at first admissions (prompt = cached + computed), generated ones, and those computed again."""

    prompt: int
    cached: int
    computed: int
    generated: int
    recomputed: int


class ByTier(_Form, frozen=True, kw_only=True):
    """Share of prompt tokens reused from each tier; absent where there is no such tier."""

    device: float | None = None
    host: float | None = None
    disk: float | None = None
    peer: float | None = None


class HitRate(_Form, frozen=True, kw_only=True):
    """Cached over prompt tokens: as measured, and what one pooled and one infinite cache would have given."""

    by_tier: ByTier
    measured: float | None = None
    simulated_pooled: float | None = None
    infinite: float | None = None


class TierUse(_Form, frozen=True, kw_only=True):
    """What the tiers did in the run, in pages over all replicas, and what they held at its end, of the first node."""

    offloaded: int
    loaded: int
    disk_written: int
    disk_read: int
    failed_loads: int
    rejected_files: int
    host_pages: int
    host_used: int
    disk_pages: int
    disk_used: int


class VerifyCounts(_Form, frozen=True, kw_only=True):
    """Slots compared, each in all layers and shards, and how many held other bytes."""

    slots_checked: int
    mismatches: int
    first_mismatch: str | None = msgspec.field(name="first", default=None)


class LatencySummary(_Form, frozen=True, kw_only=True):
    """Seconds. `quantiles` are the percentiles 0..100, `count` how many durations there were."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float
    count: int
    quantiles: list[float]


class Throughput(_Form, frozen=True, kw_only=True):
    """Per second of the run."""

    requests_per_s: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float


class Goodput(_Form, frozen=True, kw_only=True):
    """Requests that met the objectives (seconds to the first token, seconds between tokens in the mean of a request):
    how many, their share of those that were to be served, and how many a second."""

    ttft: float | None = None
    itl: float | None = None
    met: int
    share: float
    requests_per_s: float


class ReplicaResult(_Form, frozen=True, kw_only=True):
    """One replica."""

    index: int
    pages: int
    requests: int
    restarts: int
    node: str | None = None
    hit_rate: float | None = None
    peak_used_pages: int | None = None


class HitRateSeries(_Form, frozen=True, kw_only=True):
    """Cumulative hit rates after admissions: [n] each, `t` in seconds."""

    t: list[float]
    measured: list[float]
    pooled: list[float]
    infinite: list[float]


class Series(_Form, frozen=True, kw_only=True):
    """The run over time. `used_pages` has one list per replica, null where it was not known yet."""

    t: list[float]
    used_pages: list[list[int | None]]
    running: list[int]
    waiting: list[int]
    completed: list[int]
    prompt: list[int] = []
    cached: list[int] = []
    generated: list[int] = []
    hit_rate: HitRateSeries | None = None


class BenchResult(_Form, frozen=True, kw_only=True):
    """One run of `rayk bench`."""

    command: str
    version: str
    config: dict[str, Any]
    environment: dict[str, Any]
    requests: Requests
    tokens: Tokens
    hit_rate: HitRate
    latency: dict[str, LatencySummary]
    throughput: Throughput
    replicas: list[ReplicaResult]
    faults: list[Fault]
    series: Series
    elapsed: float
    verify: VerifyCounts | None = None
    tiers: TierUse | None = None
    chaos: ChaosResult | None = None
    imbalance: float | None = None
    goodput: Goodput | None = None
    warmup: float | None = None  # seconds at its start that are left out of all but faults, verify and series

    @property
    def ok(self) -> bool:
        """Whether every request was served and every checked slot held what it must."""
        return not self.failure

    @property
    def failure(self) -> str:
        """What was not as it must be; empty if nothing."""
        asked, verify = self.requests, self.verify
        parts = [f"{asked.failed} of {asked.submitted} requests failed"] if asked.failed else []
        if verify is not None and verify.mismatches:
            parts.append(f"{verify.mismatches} slots held other bytes ({verify.first_mismatch})")
        if self.chaos is not None and not self.chaos.ok:
            parts.append("something was left after the faults")
        left = [f"{fault.kind}: {fault.message or fault.target}" for fault in self.faults if fault.recovered_s is None]
        parts += [*left[:1], f"and {len(left) - 1} more"] if len(left) > 1 else left
        return "; ".join(parts)

    def to_json(self) -> bytes:
        """One line of JSON."""
        return msgspec.json.encode(self)


def read_result(path: Path) -> BenchResult:
    """A result.json, or the last one in a log (`-`: standard input). ConfigError says what is wrong with it."""
    try:
        data = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
        lines = [line for line in data.splitlines() if line.startswith(b'{"command":"bench"')]
        return msgspec.json.decode(lines[-1] if lines else data, type=BenchResult)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the result.json of a run") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not the result of rayk bench: {error}") from None


def make_result(
    settings: BenchSettings,
    workload: Workload,
    measured: Measured,
    nodes: Sequence[str] = (),
    tiers: TierUse | None = None,
    chaos: ChaosResult | None = None,
    simulated: bool = True,
) -> BenchResult:
    """The result of a run, also of one that was stopped. Replays its events to simulate other caches, if `simulated`:
    that takes about as long as the run itself did in the control plane.

    `nodes` are the host names of the replicas, in order, where known.
    """
    size, total = settings.page_size, settings.pages * settings.replicas
    pooled = replay(measured.events, workload.requests, size, total) if simulated else None
    infinite = replay(measured.events, workload.requests, size, None) if simulated else None
    elapsed = measured.elapsed - measured.warmup
    counted = [measured.counts(t) for t, _, _ in measured.admitted]
    per_s = 1 / elapsed if elapsed > 0 else 0.0
    computed = [counts.prompt - counts.cached for counts in measured.replicas]
    share = 1 / measured.prompt if measured.prompt else None
    present = {
        "device": True,
        "peer": settings.peer_copies,
        "host": settings.connector != "null",
        "disk": settings.connector == "tiered",
    }
    by_tier = {name: share and getattr(measured, f"{name}_tokens") * share for name, there in present.items() if there}
    return BenchResult(
        command="bench",
        version=rayk.__version__,
        config=settings.as_config(),
        environment=environment(),
        requests=_read(Requests, measured),
        tokens=_read(Tokens, measured),
        hit_rate=HitRate(
            measured=measured.hit_rate,
            simulated_pooled=_hit_rate(pooled, counted),
            infinite=_hit_rate(infinite, counted),
            by_tier=ByTier(**by_tier),
        ),
        verify=_read(VerifyCounts, measured) if settings.forward == "verify" else None,
        tiers=tiers,
        chaos=chaos,
        latency={name: _summary(latency) for name, latency in measured.latency.items() if latency},
        throughput=Throughput(
            requests_per_s=measured.completed * per_s,
            prompt_tokens_per_s=measured.prompt * per_s,
            generated_tokens_per_s=measured.generated * per_s,
        ),
        replicas=[
            ReplicaResult(
                index=index,
                pages=settings.pages,
                requests=counts.requests,
                restarts=counts.restarts,
                node=nodes[index] if nodes else None,
                hit_rate=counts.cached / counts.prompt if counts.prompt else None,
                peak_used_pages=counts.peak_used_pages,
            )
            for index, counts in enumerate(measured.replicas)
        ],
        imbalance=max(computed) * len(computed) / sum(computed) if sum(computed) else None,
        faults=measured.faults,
        series=_series(measured, pooled, infinite),
        elapsed=elapsed,
        goodput=_goodput(settings, measured, per_s),
        warmup=measured.warmup or None,
    )


def _hit_rate(replayed: Replayed | None, counted: Sequence[bool]) -> float | None:
    """Of the admissions that count; the cache was filled by all."""
    if replayed is None:
        return None
    prompt = sum(tokens for tokens, counts in zip(replayed.prompt, counted, strict=False) if counts)
    cached = sum(tokens for tokens, counts in zip(replayed.cached, counted, strict=False) if counts)
    return cached / prompt if prompt else None


def _goodput(settings: BenchSettings, measured: Measured, per_s: float) -> Goodput | None:
    ttft, itl = settings.slo_ttft, settings.slo_itl
    if ttft is None and itl is None:
        return None
    most_ttft, most_itl = ttft if ttft is not None else math.inf, itl if itl is not None else math.inf
    met = sum(each.ttft <= most_ttft and each.itl <= most_itl for each in measured.answered)
    share = met / max(1, measured.completed + measured.failed)
    return Goodput(ttft=ttft, itl=itl, met=met, share=share, requests_per_s=met * per_s)


def _read(form: type[T], measured: Measured) -> T:
    """A form whose fields are what was measured under the same names."""
    return form(**{name: getattr(measured, name) for name in form.__struct_fields__})


def environment() -> dict[str, Any]:
    """What the run ran on: versions of what matters, the machine's kind and its number of cores."""
    out: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "rayk": rayk.__version__,
    }
    for package in ("ray", "torch", "numpy"):
        with suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def _summary(latency: Latency) -> LatencySummary:
    quantiles = latency.quantiles(_PERCENT)
    p50, p90, p99, most = (quantiles[p] for p in (50, 90, 99, 100))
    return LatencySummary(
        p50=p50, p90=p90, p99=p99, mean=latency.mean, max=most, count=latency.count, quantiles=quantiles
    )


def _series(measured: Measured, pooled: Replayed | None, infinite: Replayed | None) -> Series:
    samples = [measured.samples[i] for i in _picked(len(measured.samples))]
    counted = np.array([measured.counts(t) for t, _, _ in measured.admitted], bool)
    hit_rate = None
    if counted.any() and pooled and infinite:
        at = _picked(int(counted.sum()))
        times, prompts, cached = (np.array(column)[counted] for column in zip(*measured.admitted, strict=True))
        prompt = np.cumsum(prompts)

        def rate(tokens: Any) -> list[float]:
            found: list[float] = (np.cumsum(tokens) / prompt)[at].tolist()
            return found

        hit_rate = HitRateSeries(
            t=times[at].tolist(),
            measured=rate(cached),
            pooled=rate(np.array(pooled.cached)[counted]),
            infinite=rate(np.array(infinite.cached)[counted]),
        )
    names = ("t", "running", "waiting", "completed", "prompt", "cached", "generated")
    columns = {name: [getattr(sample, name) for sample in samples] for name in names}
    used = [[sample.used_pages[r] for sample in samples] for r in range(len(measured.replicas))]
    return Series(**columns, used_pages=used, hit_rate=hit_rate)


def _picked(count: int) -> list[int]:
    """Indices of at most MAX_POINTS of `count` entries, evenly spread, the last one always among them."""
    if count <= MAX_POINTS:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, MAX_POINTS).round().astype(int)).tolist()  # type: ignore[no-any-return]
