"""Routers and the count of placements that they choose from."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.errors import AlreadyClaimedError, ConfigError
from rayk.scheduler.routing import LeastLoaded, Load, Placements, RoundRobin, make_router


def test_round_robin_takes_turns_whatever_they_carry() -> None:
    router = RoundRobin()
    loads = [Load(9, 900), Load(), Load()]
    assert [router.choose(10, loads) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([Load(0, 0), Load(0, 0)], 0),
        ([Load(1, 10), Load(9, 9)], 1),
        ([Load(2, 10), Load(1, 10)], 1),
        ([Load(1, 10), Load(1, 10), Load(0, 11)], 0),
    ],
)
def test_least_loaded_looks_at_tokens_then_requests_then_index(loads: list[Load], chosen: int) -> None:
    assert LeastLoaded().choose(100, loads) == chosen


def test_a_burst_is_spread() -> None:
    placements, router = Placements(4), make_router("least-loaded")
    for i in range(40):
        placements.add(f"r{i}", router.choose(10, placements.loads), 10)
    assert [load.requests for load in placements.loads] == [10] * 4


def test_unknown_routers_are_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="'fast' is not one of round-robin, least-loaded"):
        make_router("fast")


def test_a_request_has_one_place() -> None:
    placements = Placements(2)
    placements.add("r", 1, 7)
    for replica in range(2):
        with pytest.raises(AlreadyClaimedError) as caught:
            placements.add("r", replica, 7)
        assert caught.value.replica == 1
    assert placements.loads == [Load(), Load(1, 7)]


@settings(max_examples=60, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 5), st.integers(0, 2), st.integers(0, 99)),
            st.tuples(st.just("remove"), st.integers(0, 5)),
        ),
        max_size=40,
    )
)
def test_loads_are_the_sum_of_what_is_placed(steps: list[tuple]) -> None:
    placements, model = Placements(3), dict[str, tuple[int, int]]()
    for step in steps:
        request_id = f"r{step[1]}"
        if step[0] == "remove":
            placements.remove(request_id)
            model.pop(request_id, None)
        elif request_id not in model:
            placements.add(request_id, *step[2:])
            model[request_id] = step[2:]
    assert len(placements) == len(model)
    for r in range(3):
        mine = {i: tokens for i, (replica, tokens) in model.items() if replica == r}
        assert placements.on(r) == [i for i in model if i in mine]
        assert placements.loads[r] == Load(len(mine), sum(mine.values()))
    assert {i: placements.holder(i) for i in model} == {i: r for i, (r, _) in model.items()}
    assert placements.holder("never") is None
