"""Rows: first come first served by hand, and what must hold for any workload."""

from collections.abc import Callable
from typing import Any

import pytest

from rayk.errors import ConfigError
from rayk.simulate.model import Case, Simulator
from rayk.workloads.generators import agent, chat, documents
from rayk.workloads.request import Workload

ROUTERS = ("cost", "round-robin", "least-loaded", "prefix", "session")


def case(router: str = "cost", replicas: int = 2, capacity: int = 100, policy: str = "lru") -> Case:
    return Case(replicas=replicas, capacity=capacity, policy=policy, router=router)


def test_a_replica_serves_one_after_the_other(made: Callable[..., Any]) -> None:
    requests = made([[(0, 10)], [(100, 10)], [(0, 10)]], outputs=1, step=2.0)
    simulator = Simulator(Workload("test", "test", requests, {}), 4)
    simulator.times = [0.0, 2.0, 4.0]
    row = simulator.run(case(replicas=1), rate=2.0)
    # 10 tokens at 2 a second: done at 5, 10, and the third, with two pages cached, at 11
    assert row.ttft.mean == pytest.approx((5 + 8 + 7) / 3) and row.ttft.p50 == pytest.approx(7)
    assert row.hit_rate == row.pooled == row.infinite == pytest.approx(8 / 30)
    assert row.utilization == pytest.approx(22 / (2 * 4)) and row.imbalance == 1 and row.prefill_rate == 2


def test_routers_choose_as_they_are_called(made: Callable[..., Any]) -> None:
    requests = made([[(0, 40)], [(100, 10)], [(0, 40)], [(200, 10)]], outputs=1, step=1.0)
    simulator = Simulator(Workload("test", "test", requests, {}), 4)
    simulator.times = [0.0, 1.0, 2.0, 3.0]
    rows = {name: simulator.run(case(name), rate=10.0) for name in ROUTERS}
    assert rows["round-robin"].ttft.mean == pytest.approx((4 + 1 + 2.4 + 1) / 4)  # the third finds 36 tokens, waits 2
    assert rows["prefix"].imbalance == pytest.approx(1.0 + (44 - 20) / 64)
    assert rows["least-loaded"].hit_rate == 0 and rows["cost"].hit_rate == pytest.approx(36 / 100)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_what_holds_for_every_row(workload: Workload, router: str, policy: str) -> None:
    simulator = Simulator(workload, 4, seed=3)
    for replicas in (1, 3):
        wanted = case(router, replicas, 200, policy)
        row = simulator.run(wanted, simulator.rate(wanted, 0.8))
        assert 0 <= row.hit_rate <= row.infinite and 0 < row.pooled <= row.infinite < 1
        assert 1 <= row.imbalance <= replicas
        assert 0 < row.ttft.p50 <= row.ttft.p90 <= row.ttft.p99
        if router == "round-robin":
            assert row.utilization == pytest.approx(0.8)
        if replicas == 1:
            assert row.hit_rate == pytest.approx(row.pooled)
        assert row == simulator.run(wanted, simulator.rate(wanted, 0.8))


def test_belady_is_not_beaten(workload: Workload) -> None:
    simulator = Simulator(workload, 4)
    for capacity in (60, 200, 600):
        for router, replicas in (("round-robin", 1), ("round-robin", 3)):
            lru, best = (simulator.run(case(router, replicas, capacity, p), 10.0) for p in ("lru", "belady"))
            assert best.hit_rate >= lru.hit_rate and best.pooled >= lru.pooled


@pytest.mark.parametrize(
    "work",
    [
        chat(1500, seed=5, scale=0.1, rate=3.4),
        agent(1200, seed=5, scale=0.1, sessions=24),
        documents(1200, seed=5, scale=0.1, rate=3.0),
    ],
    ids=lambda work: work.kind,
)
def test_cost_pools_the_caches_and_is_never_slower(work: Workload) -> None:
    simulator = Simulator(work, 64)
    for replicas in (4, 16):
        rows = {}
        for name in ("cost", "round-robin", "least-loaded", "prefix"):
            wanted = case(name, replicas, 90_000)
            rows[name] = simulator.run(wanted, simulator.rate(wanted, 0.8))
        cost = rows.pop("cost")
        assert cost.hit_rate >= 0.9 * cost.pooled
        for other in rows.values():
            assert cost.ttft.mean <= 1.03 * other.ttft.mean and cost.ttft.p90 <= 1.03 * other.ttft.p90


def test_bad_questions(workload: Workload, made: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="less than a page of 4"):
        Simulator(workload, 4).run(case(capacity=3), 1.0)
    once = Simulator(Workload("test", "test", made([[(0, 9)]] * 1), {}), 4)
    with pytest.raises(ConfigError, match="arrive at once"):
        once.rate(case(), 0.8)
    assert once.run(case(), 9.0).ttft.mean == pytest.approx(1.0)
