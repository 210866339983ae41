"""Replica indices and how they stand: the table of events, indices that stay, and what is derived from the states."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.errors import IntegrityError, RaykError, ReplicaIndexError, ReplicaRemovedError, ReplicaStateError
from rayk.scheduler.membership import KNOWN, MOVES, Event, Membership, State


def test_all_are_ready_at_the_start() -> None:
    members = Membership([10, 11])
    assert members.states == [State.ready] * 2 and members.epochs == [10, 11]
    assert (members.ready, members.here, members.known, members.version) == ([0, 1], [0, 1], [0, 1], 1)


def test_a_life() -> None:
    members = Membership([10])
    assert members.enlist(1) == [1]
    assert members.state(1) is State.planned and members.ready == [0]
    members.apply(1, Event.start)
    members.apply(1, Event.enter, 20)
    assert members.epochs == [10, 20] and members.ready == [0, 1] and members.joined == members.version
    members.apply(1, Event.drain)
    assert (members.ready, members.here) == ([0], [0, 1])
    members.apply(1, Event.remove)
    assert (members.here, members.known, len(members)) == ([0], [0], 2)
    with pytest.raises(ReplicaRemovedError, match="replica 1 was removed"):
        members.check(1)
    assert members.enlist(1) == [2], "a hole stays a hole"


def test_a_lost_one_is_replaced_first_and_is_lost_again_when_that_fails() -> None:
    members = Membership([10, 11])
    members.apply(0, Event.lose)
    assert (members.here, members.known) == ([1], [0, 1])
    assert members.enlist(2) == [0, 2]
    for replica in (0, 2):
        members.apply(replica, Event.fail)
    assert members.states == [State.lost, State.ready, State.removed]
    assert members.enlist(2) == [0, 2], "nobody ever was at 2"
    members.apply(0, Event.start)
    members.apply(0, Event.enter, 30)
    assert members.epochs == [30, 11, 0]


def test_every_pair_that_is_not_in_the_table_is_refused_with_the_state_unchanged() -> None:
    paths = {
        State.planned: [],
        State.starting: [Event.start],
        State.ready: [Event.start, Event.enter],
        State.draining: [Event.start, Event.enter, Event.drain],
        State.lost: [Event.start, Event.enter, Event.lose],
        State.removed: [Event.start, Event.enter, Event.lose, Event.remove],
    }
    assert {*paths, State.silent} == set(State)
    for state, path in paths.items():
        for event in Event:
            members = Membership([10])
            [replica] = members.enlist(1)
            for each in path:
                members.apply(replica, each, 20)
            assert members.state(replica) is state
            version = members.version
            if (state, event) in MOVES and not (state is State.removed and event is Event.plan):
                members.apply(replica, event, 21)
            else:
                expected = ReplicaRemovedError if state is State.removed else ReplicaStateError
                with pytest.raises(expected, match=f"replica 1 (is {state}|was removed)"):
                    members.apply(replica, event, 21)
                assert members.state(replica) is state and members.version == version
            members.check_integrity()


def test_only_a_ready_one_takes_new_requests_and_a_lost_one_says_what_was_lost() -> None:
    members = Membership([10, 11, 12])
    members.apply(0, Event.drain)
    members.apply(1, Event.lose)
    members.check_takes(1)
    members.check_takes(2)
    with pytest.raises(ReplicaStateError, match="replica 0 is draining: it cannot take new requests"):
        members.check_takes(0)
    with pytest.raises(ReplicaIndexError, match="3 is out of range"):
        members.check_takes(3)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([*Event, "enlist"])), max_size=30))
def test_any_order_of_events(events: list[tuple[int, Event | str]]) -> None:
    members, entered = Membership([1, 2]), {0: [1], 1: [2]}
    for at, (replica, event) in enumerate(events):
        before, version = members.states, members.version
        try:
            if isinstance(event, Event):
                members.apply(replica, event, 10 + at)
                if event is Event.enter:
                    entered.setdefault(replica, []).append(10 + at)
            else:
                members.enlist(replica + 1)
        except RaykError:
            assert (members.states, members.version) == (before, version)
        assert (members.version > version) == (members.states != before)
        members.check_integrity()
        assert members.epochs == [entered.get(r, [0])[-1] for r in range(len(members))]
        assert all(r in entered for r in members.known)


def test_a_wrong_book_is_found() -> None:
    members = Membership([1, 2])
    members.ready.pop()
    with pytest.raises(IntegrityError, match="ready is"):
        members.check_integrity()
    assert KNOWN


def test_a_silent_replica_takes_nothing_and_is_what_it_was_when_it_answers() -> None:
    members = Membership([10, 11, 12])
    members.apply(1, Event.drain)
    for replica in range(2):
        members.set_silent(replica, True)
    version = members.version
    members.set_silent(0, True)
    assert members.states == [State.silent, State.silent, State.ready] and members.version == version
    assert (members.ready, members.here, members.known) == ([2], [0, 1, 2], [0, 1, 2])
    members.check_takes(0)  # who asks it hears that it does not answer
    with pytest.raises(ReplicaStateError, match="replica 1 is draining"):
        members.check_takes(1)
    members.check_integrity()
    for replica in range(2):
        members.set_silent(replica, False)
    assert members.states == [State.ready, State.draining, State.ready] and members.ready == [0, 2]
    members.check_integrity()


def test_a_silent_replica_can_drain_die_and_be_removed() -> None:
    members = Membership([10, 11])
    for replica, events in ((0, [Event.drain, Event.remove]), (1, [Event.lose])):
        members.set_silent(replica, True)
        for event in events:
            members.apply(replica, event)
            members.check_integrity()
        members.set_silent(replica, True)
        assert not members.silent(replica), "nobody is there to be silent"
    assert members.states == [State.removed, State.lost]
