"""The judge of an overload: each line fails for its own reason. The run itself is in tests/ray."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rayk.bench.overload import FLOOD, MIB, POLITE, Growth, OverloadResult, OverloadSettings, _rates, judge
from rayk.bench.overload_driver import Outcome

SETTINGS = OverloadSettings(seconds=10.0)


def outcome(done: int, refused: int, **changes: Any) -> Outcome:
    made = Outcome(done + refused, [1.0] * done, [0.2] * done, [0.1] * refused, [0.5] * refused, [])
    return msgspec.structs.replace(made, **changes)


def verdicts(polite: Outcome, flood: Outcome, **changes: Any) -> list[str]:
    """What failed."""
    over = {POLITE: polite, FLOOD: flood}
    phases = {"over": {tenant: _rates(each, 2.0, SETTINGS.seconds) for tenant, each in over.items()}}
    memory = {"scheduler": Growth(100 * MIB, 110 * MIB, 105.0 * MIB, 106.0 * MIB)}
    goodput = sum(rates.goodput for rates in phases["over"].values())
    result = OverloadResult(0.4, 2.0, 10.0, 10.0, goodput, phases, 20, memory, [])
    lines = judge(SETTINGS, msgspec.structs.replace(result, **changes), over)
    return [line.what for line in lines if not line.ok]


def test_all_is_well() -> None:
    assert verdicts(outcome(20, 0), outcome(80, 300)) == []


@pytest.mark.parametrize(
    ("what", "polite", "flood", "changes"),
    [
        ("rejections are typed, with a time", {}, {"retry_after": [0.0] * 300}, {}),
        ("rejections are typed, with a time", {}, {"offered": 390}, {}),
        ("rejections are typed, with a time", {"errors": ["boom"]}, {}, {}),
        ("accepted and in time", {}, {"latencies": [1.0] * 78 + [2.1] * 2}, {}),
        ("of the polite tenant, in time", {"offered": 23, "refused_after": [1] * 3, "retry_after": [1] * 3}, {}, {}),
        ("longest wait, s", {}, {"refused_after": [9.0] * 300}, {}),
        ("goodput over that at 1x", {}, {}, {"goodput_1x": 12.0}),
        ("most that waited", {}, {}, {"most_waiting": 65}),
        ("growth of any process, MiB", {}, {}, {"memory": {"x": Growth(0, 65 * MIB, 0.0, 0.0)}}),
        ("and in its last third, MiB", {}, {}, {"memory": {"x": Growth(0, 60 * MIB, 0.0, 17.0 * MIB)}}),
    ],
)
def test_each_line_can_fail(what: str, polite: Any, flood: Any, changes: Any) -> None:
    assert verdicts(outcome(20, 0, **polite), outcome(80, 300, **flood), **changes) == [what]
