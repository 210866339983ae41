"""How many replicas there should be, by what they carry."""

from __future__ import annotations

import pytest

from rayk import ReplicaLoad, ScalePolicy, desired_replicas
from rayk.errors import ConfigError

POLICY = ScalePolicy(least=1, most=4, full=0.8, queue=1000)


def loads(*held: int, waiting: int = 0, state: str = "ready") -> list[ReplicaLoad]:
    return [ReplicaLoad(r, state, 1, waiting, tokens, 1000) for r, tokens in enumerate(held)]


@pytest.mark.parametrize(
    ("held", "waiting", "wanted"),
    [
        ((0,), 0, 1),
        ((800,), 0, 1),
        ((801,), 0, 2),
        ((800, 800, 100), 0, 3),
        ((500, 500, 500), 0, 3),  # two would do, but would be too busy to stay two
        ((300, 300, 200), 0, 2),
        ((0, 0, 0), 0, 2),  # one at a time
        ((100, 100), 1500, 3),
        ((800, 800, 800, 800), 5000, 4),
    ],
)
def test_by_pages_and_by_what_waits(held: tuple[int, ...], waiting: int, wanted: int) -> None:
    assert desired_replicas(loads(*held, waiting=waiting), POLICY) == wanted


def test_what_waits_outside_counts_and_so_does_what_comes() -> None:
    assert desired_replicas(loads(700), POLICY, queued_tokens=1000) == 3
    coming = [*loads(900), ReplicaLoad(1, "starting", 0, 0, 0, 0)]
    assert desired_replicas(coming, POLICY) == 2
    assert desired_replicas([], POLICY) == 1
    assert desired_replicas([], ScalePolicy(least=0), queued_requests=3) == 1
    assert desired_replicas([], ScalePolicy(least=0)) == 0


@pytest.mark.parametrize("wrong", [{"least": 3, "most": 2}, {"full": 0.0}, {"idle": 1.5}, {"queue": 0}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ScalePolicy(**wrong)  # type: ignore[arg-type]
