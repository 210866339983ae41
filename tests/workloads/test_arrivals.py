"""Recorded times are spread inside the clock's tick, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest

from rayk.workloads.arrivals import arrivals, clock_tick
from rayk.workloads.request import BenchRequest, Workload


def at(times: list[float], after: dict[int, int] | None = None) -> Workload:
    runs = np.array([[0, 4]], np.int64)
    requests = [
        BenchRequest(i, f"r{i}", t, None, 4, 2, runs, -9 - 5 * i, (after or {}).get(i)) for i, t in enumerate(times)
    ]
    return Workload("test", "test", requests, {})


@pytest.mark.parametrize("seed", range(5))
def test_requests_stay_in_their_tick(seed: int) -> None:
    times = [3.0 * (i // 10) for i in range(500)]
    order, when = arrivals(at(times), seed)
    assert sorted(order.tolist()) == list(range(500)) and (np.diff(when) >= 0).all() and when[0] == 0
    assert (order // 10 == np.arange(500) // 10).all()
    assert not np.array_equal(order, np.arange(500))
    spread = [np.ptp(when[i : i + 10]) for i in range(0, 500, 10)]
    assert 1.5 < np.mean(spread) < 3


def test_another_seed_is_another_jitter() -> None:
    work = at([0.0] * 20 + [1.0] * 20)
    assert arrivals(work, 1)[0].tolist() == arrivals(work, 1)[0].tolist() != arrivals(work, 2)[0].tolist()


def test_one_odd_time_does_not_hide_the_tick() -> None:
    times = np.array([3.0 * i for i in range(1000)] + [7.001])
    assert clock_tick(times) == 3.0
    order, when = arrivals(at(sorted(times.tolist())), 0)
    assert order.tolist() == list(range(1001)) and (np.diff(when) >= 0).all()


def test_a_fine_clock_is_left_alone() -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(1.0, 300)).tolist()
    order, when = arrivals(at(times), 3)
    assert order.tolist() == list(range(300))
    assert np.abs(when - (np.array(times) - times[0])).max() < 0.1


def test_a_turn_does_not_overtake_the_one_before() -> None:
    for seed in range(20):
        order = arrivals(at([0.0, 0.0, 0.0, 9.0], {1: 0, 2: 1}), seed)[0].tolist()
        assert order == [0, 1, 2, 3]


def test_all_at_once() -> None:
    order, when = arrivals(at([5.0, 5.0]), 0)
    assert sorted(order.tolist()) == [0, 1] and when.tolist() == [0.0, 0.0]
    assert replace(at([1.0]), source="x") and arrivals(at([1.0]), 0)[1].tolist() == [0.0]
