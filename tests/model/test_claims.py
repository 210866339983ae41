"""Claims of a manager, with something going wrong at each message in turn: an acknowledged claim is there or its loss
is told, what is said twice is done once, and nothing is left in the end.

`python tests/model/run.py` plays each pair of faults, too.
"""

from __future__ import annotations

import pytest

from .claims_world import FAULTS, played


def messages() -> int:
    with played({}) as world:
        assert not world.told
        return world.messages


def play(plan: dict[int, str]) -> None:
    """AssertionError that says which faults came to a bad end."""
    try:
        with played(plan) as world:
            assert set(plan.values()) != {"twice"} or not world.told
    except Exception as error:
        raise AssertionError(f"faults {plan}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_each_message(fault: str) -> None:
    for at in range(1, messages() + 1):
        play({at: fault})
