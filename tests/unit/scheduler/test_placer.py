"""The count of what is placed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.errors import AlreadyClaimedError
from rayk.scheduler.membership import Membership
from rayk.scheduler.placer import Placer
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.transfers.links import LinkTable


def placer(replicas: int) -> Placer:
    """Nothing is placed."""
    settings = RouterSettings("round-robin", (64,) * replicas, 4)
    members, links = Membership(range(1, replicas + 1)), LinkTable(lambda: 0.0)
    return Placer(members, settings.make(lambda: 0.0), False, 4, links, lambda: 0.0)


def test_a_request_has_one_place() -> None:
    placements = placer(2)
    placements.put("r", 1, 7)
    for replica in range(2):
        with pytest.raises(AlreadyClaimedError) as caught:
            placements.put("r", replica, 7)
        assert caught.value.replica == 1
    assert placements.counts() == ([0, 1], [0, 7])


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
    placements, model = placer(3), dict[str, tuple[int, int]]()
    for step in steps:
        request_id = f"r{step[1]}"
        if step[0] == "remove":
            placements.drop(request_id)
            model.pop(request_id, None)
        elif request_id not in model:
            placements.put(request_id, *step[2:])
            model[request_id] = step[2:]
    requests, held = placements.counts()
    for r in range(3):
        mine = {i: tokens for i, (replica, tokens) in model.items() if replica == r}
        assert placements.on(r) == [i for i in model if i in mine]
        assert (requests[r], held[r]) == (len(mine), sum(mine.values()))
    assert {i: placements.holder(i) for i in model} == {i: r for i, (r, _) in model.items()}
    assert placements.holder("never") is None
