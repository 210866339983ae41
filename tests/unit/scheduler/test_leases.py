"""Leases of drivers, by a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from rayk.scheduler.leases import LONGEST_TICK, TICK_SECONDS, Leases


class Time:
    """Leases with their clock."""

    def __init__(self) -> None:
        self.now = 50.0
        self.leases = Leases(lambda: self.now)
        self.leases.connect("a", 15.0)
        self.leases.connect("b", 15.0)

    def runs(self, seconds: float, step: float = TICK_SECONDS) -> list[str]:
        """The scheduler runs, and looks every `step` seconds; whose leases ended."""
        ended = []
        for _ in range(round(seconds / step)):
            self.now += step
            ended += self.leases.tick()
        return ended

    def stands_still(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.leases.tick()


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_lease_ends_once_when_nothing_was_heard_for_as_long(time: Time) -> None:
    assert time.runs(10) == []
    assert time.leases.renew("b")
    assert time.runs(5) == [] and time.runs(0.5) == ["a"]
    assert time.runs(9.5) == [] and time.runs(0.5) == ["b"]
    assert time.runs(100) == [] and (len(time.leases.drivers), time.leases.living) == (2, 0)


@pytest.mark.parametrize("stall", [5.0, 16.0, 3600.0])
def test_while_the_scheduler_stands_still_no_time_passes(time: Time, stall: float) -> None:
    time.runs(4)
    assert time.stands_still(stall) == []
    assert time.runs(9) == [], "who lives has had time to say so"
    assert time.leases.renew("a")
    assert time.runs(2) == ["b"], "who does not, does not profit"
    assert time.leases.renew("a") and not time.leases.renew("b")


def test_many_short_stalls_count_no_more_than_a_tick_each(time: Time) -> None:
    ended = []
    for _ in range(7):
        ended += time.stands_still(14.0)
        ended += time.runs(1)
    assert ended == [] and time.now - 50 > 100
    assert time.runs(2) == ["a", "b"]


def test_a_driver_whose_lease_ended_hears_so_until_it_does_something(time: Time) -> None:
    assert time.runs(16) == ["a", "b"]
    assert [time.leases.renew("a") for _ in range(2)] == [False, False]
    time.leases.heard("a")
    assert time.leases.renew("a")
    assert time.runs(16) == ["a"], "it has a lease again"


def test_who_left_or_never_had_a_lease_has_none(time: Time) -> None:
    time.leases.leave("a")
    time.leases.heard("nobody")
    assert not time.leases.renew("a") and not time.leases.renew("nobody")
    assert time.runs(30) == ["b"] and len(time.leases.drivers) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whoever_renews_in_time_keeps_its_lease_however_the_scheduler_stalls(seed: int) -> None:
    draw, time = random.Random(seed), Time()
    for _ in range(60):
        assert "a" not in time.stands_still(draw.choice([0.1, 0.3, LONGEST_TICK, 3.0, 40.0, 1000.0]))
        assert "a" not in time.runs(draw.choice([0.5, 4.0, 5.0]))  # until its next renewal comes through
        assert time.leases.renew("a")
