"""Policies: what each looks at, and that replicas which take nothing get nothing."""

import re
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from rayk.errors import ConfigError
from rayk.scheduler.router import policies
from rayk.scheduler.router.cost import Cost, Weights
from rayk.scheduler.router.policies import POLICIES, Session, check_router, make_policy, wants_keys
from rayk.scheduler.router.policy import Decision, RouteRequest
from rayk.scheduler.router.prefix_index import PrefixIndex, Tier
from rayk.scheduler.router.replica_loads import ReplicaLoads
from rayk.scheduler.router.router import RouterSettings

PAGE = 10
KEYS = list(range(1000, 1010))


def placed(policy: str | Cost, loads: ReplicaLoads, index: PrefixIndex, wish: RouteRequest) -> int:
    """Choose, and place as a scheduler does."""
    router = make_policy(policy, index, PAGE) if isinstance(policy, str) else policy
    replica = router.choose(wish, loads).replica
    cached = int(index.reach(wish.keys).disk[replica]) * PAGE
    index.promise(replica, wish.keys)
    loads.place(replica, wish.tokens - cached, wish.tokens)
    return replica


def test_round_robin_skips_who_is_not_ready() -> None:
    loads, router = ReplicaLoads(4), make_policy("round-robin", PrefixIndex(4), PAGE)
    loads.set_ready(2, False)
    assert [router.choose(RouteRequest(5), loads).replica for _ in range(7)] == [0, 1, 3, 0, 1, 3, 0]


def test_least_loaded_looks_at_what_waits_and_then_the_index() -> None:
    loads, index = ReplicaLoads(3), PrefixIndex(3)
    index.stored(2, KEYS)
    assert [placed("least-loaded", loads, index, RouteRequest(n, KEYS)) for n in (150, 120, 200)] == [0, 1, 2]
    assert loads.prefill_backlog.tolist() == [150, 120, 100]
    loads.prefilled(0, 60)
    loads.prefilled(2, 500)  # more than it had: it has nothing
    assert loads.prefill_backlog.tolist() == [90, 120, 0]
    assert placed("least-loaded", loads, index, RouteRequest(10)) == 2
    loads.set_ready(2, False)
    assert placed("least-loaded", loads, index, RouteRequest(10)) == 0


def test_prefix_looks_at_the_longest_prefix_only() -> None:
    loads, index = ReplicaLoads(3), PrefixIndex(3)
    index.stored(1, KEYS[:5])
    index.stored(2, KEYS[:5], Tier.host)
    loads.place(1, 10_000, 10_000)
    loads.place(2, 20_000, 20_000)
    assert placed("prefix", loads, index, RouteRequest(101, KEYS)) == 1
    loads.set_ready(1, False)
    loads.set_ready(2, False)
    assert placed("prefix", loads, index, RouteRequest(101, KEYS)) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_ready_is_nobody_chosen(name: str) -> None:
    loads, index = ReplicaLoads(2), PrefixIndex(2)
    router = make_policy(name, index, PAGE)
    for replica in range(2):
        loads.set_ready(replica, False)
    assert router.choose(RouteRequest(50, KEYS, "s"), loads).replica == -1
    loads.set_ready(1, True)
    assert router.choose(RouteRequest(50, KEYS, "s"), loads).replica == 1
    loads.join()
    index.join()
    assert len(loads) == index.replicas == 3 and router.choose(RouteRequest(50, KEYS, "s"), loads).replica >= 1


def test_loads_that_grow_keep_their_numbers_and_a_snapshot_shows_them_as_they_were() -> None:
    loads = ReplicaLoads(2, capacity=100)
    loads.place(1, 7, 20)
    loads.prefill_backlog[0] = 2.5
    snapshot = loads.snapshot()
    loads.join(1, 50)
    loads.place(2, 4, 9)
    loads.place(1, 1, 2)
    loads.release(1, 20)
    columns = (loads.prefill_backlog, loads.requests, loads.held, loads.capacity, loads.computed)
    assert [c.tolist() for c in columns] == [[2.5, 8, 4], [0, 1, 1], [0, 2, 9], [100, 100, 50], [0, 8, 4]]
    assert [c.tolist() for c in ReplicaLoads.from_snapshot(snapshot)] == [[2.5, 7], [0, 1], [0, 20], [100, 100]]
    assert [loads.fits(2, 41), loads.fits(2, 42), loads.limit(2)] == [True, False, 50]


