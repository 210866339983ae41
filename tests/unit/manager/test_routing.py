"""Routing by what replicas hold, in both runtimes: the index is what they hold, and what was done counts at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from rayk import InferenceSession, PagedKVCacheManager, TextContext
from rayk import protocol as m
from rayk.actors.describe import explain
from rayk.errors import ConfigError, InsufficientBlocksError, MessageError, NoReplicaError, ReplicaLostError
from rayk.protocol.admission import AdmissionPolicy
from rayk.replica.cache_events import CacheEventLog, PrefillBacklog
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import Router, RouterSettings

from ..actors.fake import FakeRuntime, params, session_on  # noqa: TID252  # tests/ is no package that has an absolute name

RUNTIMES = ["inline", "eager", "lazy"]


@contextmanager
def manager_of(
    kind: str, replicas: int = 3, pages: int = 24, copies: bool = False, admission: AdmissionPolicy | None = None
) -> Iterator[Any]:
    """A manager that routes by cost, its router, and its runtime (None inline)."""
    runtime = None if kind == "inline" else FakeRuntime(lazy=kind == "lazy")
    with InferenceSession() if runtime is None else session_on(runtime, "n") as session:
        settings = params(replicas, enable_dp_cross_replica_prefix_copy=copies)
        manager = PagedKVCacheManager(
            settings, session, pages, enable_runtime_checks=True, max_batch_size=8, admission=admission
        )
        yield manager, desk_of(manager, runtime), runtime
        manager.shutdown()


def desk_of(manager: PagedKVCacheManager, runtime: FakeRuntime | None) -> Router:
    router: Router = manager._calls._router if runtime is None else runtime.actor("scheduler").instance._core.router  # type: ignore[attr-defined]
    return router


def serve(manager: PagedKVCacheManager, ctx: TextContext, keep: bool = False) -> int:
    [replica] = manager.admit([ctx])
    ctx.update(1)
    manager.step([[ctx] if r == replica else [] for r in range(manager.params.data_parallel_degree)])
    if not keep:
        manager.release(ctx.request_id, replica)
    return replica


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_prefix_is_found_again(kind: str) -> None:
    with manager_of(kind) as (manager, router, _):
        first = serve(manager, TextContext("a", range(17), 100))
        others = [TextContext(f"other-{i}", range(100 * i, 100 * i + 9), 100) for i in range(1, 5)]
        for ctx in others:
            serve(manager, ctx)
        again = TextContext("b", [*range(16), 7, 7, 7], 100)
        assert serve(manager, again) == first and again.cached_prefix_length == 16
        parts = router.decision_of("b").why()
        assert parts.cached.tolist() == [16 if r == first else 0 for r in range(3)]


@pytest.mark.parametrize("kind", RUNTIMES)
def test_requests_of_one_batch_that_share_a_prefix_go_together(kind: str) -> None:
    with manager_of(kind) as (manager, _, _):
        groups = [[TextContext(f"{g}-{i}", [*range(50 * g, 50 * g + 12), i], 100) for i in range(2)] for g in range(3)]
        replicas = manager.admit([groups[g][i] for i in range(2) for g in range(3)])
        assert replicas[:3] == replicas[3:] and len(set(replicas)) == 3


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_index_is_what_replicas_hold(kind: str, copies: bool, seed: int) -> None:
    """Under eviction, resets, refusals and releases; promises left out, since nothing runs at the end."""
    draw = random.Random(seed)
    with manager_of(kind, copies=copies) as (manager, router, _):
        held: dict[str, tuple[TextContext, int]] = {}
        for i in range(60):
            length = draw.randint(1, 30)
            ctx = TextContext(f"r{i}", [draw.randint(0, 1) * 50 + t for t in range(length)], 200)
            with suppress(InsufficientBlocksError):
                held[ctx.request_id] = (ctx, serve(manager, ctx, keep=True))
            while held and draw.random() < 0.6:
                request_id = draw.choice(sorted(held))
                manager.release(request_id, held.pop(request_id)[1])
            if draw.random() < 0.05:
                manager.reset_prefix_cache()
            router.index.check_integrity()
        for request_id, (_, replica) in held.items():
            manager.release(request_id, replica)
        manager.admit([TextContext("last", [9999], 100)])  # brings the news of all that was seen
        manager.release("last", next(r for r in range(3) if manager.contains("last", r)))
        assert [router.index.pages(r) for r in range(3)] == [
            manager._run(manager._calls.usage(r)).cached for r in range(3)
        ]
        assert sum(router.loads.held.tolist()) <= 4, "the last release is told with the next message"
        assert sum(router.loads.prefill_backlog.tolist()) <= 1


def test_nobody_is_asked_for_what_is_known() -> None:
    with manager_of("eager", copies=True) as (manager, _, runtime):
        with runtime.watch() as sent:
            manager.admit([TextContext(f"r{i}", range(100 * i, 100 * i + 9), 99) for i in range(3)])
        assert [what for _, what in sent] == ["PlaceMany", "Admit", "Admit", "Admit"], "no lookup: nobody has any of it"


def test_what_a_driver_was_told_is_done_counts() -> None:
    """A step goes straight to its replica; the next admission asks that replica, and only that, for its news."""
    with manager_of("eager") as (manager, _, runtime):
        ctx = TextContext("a", range(17), 100)
        [replica] = manager.admit([ctx])
        ctx.update(1)
        manager.step([[ctx] if r == replica else [] for r in range(3)])
        with runtime.watch() as sent:
            assert manager.admit([TextContext("b", range(17), 100)]) == [replica]
        assert sent == [
            ("scheduler", "PlaceMany"),
            (f"replica-{replica}", "GetCacheDelta"),
            (f"replica-{replica}", "Admit"),
        ]


def test_a_decision_is_explained() -> None:
    with manager_of("eager") as (manager, _, runtime):
        serve(manager, TextContext("a", range(17), 100))
        why = explain(runtime, "n", "a")
        assert (why.router, why.tokens, why.manager) == ("cost", 17, "n/0")
        assert sorted(c["replica"] for c in why.candidates) == [0, 1, 2]
        assert min(why.candidates, key=lambda c: c["cost"])["replica"] == why.replica
        with pytest.raises(ConfigError, match="'nobody'"):
            explain(runtime, "n", "nobody")


# -- the journal -----------------------------------------------------------------------------------


def keys(*numbers: int) -> list[Any]:
    return [number.to_bytes(8, "little") + b"rest" for number in numbers]


def told(router: Router, journal: CacheEventLog) -> bool:
    news = journal.news(router.known[0], free=5)
    if news is not None:
        router.apply_cache_delta(0, news)
    return news is not None


def test_news_continue_where_the_reader_is() -> None:
    journal = CacheEventLog(lambda: iter(()))
    router = RouterSettings("cost", (9, 9), 4).make(lambda: 0.0)
    assert told(router, journal) and not told(router, journal)
    journal.stored((None, None), b"", keys(1, 2, 3), None, b"")  # type: ignore[arg-type]
    assert journal.close(7) == 1
    journal.removed(keys(3))
    assert journal.close(7) == 2 and journal.close(7) == 2, "nothing changed"
    late = journal.news(0, free=5)
    assert told(router, journal) and router.index.pages(0) == 2 and router.loads.prefill_backlog[0] == 7
    assert late is not None
    router.apply_cache_delta(0, late)
    assert router.index.pages(0) == 2, "heard before"
    journal.stored((None, None), b"", keys(5), None, b"")  # type: ignore[arg-type]
    journal.close(7)
    skipped = m.CacheDelta(5, 4, [[(True, b"12345678")]], 0, 0)
    router.apply_cache_delta(0, skipped)
    assert router.known[0] == 2, "a gap: asked for again"
    assert told(router, journal) and router.index.pages(0) == 3


def test_who_is_too_far_behind_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.replica.cache_events.KEPT", 2)
    journal = CacheEventLog(lambda: iter(keys(7, 8)))
    router = RouterSettings("cost", (9, 9), 4).make(lambda: 0.0)
    assert told(router, journal)
    for i in range(5):
        journal.stored((None, None), b"", keys(i, 100 + i), None, b"")  # type: ignore[arg-type]
        journal.close(0)
    news = journal.news(0, 0)
    assert news is not None and news.since == -1
    router.apply_cache_delta(0, news)
    assert router.index.pages(0) == 2 and router.known[0] == 5


def test_batches_without_pages_take_no_place_however_many_nobody_asks_about() -> None:
    journal = CacheEventLog(lambda: iter(keys(7, 8)))
    journal.stored((None, None), b"", keys(1, 2), None, b"")  # type: ignore[arg-type]
    journal.close(0)
    for i in range(100_000):
        journal.stored((None, None), b"", [], None, b"")  # type: ignore[arg-type]
        journal.removed([])
        journal.close(1 + i % 2)
    assert journal.number == 100_001 and len(journal._closed) == 1


def test_a_reader_hears_of_batches_with_pages_among_many_without() -> None:
    journal = CacheEventLog(lambda: iter(()))
    router = RouterSettings("cost", (9, 9), 4).make(lambda: 0.0)
    assert told(router, journal)
    for i in range(40):
        if i % 9 == 0:
            journal.stored((None, None), b"", keys(i), None, b"")  # type: ignore[arg-type]
        journal.close(1 + i % 2)
    early = journal.news(3, 0)
    assert told(router, journal) and router.index.pages(0) == 5 and router.known[0] == 40
    journal.removed(keys(0, 9))
    journal.close(9)
    assert early is not None
    router.apply_cache_delta(0, early)
    assert told(router, journal) and router.index.pages(0) == 3 and router.known[0] == 41


def test_who_is_very_many_batches_behind_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.replica.cache_events.BEHIND", 10)
    journal = CacheEventLog(lambda: iter(keys(7, 8)))
    router = RouterSettings("cost", (9, 9), 4).make(lambda: 0.0)
    assert told(router, journal)
    for i in range(11):
        journal.close(1 + i % 2)
    near, far = journal.news(1, 0), journal.news(0, 0)
    assert near is not None and far is not None
    assert (near.since, len(near.batches), far.since, far.number) == (1, 10, -1, 11)
    router.apply_cache_delta(0, far)
    assert router.index.pages(0) == 2 and router.known[0] == 11


def test_unfilled_is_what_is_left_of_prompts() -> None:
    unfilled, ctx = PrefillBacklog(), TextContext("r", range(10), 20)
    unfilled.now("r", 10)
    unfilled.now("s", 5)
    ctx.tokens.chunk(4)
    ctx.update(0)
    unfilled.seen([ctx])
    assert unfilled.total == 11
    ctx.update(0)
    unfilled.seen([ctx])
    unfilled.drop("s")
    assert unfilled.total == 0


@pytest.mark.parametrize("policy", ["cost", "round-robin", "least-loaded", "prefix", "session"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_lost_replica_is_not_chosen_again(policy: str, lazy: bool) -> None:
    runtime = FakeRuntime(lazy=lazy)
    with session_on(runtime, "n") as session:
        settings = params(3, enable_dp_cross_replica_prefix_copy=False)
        manager = PagedKVCacheManager(settings, session, 100, max_batch_size=32, router=policy)
        router = desk_of(manager, runtime)
        manager.try_admit([TextContext(f"r{i}", range(17), 100) for i in range(3)], [0, 1, 2])
        lost = 1
        runtime.kill(f"replica-{lost}")
        [admission] = manager.try_admit([TextContext("late", range(17), 100)], [lost])  # this is how it is noticed
        assert isinstance(admission.error, ReplicaLostError) and admission.error.replica == lost
        assert "r1" in admission.error.requests and "r0" not in admission.error.requests

        contexts = [TextContext(f"s{i}", [*range(17), i], 100, session_id=f"s{i % 5}") for i in range(9)]
        admissions = manager.try_admit(contexts)
        assert {a.replica for a in admissions} <= {0, 2} and not any(a.error for a in admissions)
        [again] = manager.try_admit([TextContext("r1", range(17), 100)])  # what was lost with it can be placed anew
        assert again.error is None and again.replica != lost
        assert router.loads.requests[lost] == router.loads.held[lost] == router.loads.prefill_backlog[lost] == 0
        assert not router.loads.ready[lost] and not router.index.pages(lost)
        router.index.check_integrity()


def test_a_request_without_any_replica_left_is_refused_by_name() -> None:
    runtime = FakeRuntime()
    with session_on(runtime, "n") as session:
        settings = params(2, enable_dp_cross_replica_prefix_copy=False)
        manager = PagedKVCacheManager(settings, session, 24, max_batch_size=8)
        for replica in range(2):
            runtime.kill(f"replica-{replica}")
            [noticed] = manager.try_admit([TextContext(f"x{replica}", range(9), 100)], [replica])
            assert isinstance(noticed.error, ReplicaLostError)
        with pytest.raises(NoReplicaError, match="request 'y' has no place: all replicas are lost or draining"):
            manager.admit([TextContext("y", range(9), 100)])


WAITING = AdmissionPolicy(high=1.0, low=1.0)


def no_hashing(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it goes wrong when the scheduler hashes; the driver has a hasher of its own."""
    assert router.keys is not None
    monkeypatch.setattr(router.keys._hasher, "chain", None)
    monkeypatch.setattr(router.keys._hasher, "root", None)


