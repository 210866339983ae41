"""Threads in calls that do not come back."""

import threading
import time
from collections.abc import Iterator

import pytest

from rayk.tiers import workers as module
from rayk.tiers.workers import READ, WRITE, Workers


class Hanging:
    """Calls that return when a test says so."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self) -> int:
        self.begun.release()
        assert self.gate.wait(60)
        return 1


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    call = Hanging()
    yield call
    call.gate.set()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_thread_that_hangs_is_replaced_and_comes_back(hanging: Hanging) -> None:
    clock = Clock()
    workers = Workers(1, clock=clock)
    hung = workers.submit(READ, hanging)
    assert hanging.begun.acquire(timeout=60)
    later = workers.submit(READ, lambda: 2)
    clock.now = module.HANG_SECONDS - 1
    assert workers.watch() == clock.now and workers.hung == 0 and not later.done()
    clock.now += 1
    workers.watch()
    assert later.result(60) == 2 and not hung.done()
    assert (workers.hung, workers.open) == (1, 0)
    assert workers.drain(0) and not workers.stop(), "its memory is in use as long as the call may come back"
    hanging.gate.set()
    assert hung.result(60) == 1


def test_so_many_hang_and_no_more(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 2)
    clock = Clock()
    workers = Workers(2, clock=clock)
    jobs = [workers.submit(READ, hanging) for _ in range(5)]
    for n in (2, 2):
        for _ in range(n if clock.now == 0 else 0):
            assert hanging.begun.acquire(timeout=60)
        clock.now += module.HANG_SECONDS
        workers.watch()
    assert workers.hung == 2
    before = threading.active_count()
    last = workers.submit(READ, lambda: 3)
    workers.watch()
    assert threading.active_count() == before and not last.done()
    hanging.gate.set()
    assert [job.result(60) for job in jobs] == [1] * 5
    assert last.result(60) == 3


def test_what_nobody_has_begun_can_be_dropped(hanging: Hanging) -> None:
    workers = Workers(1)
    workers.submit(READ, hanging)
    assert hanging.begun.acquire(timeout=60)
    told: list[bool] = []
    writes = [workers.submit(WRITE, lambda: None) for _ in range(3)]
    for write in writes:
        write.add_done_callback(lambda future: told.append(future.cancelled()))
    read = workers.submit(READ, lambda: 2)
    assert workers.drop(WRITE) == 3 and told == [True] * 3
    began = time.monotonic()
    assert not workers.drain(0.01) and time.monotonic() - began < 30
    hanging.gate.set()
    assert read.result(60) == 2
    assert workers.drain() and workers.stop()