def test_a_request_fits_everywhere_while_the_fullest_replica_has_room() -> None:
    random, loads = np.random.default_rng(5), ReplicaLoads(3, capacity=500)
    for _ in range(400):
        replica, tokens = int(random.integers(len(loads))), int(random.integers(1, 60))
        change = random.random()
        if change < 0.6:
            loads.place(replica, tokens, tokens)
        elif change < 0.9:
            loads.release(replica, min(tokens, int(loads.held[replica])))
        elif change < 0.96:
            loads.resize(replica, int(random.integers(100, 900)))
        elif change < 0.98:
            loads.renew(replica, 300)
        elif len(loads) < 6:
            loads.join(1, 400)
        left = int((loads.capacity - loads.held).min())
        for asked in random.permutation([max(left + more, 0) for more in (-1, 0, 1, 500)]).tolist():
            assert loads.fits_everywhere(asked) == (asked <= left)


def test_the_latest_choices_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.scheduler.router.router.REMEMBERED", 8)
    monkeypatch.setattr("rayk.scheduler.router.router.FORGOTTEN", 4)
    router = RouterSettings("cost", (1000, 1000), PAGE).make(iter(range(100)).__next__)
    for i in range(30):
        router.choose(f"r{i % 17}", RouteRequest(i))
        kept = {f"r{j % 17}": j for j in range(i + 1)}
        remembered = [request_id for request_id in kept if router.decision_of(request_id) is not None]
        for request_id in remembered:
            made = router.decision_of(request_id)
            assert made is not None and (made.tokens, made.at) == (kept[request_id],) * 2
        latest = sorted(kept, key=kept.__getitem__)[-8:]
        assert set(latest) <= set(remembered) and len(remembered) < 12


def test_unknown_routers_are_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="'fast' is not one of cost, round-robin, least-loaded, prefix, session"):
        make_policy("fast", PrefixIndex(1), PAGE)


def test_a_session_stays_until_its_replica_carries_too_much() -> None:
    loads, router = ReplicaLoads(4), Session(PrefixIndex(4), PAGE, bound=1.5)
    home = router.choose(RouteRequest(100, session="a"), loads).replica
    assert (
        Session(PrefixIndex(4), PAGE).choose(RouteRequest(1, session="a"), ReplicaLoads(4)).replica == home
    )  # in any process
    loads.place(home, 120, 120)
    assert router.choose(RouteRequest(100, session="a"), loads).replica == home
    loads.place(home, 400, 400)
    moved = router.choose(RouteRequest(100, session="a"), loads).replica
    assert moved != home
    loads.forget(home)
    assert router.choose(RouteRequest(100, session="a"), loads).replica == moved
    spread = {
        Session(PrefixIndex(4), PAGE).choose(RouteRequest(1, session=str(i)), ReplicaLoads(4)).replica
        for i in range(50)
    }
    assert spread == {0, 1, 2, 3}
    loads.place(0, 9, 9)
    assert (
        router.choose(RouteRequest(9), loads).replica == 1
    )  # without a session: the least that waits, the least computed


def test_most_sessions_stay_where_they_hash_to_when_a_replica_joins() -> None:
    before = [Session._hashed(f"s{i}", 7) for i in range(500)]
    after = [Session._hashed(f"s{i}", 8) for i in range(500)]
    assert all(b in (a, 7) for a, b in zip(before, after, strict=True))
    assert 30 < after.count(7) < 100


def test_cost_prefers_the_cache_until_the_wait_is_longer() -> None:
    loads, index = ReplicaLoads(2), PrefixIndex(2)
    index.stored(1, KEYS)
    assert placed("cost", loads, index, RouteRequest(105, KEYS)) == 1
    loads.place(1, 200, 200)
    assert placed("cost", loads, index, RouteRequest(105, KEYS)) == 1  # a second copy would cost more than the wait
    loads.place(1, 400, 400)
    assert placed("cost", loads, index, RouteRequest(105, KEYS)) == 0


