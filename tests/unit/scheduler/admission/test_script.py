"""Requests that wait at the scheduler: the rounds of an Enter, answered by hand, for several drivers."""

from __future__ import annotations

from typing import Any

import pytest

from rayk import TextContext
from rayk import protocol as m
from rayk.errors import ConfigError, InsufficientBlocksError
from rayk.protocol.admission import AdmissionPolicy, TenantQuota
from rayk.protocol.columns import PackedContexts
from rayk.protocol.context_sync import ContextSender
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaCall, ReplicaReply

from ..test_core import LOST, REFUSED, Answer, Scheduler, admit_done, but, found, usual  # noqa: TID252  # tests/ is no package that has an absolute name

FULL = m.failure(InsufficientBlocksError("a", 0, 5, 4, 10))


class Waiting(Scheduler):
    """Two replicas of 10 pages of 4 tokens, which count what they have."""

    def __init__(self, router: str = "least-loaded", **policy: Any) -> None:
        super().__init__()
        settings = RouterSettings(
            router, (10, 10), 4, caching=False, admission=AdmissionPolicy(**{"high": 1.0, "low": 1.0} | policy)
        )
        self.core = SchedulerCore([10, 11], settings, False, lambda: self.now)
        self.used = [0, 0]
        self.turn = 0

    def enter(self, *ctxs: TextContext, client: str = "driver", answer: Answer = usual, **more: Any) -> dict[str, Any]:
        """What is settled: the replica, or the name of the error."""
        assert self.core.controller is not None

        def counted(ask: ReplicaCall) -> m.Result:
            result = answer(ask)
            if isinstance(ask.command, m.Admit) and isinstance(result, m.AdmitDone) and not result.failures:
                self.used[ask.replica] += sum(
                    -(-length // 4) for length in PackedContexts(ask.command.contexts).lengths
                )
            self.report(ask.replica)
            return result

        done = self.run(m.Enter(ContextSender().pack(ctxs, whole=True), **more), counted, client)
        if not isinstance(done, m.EnterDone):
            return {}
        self.open = done.open
        self.core.controller.check_integrity()
        failures = {done.ids[at]: failed.kind for at, failed in done.failures.items()}
        return dict(zip(done.ids, done.replicas, strict=True)) | failures

    def claims(self, *request_ids: str) -> dict[str, int]:
        """Those that a driver says it released."""
        return {
            i: generation
            for i, (_, generation) in zip(request_ids, self.core.placer.owners_of(request_ids), strict=True)
        }

    def report(self, replica: int) -> None:
        assert self.core.controller is not None
        self.turn += 1
        self.core.controller.watermarks.report(replica, self.turn, self.used[replica])

    def leave(self, replica: int, pages: int) -> None:
        self.used[replica] -= pages
        self.report(replica)


def ctx(request_id: str, pages: int = 5, **traits: Any) -> TextContext:
    return TextContext(request_id, [1] * (4 * pages - 1), 99, **traits)


def test_what_finds_room_is_placed_at_once_and_the_rest_waits() -> None:
    scheduler = Waiting()
    assert scheduler.enter(*map(ctx, "abcde")) == {"a": 0, "b": 1, "c": 0, "d": 1}
    assert scheduler.rounds == [[(0, "Admit"), (1, "Admit")]] and scheduler.open == 1
    assert scheduler.enter() == {} and scheduler.rounds == [], "a look with nothing to do asks nobody"
    scheduler.leave(1, 5)
    assert scheduler.enter(released=scheduler.claims("b")) == {"e": 1} and scheduler.open == 0
    assert scheduler.placed == {"a": 0, "c": 0, "d": 1, "e": 1}


def test_another_drivers_message_lets_it_in_and_its_own_hears_of_it() -> None:
    scheduler = Waiting()
    scheduler.enter(ctx("big", 10), ctx("other", 10), client="one")
    assert scheduler.enter(ctx("small", 2), client="two") == {}
    scheduler.leave(0, 10)
    assert scheduler.enter(released=scheduler.claims("big"), client="one") == {}, "it is not its own"
    assert scheduler.rounds == [[(0, "Admit")]]
    assert scheduler.enter(client="two") == {"small": 0} and scheduler.rounds == []


def test_a_note_is_not_told_what_is_settled() -> None:
    scheduler = Waiting()
    scheduler.enter(ctx("a", 10), ctx("b", 10), ctx("c", 10))
    scheduler.leave(0, 10)
    assert scheduler.enter(released=scheduler.claims("a"), hear=False) == {}
    assert scheduler.enter() == {"c": 0}


def test_the_router_passes_over_a_replica_above_its_mark() -> None:
    scheduler = Waiting("round-robin", high=0.9, low=0.5)
    assert scheduler.enter(ctx("a", 8)) == {"a": 0}
    assert scheduler.enter(*map(ctx, "bc")) == {"b": 1}
    scheduler.leave(1, 5)
    assert scheduler.enter(released=scheduler.claims("b")) == {"c": 1}, "replica 0 would be its turn"


def test_a_refused_request_waits_on_and_a_lost_replicas_is_placed_elsewhere() -> None:
    scheduler = Waiting()
    no_room = but(m.Admit, admit_done(REFUSED, r0=FULL))
    assert scheduler.enter(ctx("a"), answer=no_room) == {} and scheduler.open == 1
    assert scheduler.placed == {}

    def lost(ask: ReplicaCall) -> m.Result:
        if isinstance(ask.command, m.Admit) and ask.replica == 0:
            scheduler.core.router.lost(0)
            return LOST
        return usual(ask)

    assert scheduler.enter(answer=lost) == {}
    assert scheduler.enter(answer=lost) == {"a": 1}
    assert scheduler.placed == {"a": 1}


def test_without_any_replica_nobody_waits() -> None:
    scheduler = Waiting()
    scheduler.enter(ctx("a", 10), ctx("b", 10), ctx("c", 10))
    assert scheduler.core.controller is not None
    for replica in range(2):
        scheduler.core.router.lost(replica)
        scheduler.core.controller.on_replica_lost(replica, scheduler.core.placer.on(replica))
    assert scheduler.enter(ctx("d")) == {"c": "NoReplicaError", "d": "NoReplicaError"}
    assert scheduler.core.controller.queue.held == 0


def test_an_id_that_is_placed_or_waits_is_refused() -> None:
    scheduler = Waiting()
    assert scheduler.enter(ctx("a", 10), ctx("b", 10), ctx("c", 10)) == {"a": 0, "b": 1}
    assert scheduler.enter(ctx("a"), ctx("c"), client="two") == {"a": "AlreadyClaimedError", "c": "AlreadyClaimedError"}
    assert scheduler.open == 0
    scheduler.leave(0, 10)
    assert scheduler.enter(released=scheduler.claims("a")) == {"c": 0}


def test_one_that_was_claimed_past_the_queue_meanwhile_is_told_so() -> None:
    scheduler = Waiting()
    scheduler.enter(ctx("a", 10), ctx("b", 10), ctx("c", 10))
    scheduler.run(m.ClaimOne("c", 1), client="two")
    scheduler.leave(0, 10)
    assert scheduler.enter(released=scheduler.claims("a")) == {"c": "AlreadyClaimedError"}
    assert scheduler.placed == {"b": 1, "c": 1}


def test_given_up_and_expired_requests_are_settled_with_an_error() -> None:
    scheduler = Waiting(patience=5.0)
    scheduler.enter(ctx("a", 10), ctx("b", 10), ctx("c", 10), ctx("d", 10))
    assert scheduler.enter(given_up=["c", "a"]) == {"c": "OverloadedError"}, "a has its place"
    assert scheduler.enter(given_up=["d"], client="two") == {}, "it is not its own"
    scheduler.now += 6
    assert scheduler.enter() == {"d": "OverloadedError"} and scheduler.open == 0


def test_a_quota_holds_over_drivers() -> None:
    scheduler = Waiting(tenants={"small": TenantQuota(max_pages=5)})
    assert scheduler.enter(ctx("s0", tenant="small"), client="one") == {"s0": 0}
    assert scheduler.enter(ctx("s1", tenant="small"), ctx("t0"), client="two") == {"t0": 1}
    scheduler.leave(0, 5)
    scheduler.enter(released=scheduler.claims("s0"), client="one")
    assert scheduler.enter(client="two") == {"s1": 0}


def test_weights_hold_over_drivers() -> None:
    scheduler = Waiting(tenants={"gold": TenantQuota(3.0)})
    scheduler.enter(ctx("a", 10), ctx("b", 10), client="one")
    scheduler.enter(*[ctx(f"g{i}", tenant="gold") for i in range(6)], client="one")
    scheduler.enter(*[ctx(f"x{i}") for i in range(6)], client="two")
    order: list[str] = []
    while len(order) < 8:
        scheduler.leave(0, scheduler.used[0])
        placed = scheduler.placed
        scheduler.enter(released=scheduler.claims(*[i for i, r in placed.items() if r == 0]), client="one")
        scheduler.enter(released=scheduler.claims(*[i for i, r in placed.items() if r == 0]), client="two")
        order += sorted(set(scheduler.placed) - set(placed))
    assert [name[0] for name in order].count("g") == 6, "three of four"


@pytest.mark.parametrize("how", ["leaves", "is silent"])
def test_a_driver_that_goes_takes_its_requests_along(how: str) -> None:
    scheduler = Waiting()
    scheduler.run(m.Connect(5.0), client="one")
    scheduler.run(m.Connect(500.0), client="two")
    scheduler.enter(ctx("a", 10), ctx("b", 10), ctx("c", 10), client="one")
    assert scheduler.enter(ctx("d", 2), client="two") == {}
    scheduler.used = [0, 0]
    if how == "leaves":
        scheduler.run(m.Disconnect(), client="one")
    else:
        scheduler.passes(6)
    for replica in range(2):
        scheduler.report(replica)
    assert scheduler.enter(client="two") == {"d": 0}
    assert scheduler.placed == {"d": 0}
    assert scheduler.enter(client="one") == {} and scheduler.open == 0, "one that comes back is told that none is open"


def test_a_driver_that_goes_while_it_is_let_in_leaves_nothing_behind() -> None:
    scheduler = Waiting()
    script = scheduler.core.handle("one", m.Enter(ContextSender().pack([ctx("a")], whole=True)))
    [ask] = next(script)
    assert isinstance(ask.command, m.Admit)
    scheduler.run(m.Disconnect(), client="one")
    assert scheduler.rounds == [[(0, "Release")]], "after the Admit on its way"
    with pytest.raises(StopIteration):
        script.send([ReplicaReply(usual(ask))])
    controller = scheduler.core.controller
    assert controller is not None and not controller._fates and not controller._open and not len(controller.queue)
    controller.check_integrity()


def test_a_crowd_is_let_in_before_it_is_turned_away() -> None:
    """Only those that find no room count as waiting, also when many come at once."""
    scheduler = Waiting(max_waiting=3)
    became = scheduler.enter(*[ctx(f"r{i}", 1) for i in range(25)])
    assert sum(value in (0, 1) for value in became.values()) == 20
    assert sum(value == "OverloadedError" for value in became.values()) == 2 and scheduler.open == 3


def test_a_cluster_without_a_policy_refuses() -> None:
    with pytest.raises(ConfigError, match="no admission policy"):
        Scheduler().run(m.Enter(ContextSender().pack([ctx("a")], whole=True)))


def test_a_snapshot_shows_who_waits() -> None:
    scheduler = Waiting()
    scheduler.enter(ctx("a", 10, tenant="t"), ctx("b", 10), ctx("c", 10))
    told = scheduler.run(m.Describe())
    assert told.levels == [10, 10] and told.admission.waiting == 1
    assert {name: (t.waiting, t.held_pages, t.admitted) for name, t in told.admission.tenants.items()} == {
        "t": (0, 10, 1),
        "": (1, 10, 1),
    }


def test_what_is_quicker_to_compute_is_not_copied_for_one_that_waited_either() -> None:
    def fetched(rate: float | None) -> list[str]:
        scheduler = Waiting()
        scheduler.core = SchedulerCore(
            [10, 11],
            RouterSettings("least-loaded", (10, 10), 4, admission=AdmissionPolicy()),
            True,
            lambda: scheduler.now,
        )
        scheduler.enter(ctx("a"), peers=True, answer=found(r0=[0], r1=[4]), prefill_rate=rate)
        assert scheduler.placed == {"a": 0}
        return [name for each in scheduler.rounds for _, name in each]

    assert "Export" in fetched(None) and "Export" not in fetched(1e12)
