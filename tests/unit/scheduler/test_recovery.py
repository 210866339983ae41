"""A scheduler that begins anew from what was kept, what replicas say, and what drivers say."""

from __future__ import annotations

from typing import Any

import pytest

from rayk import protocol as m
from rayk.errors import AlreadyClaimedError
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.recovery import GIVEN_OUT, ClaimSeen, born_after, claim_again, keep, rejoin, restore
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaCall, ReplicaReply

BORN = 1_000_000


def core(replicas: int = 3, replace: bool = True) -> SchedulerCore:
    settings = RouterSettings("least-loaded", (100,) * replicas, 4)
    return SchedulerCore(list(range(1, replicas + 1)), settings, False, lambda: 0.0, replace)


def carry_out(script: Any) -> tuple[Any, list[ReplicaCall]]:
    """Run a script whose calls are answered Done; its result, and what was asked."""
    asked: list[ReplicaCall] = []
    try:
        calls = next(script)
        while True:
            asked += calls
            calls = script.send([ReplicaReply(m.Done()) for _ in calls])
    except StopIteration as end:
        return end.value, asked


def again(before: SchedulerCore, claims: dict[int, list[ClaimSeen] | None]) -> SchedulerCore:
    """The one that takes the place of `before`."""
    kept = keep(before, "the roster", ["scheduler-1"])
    assert kept.roster == "the roster" and kept.schedulers == ["scheduler-1"]
    settings = RouterSettings("least-loaded", (100,) * len(kept.epochs), 4)
    after = SchedulerCore(kept.epochs, settings, False, lambda: 0.0, replace=True)
    restore(after, kept, BORN)
    claim_again(after, claims)
    after.members.check_integrity()
    after.supervisor.check_integrity()
    return after


def released(asked: list[ReplicaCall]) -> dict[str, int]:
    """What was released, by id and generation."""
    found: dict[str, int] = {}
    for call in asked:
        if isinstance(call.command, m.Release):
            found |= dict(zip(call.command.request_ids, call.command.generations, strict=True))
    return found


def test_members_target_leases_and_owner_are_as_before() -> None:
    before = core()
    carry_out(before.handle("a", m.Connect(15.0, owner=True)))
    carry_out(before.handle("a", m.DrainReplica(1)))
    before.supervisor.lose(2, 3, "killed")
    carry_out(before.handle("a", m.Enlist(2)))  # one in place of the lost one, and a new one
    after = again(before, {0: [], 1: []})
    assert [str(state) for state in after.members.states] == ["ready", "draining", "lost", "removed"]
    assert after.members.epochs == [1, 2, 3, 0] and after.members.version == BORN
    assert after.lifecycle.target == 2 and after.supervisor.leaving == [1]
    assert after.owner == "a" and after.leases.drivers == {"a": 15.0}
    assert after.supervisor.due() == [2], "who was starting it has to begin again"
    assert after.router.choose("x", RouteRequest(4)) == 0, "nothing new goes elsewhere"


def test_claims_are_those_of_the_replicas_and_numbers_are_given_out_once() -> None:
    after = again(core(), {0: [ClaimSeen("x", "a", 7, 40)], 1: [ClaimSeen("y", "b", 9, 8)], 2: []})
    assert [after.placer.holder(i) for i in "xyz"] == [0, 1, None]
    assert after.placer.counts() == ([1, 1, 0], [40, 8, 0])
    with pytest.raises(AlreadyClaimedError):
        after.placer.put("x", 2)
    assert after.placer.owner("a")[1] >= BORN


def test_a_clock_that_was_put_back_makes_no_number_again() -> None:
    assert born_after(BORN, BORN + 7) == BORN + 7
    for now in (BORN, BORN - 3_600_000_000):
        assert born_after(BORN, now) == BORN + GIVEN_OUT


def test_what_a_driver_was_never_told_of_is_released_and_what_is_gone_is_named() -> None:
    claims = [ClaimSeen("known", "a", 5, 4), ClaimSeen("stray", "a", 6, 4), ClaimSeen("others", "b", 4, 4)]
    after = again(core(), {0: claims, 1: [], 2: []})
    found, asked = carry_out(rejoin(after, "a", m.Rejoin(["known", "gone"], [0, 1], [5, 3], 15.0)))
    assert found == m.Located([0, -1])
    assert released(asked) == {"stray": 6} and after.placer.holder("stray") is None
    assert after.placer.holder("others") == 0 and after.leases.drivers == {"a": 15.0}


def test_a_claim_that_was_made_anew_under_the_same_id_is_another_one() -> None:
    after = again(core(), {0: [ClaimSeen("x", "a", 8, 4)], 1: [], 2: []})
    found, asked = carry_out(rejoin(after, "a", m.Rejoin(["x"], [0], [5])))
    assert found == m.Located([-1]), "the driver's claim 5 is gone"
    assert released(asked) == {"x": 8}, "and of claim 8 it was never told"


def test_what_the_new_scheduler_placed_is_not_taken_back() -> None:
    """A call of an event loop may be faster than another one's Rejoin."""
    after = again(core(), {0: [], 1: [], 2: []})
    owner = after.placer.owner("a")
    after.placer.add(owner, "new", 1, RouteRequest(4))
    _, asked = carry_out(rejoin(after, "a", m.Rejoin([], [], [])))
    assert released(asked) == {} and after.placer.holder("new") == 1


def test_of_a_replica_that_did_not_answer_its_drivers_are_believed() -> None:
    after = again(core(), {0: [], 1: None, 2: []})
    found, _ = carry_out(rejoin(after, "a", m.Rejoin(["x", "y"], [1, 0], [5, 6])))
    assert found == m.Located([1, -1]) and after.placer.holder("x") == 1


def test_nobody_is_believed_of_a_replica_that_another_has_taken_the_place_of() -> None:
    """What was claimed there is gone: in the books it would stand for ever."""
    after = again(core(), {0: [], 1: None, 2: []})
    after.supervisor.lose(1, 2, "it did not answer")
    assert after.supervisor.take("a") == [1]
    after.lifecycle.start(1)
    after.supervisor.join(1, 3, 100)
    found, _ = carry_out(rejoin(after, "a", m.Rejoin(["x"], [1], [5])))
    assert found == m.Located([-1]) and after.placer.holder("x") is None
    assert after.router.loads.requests.tolist() == [0, 0, 0]