def test_those_who_share_a_prefix_and_arrive_together_stay_together() -> None:
    loads, index = ReplicaLoads(4), PrefixIndex(4)
    router = Cost(index, PAGE)
    first = [placed(router, loads, index, RouteRequest(101, KEYS)) for _ in range(3)]
    other = [placed(router, loads, index, RouteRequest(101, list(range(2000, 2010)))) for _ in range(3)]
    assert len(set(first)) == len(set(other)) == 1 and first[0] != other[0]


def test_a_hot_prefix_is_not_sent_to_one_replica_only() -> None:
    loads, index = ReplicaLoads(4), PrefixIndex(4)
    router = Cost(index, PAGE)
    chosen = [placed(router, loads, index, RouteRequest(130, KEYS)) for _ in range(400)]
    assert min(chosen.count(r) for r in range(4)) > 60


def held_back(between: int) -> float:
    """The longest queue behind the one replica that holds a long prefix, before another one gets it, when so many
    requests for other things come between two that share it."""
    loads, index = ReplicaLoads(4), PrefixIndex(4)
    long = list(range(1000))
    index.stored(0, long)
    router, longest = Cost(index, PAGE), 0.0
    for turn in range(400):
        for other in range(between):
            placed(
                router, loads, index, RouteRequest(900, [10_000 * (turn + 1) + 10 * other + page for page in range(9)])
            )
        loads.prefill_backlog[1:] = 0
        if placed(router, loads, index, RouteRequest(10_900, long)):
            break
        longest = float(loads.prefill_backlog[0])
    return longest


def test_a_copy_is_made_when_the_wait_for_want_of_one_has_cost_as_much() -> None:
    copy = 10_000 * (1 + Weights().duplication)  # computing it, and the room
    hot, rare = held_back(between=0), held_back(between=40)
    assert hot < copy / 3 and hot < rare / 2  # it is the sum that counts, not the wait of one
    assert rare > copy / 2  # who comes rarely is forgotten in between: then the wait itself decides


def test_a_full_cache_that_takes_in_more_than_its_share_is_spared() -> None:
    def first_after(taken: int, capacity: int) -> int:
        loads, index = ReplicaLoads(2, capacity=capacity), PrefixIndex(2)
        router = Cost(index, PAGE)
        loads.prefill_backlog[1] = 1e9
        for turn in range(taken):
            placed(router, loads, index, RouteRequest(100, [1000 * turn + page for page in range(9)]))
            loads.release(0, 100)
        loads.prefill_backlog[:] = 0, 10
        return placed(router, loads, index, RouteRequest(100))

    assert first_after(20, capacity=10_000) == 0  # less waits there, and it has room
    assert first_after(20, capacity=1_000) == 1
    parts = Cost(PrefixIndex(2), PAGE).choose(RouteRequest(50), ReplicaLoads(2)).parts
    assert parts is not None and parts.eviction.tolist() == [0, 0]


def test_idle_replicas_share_what_has_nothing_in_common() -> None:
    loads, index = ReplicaLoads(8, rate=1000.0), PrefixIndex(8)
    router = Cost(index, PAGE)
    chosen = []
    for i in range(80):
        loads.advance(float(i))  # each is done before the next arrives
        chosen.append(placed(router, loads, index, RouteRequest(100, range(10_000 * (i + 1), 10_000 * (i + 1) + 9))))
    assert {chosen.count(r) for r in range(8)} == {10}
    assert loads.prefill_backlog.sum() == 100 and loads.requests.sum() == 80 and loads.held.sum() == 8000


def test_a_replica_that_joins_does_not_win_every_tie() -> None:
    loads = ReplicaLoads(2, rate=1e9)
    for now in range(10):
        loads.advance(float(now))
        loads.place(now % 2, 100, 100)
    loads.join(2)
    loads.advance(100.0)
    assert loads.computed.tolist() == [500] * 4 and loads.prefill_backlog.tolist() == [0.0] * 4 and loads.ready.all()