def lengths_of_all_kinds() -> list[TextContext]:
    ctxs = [TextContext(f"{i}", [*range(i)], 100, cache_salt="s", adapter="x" * (i % 2)) for i in range(1, 14)]
    ctxs[-1].update_with_future_token()  # 14 tokens, of which 13 are known
    return ctxs


@pytest.mark.parametrize("policy", [None, WAITING])
def test_the_scheduler_gets_keys_and_hashes_nothing(
    policy: AdmissionPolicy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of("eager", admission=policy) as (manager, router, runtime):
        assert runtime is not None and router.keys is not None
        ctxs, expected = lengths_of_all_kinds(), {}
        for ctx in ctxs:
            raw = ctx.tokens.data[: ctx.tokens.length].tobytes()
            expected[ctx.request_id] = router.keys.of(raw, ctx.root_key, ctx.pending_future_count)
        assert [len(keys) for keys in expected.values()] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
        no_hashing(router, monkeypatch)
        wishes = placed_for(router, monkeypatch)
        manager.admit(ctxs)
        assert {request_id: list(wish.keys) for request_id, wish in wishes.items()} == expected


def placed_for(router: Router, monkeypatch: pytest.MonkeyPatch) -> dict[str, RouteRequest]:
    """What is placed from now on, by request."""
    place, wishes = router.place, dict[str, RouteRequest]()

    def noting(request_id: str, replica: int, wish: RouteRequest) -> None:
        wishes[request_id] = wish
        place(request_id, replica, wish)

    monkeypatch.setattr(router, "place", noting)
    return wishes


def test_keys_that_are_not_those_of_the_requests_are_refused() -> None:
    with manager_of("eager", admission=WAITING) as (manager, _, _):
        calls, nobody = manager._calls, m.Contexts([], b"", b"")
        for wrong in (m.PlaceMany(nobody, claim=True, keys=bytes(8)), m.Enter(nobody, keys=bytes(8))):
            with pytest.raises(MessageError, match="8 bytes are not the keys of the 0 pages of 0 request"):
                calls.scheduler.ask(wrong)


def test_the_scheduler_makes_the_keys_of_who_came_before_there_was_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_of("eager", 1, 3, admission=WAITING) as (manager, router, _):
        assert len(manager.enter([TextContext("a", range(9), 100)])) == 1
        assert manager.enter([TextContext("b", range(9), 100)]) == [] and router.keys is None, "it waits for room"
        manager.add_replicas()
        assert router.keys is not None
        wishes = placed_for(router, monkeypatch)
        [(_, admission)] = manager.enter()
        assert admission.replica == 1
        raw = np.arange(9, dtype=np.int32).tobytes()
        assert list(wishes["b"].keys) == router.keys.of(raw, (None, None)) and len(wishes["b"].keys) == 2
