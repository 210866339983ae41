"""A cluster of real replicas that is asked for several times what it can do, by two drivers, and how it takes that.

    alone     one request at a time: the unloaded latency; the deadline is `patience` times its median
    capacity  as many in flight as find room: requests a second
    1x        that many a second arrive, with the deadline
    over      `factor` times as many, for a minute

One tenant is polite and asks for less than its share at all times; the other sends all the rest. What is wanted of
it all is in judge(), each line with its limit.
"""

from __future__ import annotations

import statistics
import threading
import uuid
from typing import Any

import msgspec
import psutil
from rich.console import Console

from rayk import protocol as m
from rayk.bench.flags import OverloadFlags
from rayk.bench.overload_driver import Load, Outcome, OverloadDriver, Phase
from rayk.cli.flags import Format
from rayk.cli.table import make_table
from rayk.manager.manager import PagedKVCacheManager
from rayk.params import require
from rayk.protocol.admission import AdmissionPolicy
from rayk.quantity import parse_duration
from rayk.session import InferenceSession

POLITE, FLOOD = "polite", "flood"
POLITE_PART = 0.25  # of the capacity; its share is a half
SAMPLE_SECONDS = 0.5
START_SECONDS, MARGIN_SECONDS = 120.0, 120.0
MIB = 1 << 20


class OverloadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How long each phase lasts, in seconds, and how much is too much."""

    replicas: int = 2
    seconds: float = 60.0
    factor: float = 5.0
    patience: float = 5.0
    alone: float = 40.0
    capacity: float = 20.0
    once: float = 30.0
    max_waiting: int = 64
    address: str = "local"
    seed: int = 0


class Growth(msgspec.Struct, frozen=True):
    """Resident bytes of a process in the overload: at its start, the most, and the mean of its last two thirds, one
    after the other."""

    start: int
    most: int
    middle: float
    last: float


class Rates(msgspec.Struct, frozen=True):
    """What one tenant had in one phase: requests, of those let in the part that was done in time, those a second, and
    the longest wait."""

    offered: int
    done: int
    in_time: int
    refused: int
    errors: int
    goodput: float
    longest_wait: float
    p50: float

    @property
    def share(self) -> float:
        """Of those that were let in, the part that met the deadline."""
        return self.in_time / self.done if self.done else 1.0


class Verdict(msgspec.Struct, frozen=True):
    """One line of the acceptance: what was found, what is wanted, and whether that holds."""

    what: str
    found: str
    wanted: str
    ok: bool


class OverloadResult(msgspec.Struct, frozen=True):
    """Seconds and requests a second; `phases` by phase and tenant."""

    unloaded_p50: float
    deadline: float
    capacity: float
    goodput_1x: float
    goodput_over: float
    phases: dict[str, dict[str, Rates]]
    most_waiting: int
    memory: dict[str, Growth]
    verdicts: list[Verdict]

    @property
    def ok(self) -> bool:
        """Whether all lines hold."""
        return all(line.ok for line in self.verdicts)


class _Watch:
    """Samples memory and the queue beside a phase."""

    def __init__(self, pids: dict[str, int], manager: PagedKVCacheManager) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._calls: Any = manager._calls
        self._over = threading.Event()
        self.memory: dict[str, list[int]] = {name: [] for name in pids}
        self.waiting: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            for name, process in self._processes.items():
                self.memory[name].append(process.memory_info().rss)
            told: m.Description = self._calls.scheduler.ask(m.Describe())
            assert told.admission is not None
            self.waiting.append(told.admission.waiting)

    def growth(self) -> dict[str, Growth]:
        """Of each process."""
        out = {}
        for name, sizes in self.memory.items():
            third = max(1, len(sizes) // 3)
            middle, last = sizes[-2 * third : -third] or sizes, sizes[-third:]
            out[name] = Growth(sizes[0], max(sizes), statistics.fmean(middle), statistics.fmean(last))
        return out


def make_load(name: str, settings: OverloadSettings) -> Load:
    """The cluster, with a policy that keeps what is in it to what it can serve at a time."""
    rows = Load(name=name).rows
    policy = AdmissionPolicy(max_waiting=settings.max_waiting, patience=10.0, max_running=rows, max_unfilled=1024)
    return Load(name=name, replicas=settings.replicas, policy=policy)


def arrivals(capacity: float, factor: float, seconds: float, deadline: float) -> dict[str, Phase]:
    """`factor` times the capacity, by tenant."""
    rates = {POLITE: POLITE_PART * capacity, FLOOD: (factor - POLITE_PART) * capacity}
    return {t: Phase(seconds=seconds, rate=rate, deadline=deadline) for t, rate in rates.items()}


class Overload:
    """Starts a cluster of its own name with two drivers; close() ends both."""

    def __init__(self, settings: OverloadSettings) -> None:
        from rayk.actors.interface import ActorSpec

        self.settings = settings
        self.load = make_load(f"overload-{uuid.uuid4().hex[:8]}", settings)
        self._session = InferenceSession("ray", settings.address, self.load.name)
        self._drivers, self._pids = dict[str, Any](), dict[str, int]()
        try:
            self._manager = PagedKVCacheManager(
                self.load.params(), self._session, self.load.pages, **self.load.options()
            )
            for seed, tenant in enumerate((POLITE, FLOOD)):
                spec = ActorSpec(OverloadDriver, (self.load, tenant, 2 * settings.seed + seed))
                self._drivers[tenant] = self._session.ray.start(spec)
            for tenant, driver in self._drivers.items():
                pid = self._session.ray.get(driver.call("ping"), f"driver {tenant}", START_SECONDS)
                self._pids[f"driver {tenant}"] = pid
            calls: Any = self._manager._calls
            self._pids["scheduler"] = calls.scheduler_pid()
            self._pids |= {f"replica {r}": pid for r, pid in enumerate(calls.replica_pids())}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End drivers and cluster."""
        self._session.ray.stop(list(self._drivers.values()), None)
        for manager in list(self._session._managers):
            manager.shutdown()
        self._session.close()

    def measure(self) -> OverloadResult:
        """All phases, and the verdicts."""
        settings = self.settings
        alone = self._phase({POLITE: Phase(seconds=settings.alone, in_flight=1)})[POLITE]
        p50 = statistics.median(alone.latencies)
        deadline = settings.patience * p50
        crowd = 2 * self.load.rows * self.load.replicas
        skip = settings.capacity / 4
        full = self._phase(dict.fromkeys((POLITE, FLOOD), Phase(seconds=settings.capacity, in_flight=crowd, skip=skip)))
        capacity = sum(len(each.latencies) for each in full.values()) / (settings.capacity - skip)
        require(capacity > 0, f"no request was done within {settings.capacity:g} s; measure where cores are free")
        once = self._phase(arrivals(capacity, 1.0, settings.once, deadline))
        with _Watch(self._pids, self._manager) as watch:
            over = self._phase(arrivals(capacity, settings.factor, settings.seconds, deadline))
        phases = {
            "1x": {t: _rates(o, deadline, settings.once) for t, o in once.items()},
            "over": {t: _rates(o, deadline, settings.seconds) for t, o in over.items()},
        }
        goodput = {name: sum(r.goodput for r in rates.values()) for name, rates in phases.items()}
        result = OverloadResult(
            p50, deadline, capacity, goodput["1x"], goodput["over"], phases, max(watch.waiting), watch.growth(), []
        )
        return msgspec.structs.replace(result, verdicts=judge(settings, result, over))

    def _phase(self, phases: dict[str, Phase]) -> dict[str, Outcome]:
        refs = {tenant: self._drivers[tenant].call("run", phase) for tenant, phase in phases.items()}
        longest = max(phase.seconds for phase in phases.values()) + MARGIN_SECONDS
        return {tenant: self._session.ray.get(ref, f"driver {tenant}", longest) for tenant, ref in refs.items()}


def _rates(outcome: Outcome, deadline: float, seconds: float) -> Rates:
    in_time = sum(latency <= deadline for latency in outcome.latencies)
    waits = outcome.waits + outcome.refused_after
    return Rates(
        offered=outcome.offered,
        done=len(outcome.latencies),
        in_time=in_time,
        refused=outcome.refused,
        errors=len(outcome.errors),
        goodput=in_time / seconds,
        longest_wait=max(waits, default=0.0),
        p50=statistics.median(outcome.latencies) if outcome.latencies else 0.0,
    )


LEAST_SHARE, LEAST_GOODPUT = 0.99, 0.9
LEAST_POLITE = 0.9  # it asks for half its share, but at random: at times that is more than its share
MOST_GROWTH, MOST_DRIFT = 64, 16  # MiB
SLACK = 0.25  # seconds that a message and a look may take on a busy machine


