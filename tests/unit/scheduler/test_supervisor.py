"""A target of replicas that is acted on: who is taken out, who starts another, how often, and when no more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.errors import RaykError
from rayk.scheduler.lifecycle import ReplicaLifecycle
from rayk.scheduler.membership import Membership, State
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.supervisor import RestartPolicy, Supervisor


class House:
    """A supervisor with its members and a clock."""

    def __init__(self, count: int = 2, replace: bool = True, policy: RestartPolicy | None = None) -> None:
        self.now = 100.0
        routing = RouterSettings("least-loaded", (100,) * count, 4)
        self.members = Membership([1] * count)
        router = routing.make(lambda: self.now)
        lifecycle = ReplicaLifecycle(self.members, router, lambda replica: [], lambda ids: None, routing)
        self.supervisor = Supervisor(lifecycle, lambda: self.now, replace, policy)

    @property
    def states(self) -> list[str]:
        return [str(state) for state in self.members.states]

    def lose(self, replica: int, reason: str = "killed") -> None:
        self.supervisor.lose(replica, self.members.epochs[replica], reason)

    def join(self, replica: int) -> None:
        self.supervisor.lifecycle.start(replica)
        self.supervisor.join(replica, int(self.now * 1000), 100)

    def replace(self, who: str = "a") -> list[int]:
        taken = self.supervisor.take(who)
        for replica in taken:
            self.join(replica)
        return taken


def test_exactly_one_driver_starts_a_replacement() -> None:
    house = House()
    assert house.supervisor.due() == [] and house.supervisor.seconds() is None
    house.lose(1)
    assert house.supervisor.due() == [1] and house.supervisor.seconds() == 0.0
    assert house.supervisor.take("a") == [1]
    assert house.supervisor.take("b") == [] and house.states == ["ready", "planned"]
    house.join(1)
    assert house.states == ["ready", "ready"] and house.supervisor.take("b") == []
    assert house.supervisor.replacements() == []


def test_losses_are_counted_and_logged_once_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    house.lose(1, "its process ended")
    house.lose(1, "told twice")
    house.replace()
    assert (house.supervisor.lost, house.supervisor.replaced) == (1, 1)
    assert caplog.messages == ["replica 1 is lost with 0 request(s) placed there: its process ended"]


@pytest.mark.parametrize("how_far", [State.planned, State.starting])
def test_a_driver_that_is_gone_loses_its_grant_and_another_gets_it(how_far: State) -> None:
    house = House()
    house.lose(1)
    house.supervisor.take("a")
    if how_far is State.starting:
        house.supervisor.lifecycle.start(1)
    assert house.supervisor.forget("b") == []
    assert house.supervisor.forget("a") == [1] and house.states == ["ready", "lost"]
    assert house.supervisor.take("b") == [1], "at once: the replica is not to blame"
    assert house.supervisor.forget("a") == []


def test_what_a_caller_was_adding_is_planned_no_more_when_it_is_gone() -> None:
    house = House(replace=False)
    assert house.supervisor.enlist(2, "a") == [2, 3]
    assert house.supervisor.forget("a") == [2, 3] and house.states[2:] == ["removed", "removed"]
    assert house.supervisor.enlist(1, "b") == [2]


def test_a_crash_loop_is_given_up_with_its_reason_and_add_replicas_begins_anew() -> None:
    house = House()
    house.lose(1)
    policy = house.supervisor.policy
    waits = []
    for attempt in range(policy.attempts):
        assert house.supervisor.take("a") == [1]
        house.supervisor.give_up(1, f"no model, {attempt}")
        [told] = house.supervisor.replacements()
        assert (told.replica, told.failures, told.reason) == (1, attempt + 1, f"no model, {attempt}")
        assert house.supervisor.due() == []
        waits.append(told.seconds)
        assert told.given_up == (attempt == policy.attempts - 1)
        house.now += told.seconds
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]
    house.now += 1e6
    assert house.supervisor.due() == [] and house.supervisor.seconds() is None and not house.supervisor.hopeful
    assert house.supervisor.enlist(1, "a") == [1], "in its place"
    house.join(1)
    assert house.supervisor.replacements() == [] and house.supervisor.lifecycle.target == 2
    house.lose(1)
    assert house.replace() == [1]


def test_replacements_that_die_at_once_are_a_crash_loop_and_those_that_served_are_not() -> None:
    house = House()
    for _ in range(20):
        house.lose(1)
        assert house.replace() == [1], "each had served for long"
        house.now += 10.0
    house.lose(1)
    for failures in range(1, 6):
        assert house.replace() == [1]
        house.now += 1.0
        house.lose(1, "CUDA error")
        [told] = house.supervisor.replacements()
        assert told.failures == failures and (told.given_up or told.seconds > 0)
        house.now += told.seconds
    assert told.given_up and told.reason == "CUDA error" and house.replace() == []


def test_too_many_in_a_window_are_given_up_though_each_served() -> None:
    house = House(policy=RestartPolicy(most=3, window=60.0))
    for _ in range(3):
        house.lose(0)
        assert house.replace() == [0]
        house.now += 10.0
    house.lose(0)
    assert house.replace() == []
    rested = House(policy=RestartPolicy(most=3, window=60.0))
    for _ in range(9):
        rested.lose(0)
        assert rested.replace() == [0]
        rested.now += 21.0


def test_a_place_that_is_not_there_is_asked_for_for_ever() -> None:
    house = House()
    house.lose(0)
    for _ in range(50):
        assert house.supervisor.take("a") == [0]
        house.supervisor.give_up(0, "no place", placeless=True)
        assert house.supervisor.due() == []
        house.now += house.supervisor.policy.place_pause
    [told] = house.supervisor.replacements()
    assert (told.failures, told.given_up, told.reason) == (0, False, "no place")


def test_who_is_taken_out() -> None:
    sick = House().supervisor.sick
    assert sick(0.0, True, "") is None and sick(4.9, False, "") is None and sick(29.0, True, "") is None
    assert sick(5.0, False, "") == "its process did not answer for 5 s"
    assert sick(30.0, True, "") == "its work made no progress for 30 s"
    assert sick(0.0, True, "CUDA error: device-side assert") == "it cannot go on: CUDA error: device-side assert"
    assert House(replace=False).supervisor.sick(1e9, False, "CUDA error") is None


def test_what_a_caller_does_moves_the_target() -> None:
    house = House(3)
    supervisor = house.supervisor
    supervisor.drain(2)
    supervisor.drain(2)
    assert supervisor.lifecycle.target == 2 and supervisor.due() == []
    supervisor.resume(2)
    supervisor.resume(2)
    assert supervisor.lifecycle.target == 3
    supervisor.drain(2)
    house.lose(2)
    assert supervisor.due() == [], "it was going anyway"
    supervisor.remove(2)
    assert supervisor.lifecycle.target == 2
    house.lose(1)
    supervisor.remove(1)
    assert supervisor.lifecycle.target == 1 and supervisor.due() == [], "who removes a lost one wants none there"
    assert supervisor.enlist(2, "a") == [3, 4]
    house.join(3)
    house.join(4)
    assert supervisor.lifecycle.target == 3
    supervisor.drain(3, leaving=False)
    assert supervisor.due() == [5], "its node goes: another one takes its place, elsewhere"


def test_without_a_target_nobody_is_replaced() -> None:
    house = House(replace=False)
    house.lose(0)
    assert house.supervisor.due() == [] and not house.supervisor.hopeful
    house.supervisor.drain(1)
    assert house.supervisor.lifecycle.target is None
    assert house.supervisor.enlist(1, "a") == [0]


EVENTS = ("lose", "take", "join", "give_up", "forget", "enlist", "drain", "resume", "remove", "time")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 4), st.sampled_from("ab")), max_size=60))
def test_whatever_happens_the_books_agree_and_everybody_wanted_comes_in_the_end(
    events: list[tuple[str, int, str]],
) -> None:
    house = House(3, policy=RestartPolicy(attempts=1000, most=1000))
    supervisor = house.supervisor
    granted: dict[int, str] = {}
    for kind, replica, who in events:
        try:
            match kind:
                case "lose":
                    house.lose(replica)
                case "take":
                    taken = supervisor.take(who)
                    assert not set(taken) & set(granted), "each is started by one"
                    granted |= dict.fromkeys(taken, who)
                case "enlist":
                    granted |= dict.fromkeys(supervisor.enlist(1, who), who)
                case "join":
                    house.join(replica)
                    granted.pop(replica, None)
                case "give_up":
                    supervisor.give_up(replica, "why", placeless=who == "a")
                    granted.pop(replica, None)
                case "forget":
                    gone = supervisor.forget(who)
                    assert sorted(gone) == sorted(r for r, w in granted.items() if w == who)
                    granted = {r: w for r, w in granted.items() if w != who}
                case "time":
                    house.now += replica
                case _:
                    getattr(supervisor, kind)(replica)
        except (RaykError, IndexError):
            pass
        supervisor.check_integrity()
        house.members.check_integrity()
    for who in "ab":
        supervisor.forget(who)
    for _ in range(10):
        house.now += 100.0
        house.replace()
    ready = sum(house.members.state(r) is State.ready for r in house.members.here)
    assert supervisor.lifecycle.target is not None and ready >= supervisor.lifecycle.target
