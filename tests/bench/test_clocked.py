"""Runs that keep time: requests sent as they arrive, prefill at a rate, on a clock that only waiting moves."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from rayk.bench.in_flight import Prefill
from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.request_source import Arrivals, Feed
from rayk.bench.result import make_result
from rayk.bench.settings import BenchSettings, complete
from rayk.errors import ConfigError
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession
from rayk.simulate.model import Case, Simulator
from rayk.workloads import generators as workloads
from rayk.workloads.request import BenchRequest, TokenSpace, Workload

Lengths = Callable[..., Workload]
Timed = Callable[..., ManagerDriver]


class Clock:
    """Stands still but for waits and `step` seconds whenever it is read; `waits` says how long those were."""

    def __init__(self, step: float) -> None:
        self.now, self.step, self.waits = 0.0, step, list[float]()

    def read(self) -> float:
        self.now += self.step
        return self.now

    def wait(self, seconds: float) -> None:
        assert seconds >= 0
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def timed() -> Iterator[Timed]:
    """Runs a workload inline on a Clock to its end; gives the driver. Keywords are those of BenchSettings."""
    with InferenceSession() as session:

        def run(workload: Workload, pages: int | None = None, step: float = 1e-6, **settings: object) -> ManagerDriver:
            asked = BenchSettings(runtime="inline", forward="none", peer_copies=False, **settings)  # type: ignore[arg-type]
            full = complete(asked, workload, pages)
            manager = PagedKVCacheManager(
                full.params(), session, full.pages, max_batch_size=full.max_batch_size, router=full.router
            )
            clock = Clock(step)
            driver = ManagerDriver(manager, workload, full, clock.read, wait=clock.wait)
            driver.run()
            manager.check_integrity()
            manager.shutdown()
            measured = driver.measured
            assert measured.completed == len(workload.requests) == len(measured.admitted)
            assert measured.cached == sum(cached for _, _, cached in measured.admitted)
            assert measured.cached == sum(counts.cached for counts in measured.replicas)
            assert make_result(full, workload, measured, ["here"] * full.replicas).ok
            return driver

        yield run


def test_prefills_of_a_replica_follow_each_other() -> None:
    pace = Prefill(10.0)
    assert pace.due(20, ready_at=5.0) == 7.0
    pace.done(7.0)
    assert pace.due(10, ready_at=5.5) == 8.0  # behind the first, however late the driver saw that done
    assert pace.due(10, ready_at=9.0) == 10.0


def test_a_forward_lasts_as_long_as_its_prompt_at_the_rate(timed: Timed, lengths: Lengths) -> None:
    measured = timed(lengths([(100, 3)] * 4), replicas=1, page_size=4, concurrency=4, prefill_rate=50.0).measured
    assert measured.latency["ttft"].quantiles([0.25, 0.5, 0.75, 1.0]) == pytest.approx([2, 4, 6, 8], abs=0.01)
    assert measured.elapsed == pytest.approx(8, abs=0.01)


def test_replicas_prefill_side_by_side(timed: Timed, lengths: Lengths) -> None:
    settings = {"page_size": 4, "concurrency": 4, "prefill_rate": 50.0, "router": "round-robin"}
    assert timed(lengths([(100, 1)] * 4), replicas=4, **settings).measured.elapsed == pytest.approx(2, abs=0.01)


def test_what_decodes_does_not_wait_for_a_prefill(timed: Timed, lengths: Lengths) -> None:
    measured = timed(lengths([(10, 5), (1000, 1)]), replicas=1, page_size=4, concurrency=2, prefill_rate=10.0).measured
    assert measured.latency["e2e"].quantiles([0.5, 1.0]) == pytest.approx([1, 101], abs=0.01)


def test_a_budget_cuts_the_prefill_not_its_time(lengths: Lengths, timed: Timed) -> None:
    whole = timed(lengths([(90, 2)] * 2), replicas=1, page_size=4, concurrency=2, prefill_rate=30.0)
    assert whole.measured.latency["ttft"].quantiles([1.0]) == pytest.approx([6], abs=0.01)
    with InferenceSession() as session:
        settings = complete(
            BenchSettings(
                runtime="inline", forward="none", replicas=1, page_size=4, token_budget=16, prefill_rate=30.0
            ),
            workload := lengths([(90, 2)] * 2),
        )
        manager = PagedKVCacheManager(settings.params(), session, settings.pages, max_batch_size=4)
        clock = Clock(1e-6)
        cut = ManagerDriver(manager, workload, settings, clock.read, wait=clock.wait)
        assert cut.run().latency["ttft"].quantiles([1.0]) == pytest.approx([6], abs=0.01)
        assert max(clock.waits) == pytest.approx(16 / 30, abs=0.01)


def test_requests_are_sent_when_they_arrive(timed: Timed, lengths: Lengths) -> None:
    driver = timed(lengths([(4, 1)] * 30), replicas=1, page_size=4, concurrency=1, speed=2.0)
    arrivals = Arrivals(driver.workload, 2.0, 0)
    assert [t for t, *_ in driver.measured.admitted] == pytest.approx(arrivals.times, abs=0.01)
    assert 13 < driver.measured.elapsed < 15.5


def test_arrivals_do_not_wait_for_a_place_in_flight(timed: Timed, lengths: Lengths) -> None:
    driver = timed(
        lengths([(40, 1)] * 20), replicas=1, page_size=4, concurrency=1, max_batch_size=32, speed=1.0, prefill_rate=10.0
    )
    assert max(sample.running + sample.waiting for sample in driver.measured.samples) > 10


def test_a_turn_that_arrives_early_waits_for_the_one_before(lengths: Lengths) -> None:
    workload = lengths([(4, 1)] * 3, after={1: 0})
    arrivals = Arrivals(workload, 1.0, 0)
    feed, late = Feed(workload.requests, arrivals), arrivals.times[2]

    def taken(elapsed: float) -> int | None:
        request = feed.take(elapsed)
        return None if request is None else request.index

    assert (taken(0.0), taken(late - 0.01), taken(late - 0.01)) == (0, None, None)  # 1 arrived, 2 did not
    feed.finished(0)
    assert (feed.next_at, taken(late - 0.01), taken(late), taken(9.0)) == (late, 1, 2, None)
    assert feed.next_at == float("inf")


@pytest.mark.parametrize("router", ["cost", "round-robin"])
def test_hit_rate_and_times_are_those_of_the_simulation(timed: Timed, router: str) -> None:
    made = workloads.documents(300, seed=3, scale=0.02, rate=0.5, documents=30)
    free = [replace(request, after=None) for request in made.requests]  # the model sends a turn when it arrives
    workload = Workload(made.source, made.kind, free, made.parameters)
    rate, size, pages = 80.0, 16, 700
    simulator = Simulator(workload, size)
    row = simulator.run(Case(replicas=4, capacity=pages * size, policy="lru", router=router), rate)
    fast = 10.0
    driver = timed(
        workload,
        pages=pages,
        replicas=4,
        page_size=size,
        max_batch_size=256,
        router=router,
        speed=fast,
        prefill_rate=rate * fast,
    )
    hit_rate, ttft = driver.measured.hit_rate, driver.measured.latency["ttft"]
    assert hit_rate == pytest.approx(row.hit_rate, abs=0.01) and row.hit_rate > 0.2
    assert ttft.mean * fast == pytest.approx(row.ttft.mean, rel=0.1)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"prefill_rate": 0.0, "forward": "none"}, "--prefill-rate is 0.0, more than 0 tokens a second"),
        ({"speed": -1.0}, "--speed is -1.0, more than 0 times as fast"),
        ({"speed": float("inf")}, "--speed is inf"),
        ({"prefill_rate": 9.0}, "--prefill-rate is for --forward none; --forward verify takes its own time"),
    ],
)
def test_times_that_cannot_be_had(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BenchSettings(**values)  # type: ignore[arg-type]


def test_users_do_not_arrive() -> None:
    with pytest.raises(ConfigError, match="--think-time and --speed"):
        BenchSettings(think_time=1.0, speed=2.0)


def test_a_workload_that_arrives_at_once_is_sent_at_once(timed: Timed) -> None:
    space = TokenSpace("test")
    requests = [
        BenchRequest(i, f"r{i}", 0.0, None, 8, 1, np.array([[space.slots(8), 8]], np.int64), space.generated(1))
        for i in range(5)
    ]
    driver = timed(Workload("test", "test", requests, {}), replicas=1, page_size=4, speed=1.0)
    assert driver.measured.elapsed < 0.01
