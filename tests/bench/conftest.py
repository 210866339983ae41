"""Small workloads and runs that the bench tests share."""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest

from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.settings import BenchSettings, complete
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession
from rayk.workloads.request import BenchRequest, TokenSpace, Workload

Serve = Callable[..., ManagerDriver]


def plain_workload(lengths: list[tuple[int, int]], after: dict[int, int] | None = None) -> Workload:
    """Requests of (prompt, output) lengths without shared tokens; `after` maps a request to its predecessor."""
    space = TokenSpace("test")
    requests = [
        BenchRequest(
            i,
            f"r{i}",
            float(i),
            None,
            prompt,
            output,
            np.array([[space.slots(prompt), prompt]], np.int64),
            space.generated(output),
            after=(after or {}).get(i),
        )
        for i, (prompt, output) in enumerate(lengths)
    ]
    return Workload("test", "test", requests, {})


@pytest.fixture
def lengths() -> Callable[..., Workload]:
    """Makes workloads of given lengths."""
    return plain_workload


def ticking_clock(step: float = 0.001) -> Callable[[], float]:
    """A clock that moves on by `step` seconds whenever it is read."""
    ticks = count()
    return lambda: next(ticks) * step


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs a workload inline to its end and checks the cores; gives the driver. Keywords are those of BenchSettings."""
    with InferenceSession() as session:

        def run(
            workload: Workload,
            pages: int | None = None,
            on_tick: Callable[[ManagerDriver], None] = lambda driver: None,
            **settings: object,
        ) -> ManagerDriver:
            asked = BenchSettings(runtime="inline", **settings)  # type: ignore[arg-type]
            full = complete(asked, workload, pages)
            manager = PagedKVCacheManager(
                full.params(),
                session,
                full.pages,
                full.host_pages,
                max_batch_size=full.max_batch_size,
                router=full.router,
            )
            driver = ManagerDriver(manager, workload, full, ticking_clock(), on_tick)
            driver.run()
            manager.check_integrity()
            assert [manager.get_num_used_pages(r) for r in range(full.replicas)] == [0] * full.replicas
            manager.shutdown()
            return driver

        yield run
