"""A target for the number of replicas: what is missing or too many after any events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.errors import ConfigError, RaykError
from rayk.scheduler.lifecycle import ReplicaLifecycle, Steps
from rayk.scheduler.membership import Membership, State
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import RouterSettings


class Replicas:
    """A lifecycle with its members and router, and the requests that are placed there."""

    def __init__(self, count: int) -> None:
        routing = RouterSettings("least-loaded", (100,) * count, 4)
        self.router = routing.make(lambda: 0.0)
        self.members = Membership([1] * count)
        self.placed: dict[str, int] = {}
        self.lifecycle = ReplicaLifecycle(self.members, self.router, self.on, self.forget, routing)

    def on(self, replica: int) -> list[str]:
        return [i for i, r in self.placed.items() if r == replica]

    def forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.router.remove(request_id)
            self.placed.pop(request_id, None)

    def place(self, replica: int) -> None:
        request_id = f"r{len(self.placed)}"
        if replica in self.members.ready and request_id not in self.placed:
            self.router.place(request_id, replica, RouteRequest(5))
            self.placed[request_id] = replica

    @property
    def ready(self) -> list[int]:
        return [r for r in self.members.here if self.members.state(r) is State.ready]

    @property
    def coming(self) -> list[int]:
        return [r for r, state in enumerate(self.members.states) if state in (State.planned, State.starting)]

    def event(self, kind: str, replica: int) -> None:
        """One that does not fit the state is refused, and changes nothing."""
        lifecycle, members = self.lifecycle, self.members
        try:
            match kind:
                case "enlist":
                    lifecycle.enlist(1)
                case "join":
                    lifecycle.start(replica)
                    lifecycle.join(replica, members.version, 100)
                case "fail":
                    lifecycle.give_up(replica)
                case "lose":
                    self.forget(lifecycle.lose(replica, members.epochs[replica]))
                case "silent" | "answers":
                    lifecycle.answers(replica, members.epochs[replica], False, kind == "silent")
                case "place":
                    self.place(replica)
                case _:
                    getattr(lifecycle, kind)(replica)
        except (RaykError, IndexError):
            pass

    def carry_out(self, steps: Steps) -> None:
        assert self.lifecycle.enlist_at(steps.start) == steps.start
        for replica in steps.drain:
            self.lifecycle.drain(replica)


KINDS = ("enlist", "join", "fail", "drain", "resume", "lose", "remove", "silent", "answers", "place")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 6)), max_size=40),
    st.integers(0, 5),
    st.lists(st.booleans(), max_size=3),
)
def test_whatever_happened_the_steps_lead_to_the_target(
    count: int, events: list[tuple[str, int]], target: int, fails: list[bool]
) -> None:
    replicas = Replicas(count)
    for kind, replica in events:
        replicas.event(kind, replica)
    replicas.lifecycle.set_target(target)
    for turn in range(20):
        before, serving, coming = replicas.ready, set(replicas.members.ready), replicas.coming
        steps = replicas.lifecycle.reconcile()
        assert not (steps.start and steps.drain) and set(steps.drain) <= set(before)
        assert steps == replicas.lifecycle.reconcile(), "asking changes nothing"
        assert len(steps.start) == max(0, target - len(before) - len(coming))
        replicas.carry_out(steps)
        assert len(replicas.ready) >= min(target, len(before)), "no more is drained than needed"
        assert len(replicas.members.ready) >= min(target, len(serving)), "silent ones go first"
        for replica in replicas.coming:  # some of them cannot be started
            replicas.event("fail" if turn < len(fails) and fails[turn] else "join", replica)
            if replica in replicas.coming:
                replicas.event("join", replica)
        replicas.members.check_integrity()
        if not replicas.coming and replicas.lifecycle.reconcile() == Steps([], []):
            break
    assert len(replicas.ready) == target


def test_lost_and_draining_replicas_are_replaced_and_the_idlest_go() -> None:
    replicas = Replicas(4)
    lifecycle = replicas.lifecycle
    assert lifecycle.reconcile() == Steps([], []), "there is no target"
    lifecycle.set_target(4)
    lifecycle.lose(1, 1)
    lifecycle.drain(2)
    assert lifecycle.reconcile() == Steps([1, 4], [])
    replicas.carry_out(lifecycle.reconcile())
    assert lifecycle.reconcile() == Steps([], []), "they are on their way"
    lifecycle.set_target(2)
    assert lifecycle.reconcile() == Steps([], []), "none goes in view of one that may fail"
    for replica in (1, 4):
        lifecycle.start(replica)
        lifecycle.join(replica, 2, 100)
    for replica in (0, 0, 3, 4):
        replicas.place(replica)
    assert lifecycle.reconcile() == Steps([], [1, 4]), "without requests; of one request each, the last"
    lifecycle.answers(0, 1, False, True)
    assert lifecycle.reconcile() == Steps([], [0, 1]), "a silent one serves nothing"
    with pytest.raises(ConfigError, match="replicas must be an integer of at least 0"):
        lifecycle.set_target(-1)
