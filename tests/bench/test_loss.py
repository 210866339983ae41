"""A manager's replica is lost in the middle of a run: its requests are sent again, and the run goes on."""

from __future__ import annotations

from itertools import count

import pytest

from rayk import PagedKVCacheManager
from rayk.bench.manager_driver import MAX_RETRIES, ManagerDriver
from rayk.bench.result import make_result
from rayk.bench.settings import BenchSettings, complete
from rayk.errors import ReplicaLostError
from rayk.workloads import generators as workloads

from ..unit.actors.fake import FakeRuntime, session_on  # noqa: TID252  # tests/ is no package with an absolute name


def run(router: str, forward: str, due: dict[int, int], replicas: int = 3) -> ManagerDriver:
    """Chats on a runtime whose replicas die at those ticks, or when they run something; the driver, its run() over."""
    workload = workloads.chat(40, seed=2, scale=0.02)
    asked = BenchSettings(
        replicas=replicas, page_size=8, concurrency=12, router=router, forward=forward, token_budget=64
    )
    settings, runtime, ticks = complete(asked, workload, 300), FakeRuntime(), count()
    with session_on(runtime) as session:
        manager = PagedKVCacheManager(
            settings.params(),
            session,
            settings.pages,
            max_batch_size=settings.max_batch_size,
            router=router,
            replace=False,
        )

        def kill(driver: ManagerDriver) -> None:
            tick = next(ticks)
            for replica in [r for r, at in due.items() if tick >= at and len(driver.lanes[r].running) > 1]:
                del due[replica]
                runtime.kill(f"replica-{replica}")

        driver = ManagerDriver(manager, workload, settings, (n * 0.001 for n in count()).__next__, kill)
        driver.run()
        there = [lane.replica for lane in driver.lanes if lane.replica not in driver.lost]
        assert [manager.get_num_used_pages(replica) for replica in there] == [0] * len(there)
    assert make_result(settings, workload, driver.measured).requests.completed == driver.measured.completed
    return driver


@pytest.mark.parametrize("router", ["round-robin", "least-loaded", "cost"])
@pytest.mark.parametrize("forward", ["verify", "none"])
def test_requests_of_a_lost_replica_are_sent_again(router: str, forward: str) -> None:
    driver = run(router, forward, {1: 9})
    measured = driver.measured
    assert (measured.submitted, measured.completed, measured.failed) == (40, 40, 0)
    assert measured.retried > 0 and measured.recomputed > 0 and measured.mismatches == 0
    assert measured.generated == sum(request.output_length for request in driver.workload.requests)
    assert [(fault.kind, fault.replica) for fault in measured.faults] == [("ReplicaLostError", 1)]
    assert len(measured.admitted) == 40, "each counts once, at its first admission"


def test_a_request_that_loses_too_many_replicas_fails() -> None:
    deaths = {r: 5 + 6 * r for r in range(MAX_RETRIES + 1)}
    measured = run("round-robin", "none", deaths, replicas=MAX_RETRIES + 2).measured
    assert measured.submitted == 40 == measured.completed + measured.failed
    assert sum(fault.request is None for fault in measured.faults) == MAX_RETRIES + 1


def test_the_last_replica_ends_the_run() -> None:
    with pytest.raises(ReplicaLostError, match="replica 0"):
        run("cost", "none", {1: 4, 0: 9}, replicas=2)
