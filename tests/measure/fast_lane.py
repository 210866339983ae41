"""What fast lanes gain and cost: `python tests/measure/fast_lane.py [ROUNDS]`.

Decode iterations (one tick over all replicas, see rayk.bench.core.ray_path) of one manager by calls and by lanes, in
turns: milliseconds at the median and at the quickest quarter, and how many times as fast lanes were. Then the CPU time
of all processes of the session while nothing is asked of it: without lanes, with them open, and when they rest. Printed
as the tables of docs/measurements/fast-lane.md.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

import psutil

from rayk.bench.core.ray_path import cpu_seconds, iterate, ray_params, start_lanes
from rayk.context import TextContext
from rayk.kvcache.tick import Tick
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.actors.lane import FastLane

SIZES = ((1, 8), (1, 64), (1, 256), (2, 8), (2, 64), (4, 8), (4, 64))  # replicas, requests on each
ITERATIONS = 10  # of a round and way; the first one is not counted
IDLE_SECONDS = 3.0
OPEN_SECONDS = 30.0
PAGES = 60_000


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    arguments = sys.argv[1:] if argv is None else argv
    rounds = int(arguments[0]) if arguments else 20
    idle: list[str] = []
    with InferenceSession(runtime="ray", address="local") as session:
        what = f"Python {platform.python_version()}, Ray {version('ray')}, {psutil.cpu_count()} cores"
        print(f"{datetime.now(UTC):%Y-%m-%d}, {what}, {rounds} rounds, load {_load()} at the start\n")
        print("| replicas x requests | median: calls / lanes, ms | | quickest quarter: calls / lanes, ms | |")
        print("|---|---:|---:|---:|---:|", flush=True)
        for replicas in sorted({r for r, _ in SIZES}):
            with PagedKVCacheManager(ray_params(replicas), session, PAGES, max_batch_size=256) as manager:
                bench, cores = _Bench(manager, replicas), [_idle()]
                for batch in [b for r, b in SIZES if r == replicas]:
                    call, lane = bench.compare(batch, rounds)
                    middle, quick = (_at(call, lane, quarter) for quarter in (2, 1))
                    print(f"| {replicas} x {batch} | {middle} | {quick} |", flush=True)
                cores += [_idle(), bench.rest()]
                idle.append(f"| {replicas} | {' | '.join(f'{each:.2f}' for each in cores)} |")
        print("\n| replicas, idle | cores without lanes | with lanes open | with lanes that rest |")
        print("|---|---:|---:|---:|", *idle, sep="\n")
        print(f"\nload {_load()} at the end")
    return 0


class _Bench:
    """One manager whose lanes are put in and taken out, with the same requests on both ways."""

    def __init__(self, manager: PagedKVCacheManager, replicas: int) -> None:
        from rayk.manager.calls import Calls

        self.manager, self.replicas, calls = manager, replicas, manager._calls
        assert isinstance(calls, Calls)
        self.links = [calls.link(r) for r in range(replicas)]
        calls.lay_lanes()
        self.lanes: dict[str, list[FastLane | None]] = {"call": [None] * replicas, "lane": [k.lane for k in self.links]}
        self._take("call")

    def _take(self, way: str) -> None:
        for link, lane in zip(self.links, self.lanes[way], strict=True):
            link.lane = lane

    def compare(self, batch: int, rounds: int) -> tuple[list[float], list[float]]:
        """Milliseconds of iterations by calls, and by lanes."""
        requests = start_lanes(self.manager, self.replicas, batch)
        self._take("lane")
        self._await("open", lambda: iterate(self.manager, requests))
        taken: dict[str, list[float]] = {way: [] for way in self.lanes}
        went = self._went()
        for number in range(rounds + 1):
            for way in self.lanes:
                self._take(way)
                times = [self._time(requests) for _ in range(ITERATIONS)]
                taken[way] += times[1:] if number else []
        if self._went() - went != self.replicas * ITERATIONS * (rounds + 1):
            raise RuntimeError("a lane broke or rested: these would be times of calls")
        self.manager.tick([Tick(release=[ctx.request_id for ctx in each]) for each in requests])
        return taken["call"], taken["lane"]

    def rest(self) -> float:
        """Cores in use while all lanes rest."""
        self._await("resting", lambda: time.sleep(0.1))
        return _idle()

    def _await(self, state: str, meanwhile: Callable[[], None]) -> None:
        """Return when all lanes are in that state."""
        until = time.monotonic() + OPEN_SECONDS
        while {each.state for each in self.manager.lane_states()} != {state}:
            if time.monotonic() > until:
                raise RuntimeError(f"not all lanes are {state}: {self.manager.lane_states()}")
            meanwhile()

    def _went(self) -> int:
        """Messages that went by lanes so far."""
        return sum(each.messages for each in self.manager.lane_states())

    def _time(self, requests: Sequence[Sequence[TextContext]]) -> float:
        start = time.perf_counter()
        iterate(self.manager, requests)
        return (time.perf_counter() - start) * 1e3


def _at(call: list[float], lane: list[float], quarter: int) -> str:
    by_call, by_lane = (statistics.quantiles(times, n=4)[quarter - 1] for times in (call, lane))
    return f"{by_call:.2f} / {by_lane:.2f} | {by_call / by_lane:.2f}x"


def _load() -> str:
    return f"{psutil.getloadavg()[0]:.1f}"


def session_cpu() -> float:
    """CPU seconds of this process and all that it started so far."""
    return cpu_seconds([os.getpid(), *(each.pid for each in psutil.Process().children(recursive=True))])


def _idle() -> float:
    """Cores in use by this process and all that it started, while it waits."""
    time.sleep(1.0)  # what came before has settled
    before, start = session_cpu(), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (session_cpu() - before) / (time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
