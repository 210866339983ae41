"""The protocol of named Clusters, explored: every history of a small world up to some events, with each kind of fault.

`python tests/model/run.py` explores more (docs/guarantees.md has what it printed).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rayk.errors import ReplicaStateError

from .cluster_world import ClusterWorld, Shape, without_processes
from .explore import explore

FAULTS = {
    "none": Shape(),
    "an engine dies": Shape(crashes=1),
    "the scheduler dies": Shape(scheduler_crashes=1),
    "the scheduler dies, and an engine": Shape(asks=((1,),), crashes=1, scheduler_crashes=1),
    "a driver dies": Shape(driver_crashes=1),
    "news are cut and posts doubled": Shape(asks=((1, 1),), duplicates=1, cut=1),
    "requests are cancelled": Shape(cancels=1),
}
DEPTH = {"none": 7, "an engine dies": 6, "news are cut and posts doubled": 6}
FOUND = {  # histories at whose ends something was wrong once
    "a place at an engine of whose end its driver had not heard, when that driver started another": (
        Shape(crashes=1), "post 0, news 0, post 1, news 1, command 0 1, turn 0, crash 0"),
    "a request that was told again after its end": (
        Shape(duplicates=1, cut=1), "post 0, cut 0, resume 0, duplicate 0, news 0, post 1, command 1 1"),
    "an end of which only its driver had heard when the engine died": (
        Shape(crashes=1), "post 0, post 1, post 0, news 0, command 0 1, turn 0, report 0 0, crash 0"),
    "a post that arrived twice, late": (
        Shape(duplicates=1), "post 0, duplicate 0, news 0, command 1 1, turn 1, report 1 scheduler, post 0"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_processes():
        yield


@pytest.mark.parametrize("fault", FAULTS)
def test_every_history_comes_to_its_end(fault: str) -> None:
    """Each token once and in order, nothing waits for ever, no page or place is kept."""
    found = explore(lambda: ClusterWorld(FAULTS[fault]), DEPTH.get(fault, 5), most=5000)
    print(f"{fault}: {found}")
    assert 20 < found.states < 5000 and found.ends


@pytest.mark.parametrize("name", FOUND)
def test_histories_that_went_wrong_once(name: str) -> None:
    shape, history = FOUND[name]
    world = ClusterWorld(shape)
    for said in history.split(", "):
        event = tuple(int(part) if part.isdigit() else part for part in said.split())
        if event in world.events():  # some of it cannot happen any more
            world.do(event)
            world.check()
    world.settle()


def test_an_engine_that_comes_second_takes_nobodys_place() -> None:
    """Two drivers may start one at the same index where a scheduler died meanwhile."""
    world = ClusterWorld(Shape())
    assert world.scheduler is not None
    roster = world.scheduler._roster
    with pytest.raises(ReplicaStateError, match="it cannot enter"):
        world.scheduler.join(0, world.handle(world.begin(0)), roster.model)
    assert world.scheduler._roster is roster, "of the first one nothing is heard otherwise, nor of its end"
    world.settle()


def test_what_is_wrong_is_told_with_its_history() -> None:
    """The explorer finds a scheduler that loses a request."""

    class Forgetful(ClusterWorld):
        def deliver(self, driver, wire):  # type: ignore[no-untyped-def]
            if driver is self.drivers[0]:
                super().deliver(driver, wire)

    with pytest.raises(AssertionError, match=r"2/r0 waits for ever, at None, after\n  post 0"):
        explore(lambda: Forgetful(Shape()), 2)