def test_tiers_and_copies_have_their_price() -> None:
    index = PrefixIndex(4)
    index.stored(1, KEYS[:9], Tier.host)
    index.stored(2, KEYS[:9], Tier.disk)
    index.stored(3, KEYS[:2])
    index.stored(3, KEYS[:9], Tier.host)
    wish = RouteRequest(100, KEYS[:9])
    parts = Cost(index, PAGE, Weights(host_price=0.1, disk_price=0.5)).choose(wish, ReplicaLoads(4)).parts
    assert parts is not None
    assert parts.prefill.tolist() == [100, 10, 10, 10]
    assert parts.fetch.tolist() == pytest.approx([0, 9, 45, 7])
    assert parts.duplication.tolist() == pytest.approx([Weights().duplication * 90 / 3, 0, 0, 0])
    lent = Cost(index, PAGE, Weights(peer_price=0.2)).choose(wish, ReplicaLoads(4)).parts
    assert lent is not None and lent.prefill[0] == 10 and lent.fetch[0] == pytest.approx(18)


def test_a_page_with_many_holders_is_cheap_to_store_again() -> None:
    index = PrefixIndex(5)
    for replica in range(3):
        index.stored(replica, KEYS[:4])
    index.stored(0, KEYS[:6])
    parts = Cost(index, PAGE).choose(RouteRequest(100, KEYS), ReplicaLoads(5)).parts
    assert parts is not None
    two, four = 2 * PAGE * Weights().duplication, 4 * PAGE * Weights().duplication / 3
    assert parts.duplication.tolist() == pytest.approx([0, two, two, two + four, two + four])


def test_pages_that_cannot_be_had_and_rows_that_decode_count() -> None:
    loads, index = ReplicaLoads(2, capacity=1000), PrefixIndex(2)
    for _ in range(4):
        loads.place(0, 0, 240)
    router = Cost(index, PAGE)
    parts = router.choose(RouteRequest(100), loads).parts
    assert parts is not None
    assert parts.pressure.tolist() == [4.0 * 60, 0]
    assert parts.prefill.tolist() == pytest.approx([100 * (1 + 4 / 2048), 100])
    loads.release(0, 240)
    assert loads.held.tolist() == [720, 0] and loads.requests.tolist() == [3, 0]


def test_a_choice_is_explained() -> None:
    loads, index = ReplicaLoads(30), PrefixIndex(30)
    index.stored(17, KEYS)
    loads.place(17, 50, 50)
    choice = Cost(index, PAGE).choose(RouteRequest(101, KEYS), loads)
    assert choice.replica == 17 and choice.parts is not None
    best, *others = choice.parts.candidates(17, 5)
    assert (best.replica, best.cached, best.waiting) == (17, 100, 50) and len(others) == 4
    assert best.cost == pytest.approx(
        best.prefill + best.fetch + best.queueing + best.duplication + best.eviction + best.pressure
    )
    assert [c.cost for c in others] == sorted(c.cost for c in others) and others[0].cost > best.cost
    assert 29 in [c.replica for c in choice.parts.candidates(29, 5)]


class Highest:
    """A policy of somebody else's: the replica with the highest index."""

    wants_keys = True

    def __init__(self, index: PrefixIndex, page_size: int) -> None:
        pass

    def choose(self, wish: RouteRequest, loads: ReplicaLoads) -> Decision:
        return Decision(int(np.flatnonzero(loads.ready)[-1]))


class Silent(Highest):
    wants_keys = False


class Point(NamedTuple):
    """As importlib.metadata.EntryPoint."""

    name: str
    policy: Any

    def load(self) -> Any:
        return self.policy


def test_a_policy_of_somebody_else_is_found_by_its_module_or_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "their_routers", SimpleNamespace(Highest=Highest, broken=7))
    monkeypatch.setattr(policies, "entry_points", lambda group, name: [Point(name, Silent)] if name == "silent" else [])
    with pytest.raises(ConfigError, match="router 'best' is not one of cost, round-robin"):
        wants_keys("best")
    assert (
        make_policy("their_routers:Highest", PrefixIndex(3), PAGE).choose(RouteRequest(1), ReplicaLoads(3)).replica == 2
    )
    assert make_policy("silent", PrefixIndex(3), PAGE).choose(RouteRequest(1), ReplicaLoads(3)).replica == 2
    assert [wants_keys(name) for name in ("their_routers:Highest", "silent", "cost", "session")] == [
        True, False, True, False,
    ]  # fmt: skip
    for name in ("nobodys_module:Highest", "their_routers:Lowest", "their_routers:broken", "silence", ":", "a:", ":b"):
        with pytest.raises(ConfigError, match=re.escape(repr(name))):
            check_router(name)
