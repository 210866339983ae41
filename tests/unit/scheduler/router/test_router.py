"""The router of a Cluster: by loads of its own and pages that engines report, with a limit of requests a replica."""

from __future__ import annotations

from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import Router, RouterSettings

PAGE = 4
KEYS = list(range(1, 11))


def made(policy: str = "cost", limit: int = 10, pages: int = 250) -> Router:
    settings = RouterSettings(policy, (pages,) * 2, PAGE, seed=b"s" * 32, limit=limit, reports_backlog=False)
    return settings.make(lambda: 0.0)


def place(router: Router, request_id: str, tokens: int, keys: list[int] | None = None) -> int:
    request = RouteRequest(tokens, keys or ())
    replica = router.choose(request_id, request)
    if replica >= 0:
        router.place(request_id, replica, request)
    return replica


def test_keys_are_made_where_the_policy_or_copies_want_them() -> None:
    assert made().keys is not None and made("least-loaded").keys is None
    copying = RouterSettings("least-loaded", (9, 9), PAGE, plans_copies=True)
    assert copying.make(lambda: 0.0).keys is not None
    alone = RouterSettings("cost", (9,), PAGE)
    assert alone.wants_keys and alone.make(lambda: 0.0).keys is None, "there is no choice yet"


def test_a_burst_of_one_prefix_stays_together_and_others_spread() -> None:
    router = made()
    home, other = place(router, "a", 41, KEYS), place(router, "b", 41, list(range(500, 510)))
    assert {home, other} == {0, 1}
    assert place(router, "c", 41, KEYS) == home, "it is promised there"


def test_what_was_only_promised_is_forgotten() -> None:
    router = made()
    home = place(router, "a", 41, KEYS)
    router.remove("a")
    router.remove("a")
    assert not router.index.reach(KEYS).device.any()
    router.apply_cache_changes(home, [(True, b"".join(key.to_bytes(8, "little") for key in KEYS))])
    assert router.index.reach(KEYS).device[home] == len(KEYS)
    router.apply_cache_changes(home, [(False, KEYS[-1].to_bytes(8, "little"))])
    assert router.index.reach(KEYS).device[home] == len(KEYS) - 1
    loads = router.loads
    assert not loads.requests.any() and not loads.prefill_backlog.any() and not loads.held.any()


def test_replicas_that_are_full_cordoned_or_lost_get_nothing() -> None:
    router = made("round-robin", limit=2)
    placed = [place(router, str(i), 10) for i in range(4)]
    assert sorted(placed) == [0, 0, 1, 1] and place(router, "9", 10) == -1
    assert router.decision_of("9") is None, "it was not chosen a place"
    router.lost(1)
    assert place(router, "9", 10) == -1
    for number, replica in enumerate(placed):
        if replica == 1:
            router.remove(str(number))  # it is gone already
    router.remove(str(placed.index(0)))
    router.cordon(0)
    assert place(router, "9", 10) == -1
    router.uncordon(0)
    assert place(router, "9", 10) == 0 and place(router, "10", 10) == -1


def test_prefilled_tokens_do_not_count_as_backlog() -> None:
    router = made()
    assert [place(router, str(i), 100 + i) for i in range(2)] == [0, 1]
    for request_id in ("1", "1", "77"):
        router.prefilled(1, [request_id])
    assert router.loads.prefill_backlog.tolist() == [100, 0] and place(router, "2", 10) == 1


def test_pages_that_a_peer_sends_are_not_backlog() -> None:
    router = made()
    router.place("a", 1, RouteRequest(41, KEYS), copied=7)
    assert router.loads.prefill_backlog.tolist() == [0, 41 - 7 * PAGE]


def test_a_policy_that_does_not_weigh_what_runs_counts_all_that_is_placed() -> None:
    router = made("least-loaded")
    assert [place(router, str(i), 10) for i in range(2)] == [0, 1]
    for replica in range(2):
        router.prefilled(replica, [str(replica)])
    assert [place(router, str(i), 10) for i in (2, 3)] == [0, 1], "requests that decode are load"
    router.remove("1")
    assert place(router, "4", 10) == 1


def test_a_replica_that_would_refuse_is_passed_over() -> None:
    router = made(pages=23)
    home = place(router, "a", 50, KEYS)
    assert place(router, "b", 50, KEYS) == 1 - home, "its pages do not fit beside those of a"
    why = router.decision_of("b")
    assert why is not None and why.why is not None and why.why().cost.argmin() == home
