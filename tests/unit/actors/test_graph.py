"""The life of a lane on its thread: opened late, rested, stuck, and over before Ray is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayk.actors import graph as life
from rayk.actors import runtime as calls
from rayk.actors.graph import GraphLane, LaneError
from rayk.actors.runtime import RayRuntime

SECONDS = 10.0


class StubGraph:
    """A graph that echoes. It opens when `watermarks` is set, and whoever sends while `stuck` waits until it is closed;
    a killed actor ends all of that, as Ray's do."""

    def __init__(self, opens: bool = True, trouble: str = "", ends_by_itself: bool = True) -> None:
        self.watermarks, self.closed, self.dead = threading.Event(), threading.Event(), threading.Event()
        self.trouble, self.ends_by_itself, self.stuck = trouble, ends_by_itself, False
        self.events: list[str] = []
        if opens:
            self.watermarks.set()

    def open(self, timeout: float) -> None:
        assert self.watermarks.wait(SECONDS)
        self.events.append("opened")
        if self.trouble or self.dead.is_set():
            raise LaneError(self.trouble or "it died")

    def send(self, wire: bytes) -> bytes:
        if self.stuck:
            assert self.closed.wait(SECONDS)
        if self.closed.is_set():
            raise LaneError("channel closed")
        return wire

    def get(self, ref: bytes, timeout: float) -> bytes:
        return ref

    def close(self) -> None:
        self.closed.set()
        if not self.ends_by_itself:
            assert self.dead.wait(SECONDS)
        self.events.append("closed")

    def kill(self) -> None:
        self.events.append("killed")
        self.dead.set()
        self.watermarks.set()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(life, "LOOK_SECONDS", 0.001)
    yield
    life.end(life.living())
    assert not life.living()


def opened(graph: StubGraph, clock: Any = None) -> GraphLane:
    lane = GraphLane(graph, clock=clock or Clock())
    until(lambda: lane.open)
    return lane


def until(condition: Any) -> None:
    waiting = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        waiting.wait(0.001)
    raise AssertionError(f"never: {condition}")


def test_it_carries_once_it_is_open() -> None:
    graph = StubGraph(opens=False)
    lane = GraphLane(graph)
    assert not lane.open and lane.send(b"early") is None
    graph.watermarks.set()
    until(lambda: lane.open)
    assert lane.get(lane.send(b"x"), 1.0) == b"x" and not lane.rested
    lane.close()
    assert lane.send(b"late") is None and lane.join(SECONDS) and graph.events == ["opened", "closed"]


def test_what_does_not_open_says_why() -> None:
    graph = StubGraph(trouble="the actor has a graph")
    lane = GraphLane(graph)
    assert lane.join(SECONDS) and not lane.rested and not lane.open
    with pytest.raises(LaneError, match="the actor has a graph"):
        lane.send(b"x")
    assert graph.events == ["opened", "closed"], "what was compiled is taken down"


def test_it_rests_when_nothing_is_said_and_not_while_an_answer_is_due() -> None:
    graph, clock = StubGraph(), Clock()
    lane = opened(graph, clock)
    ref = lane.send(b"x")
    clock.now += 10 * life.REST_SECONDS
    assert not lane._over() and lane.open
    assert lane.get(ref, 1.0) == b"x"
    clock.now += life.REST_SECONDS - 0.1
    assert not lane._over() and lane.open
    clock.now += 0.2
    assert lane.join(SECONDS) and lane.rested and not lane.open
    assert lane.send(b"y") is None and graph.events == ["opened", "closed"]


def test_a_driver_that_is_stuck_in_it_is_let_go() -> None:
    graph, clock = StubGraph(), Clock()
    lane, caught = opened(graph, clock), list[BaseException]()
    graph.stuck = True

    def send() -> None:
        try:
            lane.send(b"x")
        except LaneError as error:
            caught.append(error)

    driver = threading.Thread(target=send)
    driver.start()
    until(lambda: lane._under_way)
    clock.now += life.SEND_SECONDS - 0.1
    assert not lane._over() and driver.is_alive() and lane.open
    clock.now += 0.2
    driver.join(SECONDS)
    assert str(caught[0]) == "the replica does not take what is sent"
    assert lane.join(SECONDS) and not lane.rested


def test_one_that_is_not_needed_any_more_when_it_opens_is_taken_down() -> None:
    graph = StubGraph(opens=False)
    lane = GraphLane(graph)
    lane.close()
    assert not lane.join(0)
    graph.watermarks.set()
    assert lane.join(SECONDS) and not lane.open and graph.events == ["opened", "closed"]


@pytest.mark.parametrize("opening", [True, False], ids=["opens late", "hangs when taken down"])
def test_ray_is_shut_down_when_no_lane_is_left(opening: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is in a graph when Ray is shut down aborts the process."""
    monkeypatch.setattr(life, "CLOSE_SECONDS", 0.05)
    graph, runtime = StubGraph(opens=not opening, ends_by_itself=opening), RayRuntime()
    lane = GraphLane(graph, runtime)
    if not opening:
        until(lambda: lane.open)
    monkeypatch.setattr(calls.ray, "shutdown", lambda: graph.events.append("shut down"))
    runtime._owns_connection = True
    runtime.disconnect()
    assert graph.events.index("killed") < graph.events.index("closed") < graph.events.index("shut down")
    assert lane.join(0) and not life.living()
    runtime.disconnect()
    assert graph.events.count("shut down") == 1


def test_a_quick_end_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, runtime = StubGraph(), RayRuntime()
    GraphLane(graph, runtime)
    monkeypatch.setattr(calls.ray, "shutdown", lambda: graph.events.append("shut down"))
    runtime._owns_connection = True
    runtime.disconnect()
    assert graph.events == ["opened", "closed", "shut down"]


def test_who_only_joined_waits_for_its_own_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls.ray, "shutdown", lambda: pytest.fail("it is not its own"))
    mine, others = StubGraph(), StubGraph()
    runtime = RayRuntime()
    lane, other = GraphLane(mine, runtime), GraphLane(others, RayRuntime())
    until(lambda: lane.open and other.open)
    runtime.disconnect()
    assert lane.join(0) and other.open and life.living() == [other]


def test_who_started_ray_ends_the_lanes_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, runtime = StubGraph(), RayRuntime()
    lane = GraphLane(graph, RayRuntime())
    until(lambda: lane.open)
    monkeypatch.setattr(calls.ray, "shutdown", lambda: graph.events.append("shut down"))
    runtime._owns_connection = True
    runtime.disconnect()
    assert graph.events == ["opened", "closed", "shut down"]


def test_threads_that_never_end_are_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(life, "CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(life, "KILL_SECONDS", 0.01)
    graph = StubGraph(opens=False)
    monkeypatch.setattr(graph, "kill", lambda: None)
    lane = GraphLane(graph)
    life.end([lane])
    assert "1 fast lane(s) still wait" in caplog.text
    graph.watermarks.set()
    assert lane.join(SECONDS)
