"""Load by users who think between turns, and the search for how much load is served well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from rayk.bench.flags import BenchFlags
from rayk.bench.request_source import Users
from rayk.bench.sweep import parse_sweep, search
from rayk.errors import ConfigError
from rayk.workloads.request import Workload

Lengths = Callable[..., Workload]


@pytest.fixture
def sessions(lengths: Lengths) -> Workload:
    """Requests 0, 1, 2 begin sessions, at those seconds; 3 follows 0, 4 follows 3, 5 follows 1."""
    return lengths([(4, 2)] * 6, {3: 0, 4: 3, 5: 1})


def test_users_ask_one_session_after_the_other_and_think(sessions: Workload) -> None:
    users = Users(sessions, 2, 1.0, seed=0)
    think = {index: seconds for turns in users._next.values() for seconds, index in turns}
    assert 2 < think[3] < 4 and 0 <= think[4] < 2, "as it was recorded, within the tick of its clock"
    first, second = users.take(0.0), users.take(0.0)
    assert first is not None and second is not None and (first.index, second.index) == (0, 1)
    assert users.take(0.0) is None, "both users are busy"
    assert users.next_at == float("inf")
    users.finished(0, 10.0)
    assert users.next_at == pytest.approx(10.0 + think[3]) and users.take(10.0 + think[3] - 0.01) is None
    third = users.take(10.0 + think[3])
    assert third is not None and third.index == 3
    users.finished(1, 11.0)
    fifth = users.take(99.0)
    assert fifth is not None and fifth.index == 5
    users.finished(5, 99.0)
    new = users.take(99.0)
    assert new is not None and new.index == 2, "a user without turns begins the next session"
    users.finished(3, 99.0)
    users.finished(2, 99.0)
    last = users.take(200.0)
    assert last is not None and last.index == 4
    users.finished(4, 200.0)
    assert users.take(1e9) is None and users.next_at == float("inf")


def test_without_think_time_turns_follow_at_once(sessions: Workload) -> None:
    users = Users(sessions, 1, 0.0, seed=0)
    order = []
    while (request := users.take(5.0)) is not None:
        order.append(request.index)
        users.finished(request.index, 5.0)
    assert order == [0, 3, 4, 1, 5, 2]


def test_a_run_by_users_serves_all(serve: Callable[..., object], sessions: Workload) -> None:
    driver = serve(sessions, replicas=2, page_size=4, concurrency=2, think_time=0.001)
    assert driver.measured.completed == 6 and not driver.measured.failed  # type: ignore[attr-defined]  # a driver


@pytest.mark.parametrize(("most", "begin"), [(7.3, 1.0), (0.3, 1.0), (1.0, 4.0), (300.0, 4.0)])
def test_the_search_comes_near_what_is_just_met(most: float, begin: float) -> None:
    asked = []

    def meets(speed: float) -> bool:
        asked.append(speed)
        return speed <= most

    found = search(begin, meets)
    assert found is not None and found in asked and found <= most < found * 2 ** (1 / 8) * 1.0001
    assert len(asked) <= 12


def test_a_search_for_what_cannot_be_met_ends() -> None:
    assert search(1.0, lambda speed: False) is None
    assert search(1.0, lambda speed: True) == 128.0


def test_a_sweep_is_of_a_flag_and_numbers() -> None:
    assert parse_sweep("replicas=1,2,4") == ("replicas", [1, 2, 4])
    assert parse_sweep("prefill-rate=1e3,2e3") == ("prefill_rate", [1000.0, 2000.0])
    assert parse_sweep("router=cost,prefix") == ("router", ["cost", "prefix"])
    for wrong in ("replicas", "nothing=1", "out=a,b", "replicas=one", "sweep=1"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_sweep(wrong)
    assert replace(BenchFlags(), replicas=4).replicas == 4