def judge(settings: OverloadSettings, result: OverloadResult, over: dict[str, Outcome]) -> list[Verdict]:
    """The lines of the acceptance for the overload."""
    rates = result.phases["over"]
    done, in_time = sum(r.done for r in rates.values()), sum(r.in_time for r in rates.values())
    refused, errors = sum(r.refused for r in rates.values()), sum(r.errors for r in rates.values())
    offered = sum(r.offered for r in rates.values())
    timed = sum(0 < after <= 60 for outcome in over.values() for after in outcome.retry_after)
    share, ratio = in_time / max(1, done), result.goodput_over / result.goodput_1x
    polite = rates[POLITE].in_time / max(1, rates[POLITE].offered)
    wait = max(r.longest_wait for r in rates.values())
    grown = max(g.most - g.start for g in result.memory.values()) / MIB
    drift = max(g.last - g.middle for g in result.memory.values()) / MIB
    typed = timed == refused == offered - done and not errors
    longest, waiting = result.deadline + SLACK, result.most_waiting
    return [
        Verdict("rejections are typed, with a time", f"{timed:,} of {offered - done:,}", "all", typed),
        Verdict("accepted and in time", f"{share:.4f}", f">= {LEAST_SHARE}", share >= LEAST_SHARE),
        Verdict("goodput over that at 1x", f"{ratio:.3f}", f">= {LEAST_GOODPUT}", ratio >= LEAST_GOODPUT),
        Verdict("of the polite tenant, in time", f"{polite:.4f}", f">= {LEAST_POLITE}", polite >= LEAST_POLITE),
        Verdict("longest wait, s", f"{wait:.2f}", f"<= {longest:.2f}", wait <= longest),
        Verdict("most that waited", f"{waiting}", f"<= {settings.max_waiting}", waiting <= settings.max_waiting),
        Verdict("growth of any process, MiB", f"{grown:.1f}", f"<= {MOST_GROWTH}", grown <= MOST_GROWTH),
        Verdict("and in its last third, MiB", f"{drift:.1f}", f"<= {MOST_DRIFT}", drift <= MOST_DRIFT),
    ]


def overload(flags: OverloadFlags) -> int:
    """Measure, judge and print; 1 when the cluster takes it badly."""
    settings = OverloadSettings(
        seconds=parse_duration(flags.duration),
        patience=flags.deadline,
        **{name: getattr(flags, name) for name in ("replicas", "factor", "max_waiting", "address", "seed")},
    )
    if flags.smoke:
        settings = msgspec.structs.replace(settings, seconds=6.0, alone=3.0, capacity=4.0, once=4.0)
    measured = Overload(settings)
    try:
        result = measured.measure()
    finally:
        measured.close()
    if flags.form is Format.json:
        print(msgspec.json.encode({"command": "bench overload", **msgspec.structs.asdict(result)}).decode())
    else:
        _show(result)
    return 0 if result.ok else 1


def _show(result: OverloadResult) -> None:
    console = Console()
    head = f"unloaded {result.unloaded_p50:.3f} s (median), deadline {result.deadline:.2f} s"
    console.print(f"{head}, capacity {result.capacity:.1f} requests/s", highlight=False)
    columns = ("", "tenant", "offered", "let in", "in time", "refused", "goodput", "p50", "waited")
    rows = [
        (
            *(phase, tenant, f"{r.offered:,}", f"{r.done:,}", f"{100 * r.share:.2f} %", f"{r.refused:,}"),
            *(f"{r.goodput:.1f}", f"{r.p50:.2f} s", f"{r.longest_wait:.2f} s"),
        )
        for phase, tenants in result.phases.items()
        for tenant, r in tenants.items()
    ]
    console.print(make_table("arrivals", columns, rows, left=("", "tenant")))
    memory = [
        (name, *(f"{size / MIB:.1f}" for size in (growth.start, growth.most, growth.middle, growth.last)))
        for name, growth in result.memory.items()
    ]
    thirds = ("process", "start", "most", "middle third", "last third")
    console.print(make_table("resident memory in the overload, MiB", thirds, memory, left=("process",)))
    verdicts = [(line.what, line.found, line.wanted, "ok" if line.ok else "NO") for line in result.verdicts]
    console.print(make_table("verdicts", ("", "found", "wanted", ""), verdicts, left=("", "wanted")))
