"""The manager over replica and scheduler actors: how many messages, in what order, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rayk import PagedKVCacheManager, ReplicaLostError, TextContext, Tick
from rayk.errors import (
    AlreadyClaimedError,
    BatchError,
    ConfigError,
    InsufficientBlocksError,
    NotClaimedError,
    RemoteError,
    ReplicaIndexError,
    SchedulerLostError,
)
from rayk.kvcache.page_pins import PageExport

from ..actors.fake import FakeRuntime, chain, contents, manager_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name


@pytest.fixture(params=[False, True], ids=["eager", "lazy"])
def runtime(request: pytest.FixtureRequest) -> FakeRuntime:
    return FakeRuntime(lazy=request.param)


@pytest.fixture
def manager(runtime: FakeRuntime) -> Iterator[PagedKVCacheManager]:
    with manager_on(runtime) as manager:
        yield manager
        if runtime.running:
            manager.check_integrity()


@pytest.fixture
def plain(runtime: FakeRuntime) -> Iterator[PagedKVCacheManager]:
    """Without copies between replicas."""
    with manager_on(runtime, replicas=3, enable_dp_cross_replica_prefix_copy=False) as manager:
        yield manager
        manager.check_integrity()


def context(request_id: str, tokens: Any = range(6), **options: Any) -> TextContext:
    return TextContext(request_id, list(tokens), 1000, **options)


def serve(manager: PagedKVCacheManager, ctx: TextContext, replica: int) -> None:
    """Admit, compute, commit and release: what remains is its cached prefix."""
    [admission] = manager.try_admit([ctx], [replica])
    assert admission.error is None
    batches: list[list[TextContext]] = [[], []]
    batches[replica] = [ctx]
    manager.execute(batches, stamp)
    ctx.update(1)
    manager.step(batches)
    manager.release(ctx.request_id, replica)


# -- messages per call -------------------------------------------------------------------------------


def test_a_claim_is_one_round(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    with runtime.watch() as sent:
        manager.claim("r", 1)
    assert sent == [("scheduler", "ClaimOne"), ("replica-1", "Claim")]


def test_a_batch_is_one_message_a_replica(runtime: FakeRuntime, plain: PagedKVCacheManager) -> None:
    ctxs = [context(f"r{i}", range(i, i + 6)) for i in range(9)]
    with runtime.watch() as sent:
        admissions = plain.try_admit(ctxs)
    assert sent == [("scheduler", "PlaceMany"), *((f"replica-{r}", "Admit") for r in range(3))]
    assert [a.replica for a in admissions] == [0, 1, 2] * 3
    with runtime.watch() as sent:
        assert plain.admit([context("s0")]) == [0]
    assert sent == [("scheduler", "PlaceMany"), ("replica-0", "Admit")], "replicas without work hear nothing"
    with runtime.watch() as sent:
        assert plain.try_admit([]) == []
    assert sent == []


def test_with_copies_a_batch_costs_a_lookup_more(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    with runtime.watch() as sent:
        manager.admit([context(f"r{i}", range(10 * i, 10 * i + 6)) for i in range(8)])
    assert sent == [
        ("scheduler", "PlaceMany"),
        ("replica-0", "Lookup"),
        ("replica-1", "Lookup"),
        ("replica-0", "Admit"),
        ("replica-1", "Admit"),
    ]


def test_batched_calls_are_one_message_a_replica(runtime: FakeRuntime, plain: PagedKVCacheManager) -> None:
    a, b, c = (context(name, tokens) for name, tokens in (("a", range(6)), ("b", range(10, 16)), ("c", range(20, 26))))
    plain.try_admit([a, b, c], [0, 0, 2])
    batches = [[a, b], [], [c]]
    with runtime.watch() as sent:
        plain.step(batches)
    assert sent == [("replica-0", "Step"), ("replica-2", "Step")], "nothing to commit on replica 1"
    with runtime.watch() as sent:
        plain.runtime_inputs(batches)
    assert sent == [(f"replica-{r}", "Inputs") for r in range(3)]
    with runtime.watch() as sent:
        assert plain.execute(batches, stamp) == [12, 0, 6]
    assert sent == [(f"replica-{r}", "Execute") for r in range(3)]
    for ctx in (a, b, c):
        ctx.update(1)
    with runtime.watch() as sent:
        work = [Tick(step=[a, b], release=["b"], alloc=[a], execute=[a]), Tick(), Tick(step=[c], release=["c"])]
        results = plain.tick(work, stamp)
    assert sent == [("replica-0", "RunTick"), ("replica-2", "RunTick")]
    assert [r.value for r in results] == [1, None, None]
    with runtime.watch() as sent:
        plain.tick([Tick(), Tick(), Tick()], stamp)
    assert sent == []


def test_all_messages_of_a_round_are_out_before_the_first_answer_is_read() -> None:
    runtime = FakeRuntime(lazy=True)
    with manager_on(runtime) as manager:
        a, b = context("a"), context("b", range(10, 16))
        manager.try_admit([a, b], [0, 1])
        for call, command in (
            (lambda: manager.execute([[a], [b]], stamp), "Execute"),
            (lambda: manager.step([[a], [b]]), "Step"),
            (lambda: manager.tick([Tick(step=[a]), Tick(step=[b])]), "RunTick"),
            (manager.get_metrics_aggregated, "GetMetrics"),
            (lambda: manager.try_admit([context("c"), context("d")], [0, 1]), "Admit"),
        ):
            since = len(runtime.events)
            call()
            order = [event[0] for event in runtime.events[since:] if event[-1] == command and event[0] != "read"]
            assert order == ["send", "send", "run", "run"], command


def test_direct_calls_do_not_pass_the_scheduler(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    ctx = context("r")
    manager.try_admit([ctx], [1])
    with runtime.watch() as sent:
        manager.contains("r", 1)
        manager.get_req_blocks("r", 1)
        manager.num_free_blocks(1)
        manager.get_pct_used_blocks_after_allocation(ctx, 1)
        manager.read_pages([0], 1)
        manager.release("r", 1)
    assert [receiver for receiver, _ in sent] == ["replica-1"] * 6


def test_tokens_travel_once(runtime: FakeRuntime, plain: PagedKVCacheManager) -> None:
    ctx = context("r", range(40))
    plain.try_admit([ctx], [0])
    sizes = []
    actor = runtime.actor("replica-0")
    handle = actor.instance.handle
    actor.instance.handle = lambda wire, *data: (sizes.append(len(wire)), handle(wire, *data))[1]
    for _ in range(3):
        ctx.update(7)
        plain.tick([Tick(step=[ctx], alloc=[ctx]), Tick(), Tick()])
    assert max(sizes) < 40 * 4, "later messages hold new tokens only"
    assert actor.service._mirrors._contexts["r"].tokens.all.tolist() == [*range(40), 7, 7, 7]


# -- placing -----------------------------------------------------------------------------------------


def test_least_loaded_counts_tokens(plain: PagedKVCacheManager) -> None:
    long, short = range(20), range(100, 103)
    assert plain.admit([context("a", long), context("b", short), context("c", short)]) == [0, 1, 2]
    assert plain.admit([context("d", range(200, 209)), context("e", short), context("f", short)]) == [1, 2, 2]
    plain.release("a", 0)
    assert plain.admit([context("g")]) == [0], "what was released on the replica is not counted any more"


def test_round_robin_takes_turns(runtime: FakeRuntime) -> None:
    with manager_on(runtime, replicas=3, router="round-robin") as manager:
        assert manager.admit([context(f"r{i}", range(9 - i)) for i in range(4)]) == [0, 1, 2, 0]
        assert manager.admit([context("s")]) == [1]


def test_an_unknown_router_is_refused_before_anything_starts(runtime: FakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"'fastest'.*least-loaded"), manager_on(runtime, router="fastest"):
        pass
    assert not [event for event in runtime.events if event[0] == "start"]
    assert runtime.running == [] and runtime.placements == []


def test_try_admit_reports_each(manager: PagedKVCacheManager) -> None:
    manager.claim("taken", 0)
    ctxs = [context("a"), context("taken"), context("big", range(500)), context("b", range(10, 16))]
    done = manager.try_admit(ctxs, [0, 1, 1, 1])
    assert [type(a.error) for a in done] == [type(None), AlreadyClaimedError, InsufficientBlocksError, type(None)]
    assert done[1].error.replica == 0 and done[2].error.request_id == "big"
    assert manager.contains("a", 0) and manager.contains("b", 1) and not manager.contains("big", 1)
    with pytest.raises(BatchError):
        manager.try_admit(ctxs, [0])
    with pytest.raises(ReplicaIndexError):
        manager.try_admit([context("x")], [2])


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_admit_is_all_or_nothing_on_several_replicas(
    runtime: FakeRuntime, manager: PagedKVCacheManager, bad: int
) -> None:
    prefix = context("prefix", range(9))
    serve(manager, prefix, 0)
    cached = manager.get_metrics_aggregated()
    ctxs = [context(f"r{i}", range(9)) for i in range(4)]
    ctxs[bad] = context("big", range(500))
    with pytest.raises(InsufficientBlocksError, match="'big'"):
        manager.admit(ctxs)
    for r in range(2):
        assert manager.get_num_used_pages(r) == 0
        assert runtime.actor(f"replica-{r}").core.requests == {}
    assert [(c.tokens.processed, c.tokens.end, c.cached_prefix_length) for c in ctxs] == [
        (0, len(c.tokens), None) for c in ctxs
    ]
    assert cached is not None
    assert sorted(manager.admit([context(f"r{i}") for i in range(4)])) == [0, 0, 1, 1]


def test_admit_refuses_an_id_twice_in_one_batch(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    with pytest.raises(AlreadyClaimedError):
        manager.admit([context("r"), context("other"), context("r")])
    assert all(not runtime.actor(f"replica-{r}").core.requests for r in range(2))
    manager.admit([context("r"), context("other")])


def test_reserve_gives_everything_back(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    with manager.reserve([[context("a"), context("b", range(10, 16))], [context("c")]]):
        assert manager.contains("b", 0) and manager.contains("c", 1)
    assert all(not runtime.actor(f"replica-{r}").core.requests for r in range(2))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_refused_reserve_holds_nothing(
    runtime: FakeRuntime, manager: PagedKVCacheManager, at: int, replica: int
) -> None:
    """Whatever refuses one of a batch (here an id that is claimed), those after it are not kept either."""
    manager.claim("taken", 0)
    batches = [[context("a"), context("b")], [context("c"), context("d")]]
    batches[replica].insert(at, context("taken"))
    with pytest.raises(AlreadyClaimedError), manager.reserve(batches):
        pytest.fail("it was refused")
    assert [list(runtime.actor(f"replica-{r}").core.requests) for r in range(2)] == [["taken"], []]
    manager.release("taken", 0)
    with manager.reserve(batches):
        pass


def test_claims_across_replicas(manager: PagedKVCacheManager) -> None:
    manager.claim("r", 0)
    with pytest.raises(AlreadyClaimedError, match="replica 0"):
        manager.claim("r", 1)
    with pytest.raises(NotClaimedError, match="claimed on replica 0"):
        manager.release("r", 1)
    with pytest.raises(NotClaimedError):
        manager.alloc(context("r"), 1)
    with pytest.raises(NotClaimedError, match="call claim"):
        manager.release("unknown", 0)
    manager.release("r", 0)
    manager.claim("r", 1)


def test_a_request_released_in_a_tick_can_be_claimed_again(manager: PagedKVCacheManager) -> None:
    for replica in (0, 1, 0):
        ctx = context("r")
        manager.try_admit([ctx], [replica])
        ticks = [Tick(), Tick()]
        ticks[replica] = Tick(release=["r"])
        manager.tick(ticks)


# -- copies ------------------------------------------------------------------------------------------


def test_both_directions_in_one_batch(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    left, right = range(9), range(100, 109)
    serve(manager, context("left", left), 0)
    serve(manager, context("right", right), 1)
    a, b = context("a", right), context("b", left)
    with runtime.watch() as sent:
        done = manager.try_admit([a, b], [0, 1])
    assert [(d.device_tokens, d.peer_tokens) for d in done] == [(0, 8), (0, 8)]
    assert (a.tokens.processed, b.tokens.processed) == (8, 8)
    assert contents(manager, "a", 0, 8) == chain(right)[:8]
    assert contents(manager, "b", 1, 8) == chain(left)[:8]
    assert [c for _, c in sent] == ["PlaceMany", *["Lookup"] * 2, *["Export"] * 2, *["Admit"] * 2, *["Acknowledge"] * 2]
    manager.release("a", 0)
    manager.release("b", 1)
    assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0], "nothing stays pinned"
    metrics = manager.get_metrics_aggregated()
    assert metrics.cross_replica_blocks_copied == 4
    assert metrics.cross_replica_bytes_copied == 4 * manager.params.bytes_per_page


def test_a_copy_that_its_first_request_cannot_use_serves_the_next_one(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    serve(manager, context("old", range(9)), 0)
    large, small = context("large", range(90)), context("small", [*range(9), 99])
    refused, admitted = manager.try_admit([large, small], [1, 1])
    assert isinstance(refused.error, InsufficientBlocksError) and admitted.peer_tokens == 8
    assert contents(manager, "small", 1, 8) == chain(range(9))[:8]
    manager.release("small", 1)


def used_at(runtime: FakeRuntime, wanted: tuple[str, str], label: str) -> list[int]:
    """Pages in use on replica `label` whenever actor `wanted[0]` runs command `wanted[1]`; filled while it runs."""
    seen: list[int] = []

    def look(event: tuple[Any, ...]) -> None:
        if event == ("run", *wanted):
            seen.append(runtime.actor(label).core.usage.used)

    runtime.fail = look
    return seen


def test_sources_are_pinned_until_acknowledged(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    serve(manager, context("prefix", range(9)), 0)
    seen = used_at(runtime, ("replica-1", "Admit"), "replica-0")
    manager.try_admit([context("a", range(9))], [1])
    assert seen == [2]
    assert manager.get_num_used_pages(0) == 0


def test_sources_are_unpinned_when_the_target_refuses(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    serve(manager, context("prefix", range(9)), 0)
    manager.try_admit([context("full", range(200, 258))], [1])  # 15 of 16 pages
    seen = used_at(runtime, ("replica-1", "Admit"), "replica-0")
    [done] = manager.try_admit([context("a", range(9))], [1])
    assert isinstance(done.error, InsufficientBlocksError)
    assert seen == [2] and manager.get_num_used_pages(0) == 0


@pytest.mark.parametrize("call", ["alloc", "try_admit"])
def test_sources_are_unpinned_when_the_target_dies(
    runtime: FakeRuntime, manager: PagedKVCacheManager, call: str
) -> None:
    serve(manager, context("prefix", range(9)), 0)
    ctx = context("a", range(9))
    if call == "alloc":
        manager.claim("a", 1)
    runtime.fail = lambda event: RuntimeError("shot") if event == ("run", "replica-1", "Admit") else None
    if call == "alloc":
        with pytest.raises(ReplicaLostError):
            manager.alloc(ctx, 1)
    else:
        [done] = manager.try_admit([ctx], [1])
        assert isinstance(done.error, ReplicaLostError) and done.error.replica == 1
    assert manager.get_num_used_pages(0) == 0
    assert ctx.tokens.processed == 0
    runtime.actor("replica-1").dead, runtime.fail = None, None  # for the integrity check at the end


def test_without_its_source_a_prefix_is_computed(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    serve(manager, context("prefix", range(9)), 0)
    runtime.fail = lambda event: RuntimeError("shot") if event == ("run", "replica-0", "Export") else None
    [done] = manager.try_admit([context("a", range(9))], [1])
    assert done.error is None and done.peer_tokens == 0
    runtime.actor("replica-0").dead, runtime.fail = None, None


def test_a_wrong_hash_is_not_imported(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    serve(manager, context("prefix", range(13)), 0)
    source = runtime.actor("replica-0").core
    export = source.exports.export

    def damaged(*args: Any) -> PageExport:
        right = export(*args)
        return replace(right, hashes=[right.hashes[0], *[b"wrong"] * (len(right.hashes) - 1)])

    source.exports.export = damaged
    [done] = manager.try_admit([context("a", range(13))], [1])
    assert done.peer_tokens == 4, "up to the page that does not fit"
    assert contents(manager, "a", 1, 4) == chain(range(4))


# -- losses ------------------------------------------------------------------------------------------


@pytest.fixture
def two(runtime: FakeRuntime, manager: PagedKVCacheManager) -> Iterator[tuple[TextContext, TextContext]]:
    """Requests a and b on replicas 0 and 1; what was killed is revived for the integrity check at the end."""
    a, b = context("a"), context("b", range(10, 16))
    manager.try_admit([a, b], [0, 1])
    yield a, b
    for actor in runtime.actors:
        actor.dead = None


CALLS: dict[str, Callable[[PagedKVCacheManager, TextContext, TextContext], Any]] = {
    "step": lambda m, a, b: m.step([[a], [b]]),
    "execute": lambda m, a, b: m.execute([[a], [b]], stamp),
    "runtime_inputs": lambda m, a, b: m.runtime_inputs([[a], [b]]),
    "tick": lambda m, a, b: m.tick([Tick(execute=[a]), Tick(execute=[b])], stamp),
    "alloc": lambda m, a, b: m.alloc(b, 1),
    "claim": lambda m, a, b: m.claim("c", 1),
    "release": lambda m, a, b: m.release("b", 1),
    "usage": lambda m, a, b: m.num_free_blocks(1),
    "read_pages": lambda m, a, b: m.read_pages([0], 1),
    "admit": lambda m, a, b: m.admit([context("x"), context("y"), context("z")]),
}
ALL: dict[str, Callable[[PagedKVCacheManager, TextContext, TextContext], Any]] = {
    "metrics": lambda m, a, b: m.get_metrics_aggregated(),
    "hit_counts": lambda m, a, b: m.get_prefix_cache_hit_counts(a),
    "reset": lambda m, a, b: m.reset_prefix_cache(),
    "integrity": lambda m, a, b: m.check_integrity(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_lost_replica_is_named_with_its_requests(
    runtime: FakeRuntime, manager: PagedKVCacheManager, two: tuple[TextContext, TextContext], call: str
) -> None:
    runtime.kill("replica-1")
    with pytest.raises(ReplicaLostError) as caught:
        CALLS[call](manager, *two)
    error = caught.value
    assert error.replica == 1 and "b" in error.requests and "a" not in error.requests
    assert error.epoch == runtime.actor("replica-1").service.epoch
    assert "its process died" in error.reason and "'b'" in str(error)
    manager.release("a", 0)
    manager.claim("new", 0)
    assert not manager.contains("x", 0), "of a refused batch nothing is left on the living replica"


@pytest.mark.parametrize("call", ALL)
def test_calls_about_all_replicas_are_answered_by_those_that_are_left(
    runtime: FakeRuntime, manager: PagedKVCacheManager, two: tuple[TextContext, TextContext], call: str
) -> None:
    runtime.kill("replica-1")
    for _ in range(2):
        ALL[call](manager, *two)
        assert manager.replica_states() == ["ready", "lost"], "they are how it is noticed"
    assert manager.check_integrity() == [1]


@pytest.mark.parametrize("call", ["claim", "alloc", "metrics", "hit_counts", "admit", "reset"])
def test_a_lost_scheduler(
    runtime: FakeRuntime, manager: PagedKVCacheManager, two: tuple[TextContext, TextContext], call: str
) -> None:
    runtime.kill("scheduler")
    with pytest.raises(SchedulerLostError, match="its process died"):
        (CALLS | ALL)[call](manager, *two)
    manager.step([[two[0]], [two[1]]])
    manager.shutdown()
    assert runtime.running == [] and runtime.placements == []


def test_shutdown_after_a_loss_is_clean(runtime: FakeRuntime) -> None:
    with manager_on(runtime) as manager:
        runtime.kill("replica-0")
        runtime.kill("scheduler")
        manager.shutdown()
        assert runtime.running == [] and runtime.placements == []


def test_one_replicas_failure_does_not_hide_what_the_others_did(
    runtime: FakeRuntime, manager: PagedKVCacheManager, two: tuple[TextContext, TextContext]
) -> None:
    """A tick that raises was still done on the other replicas: what they released is not held to be claimed."""
    _, b = two
    with pytest.raises(RemoteError, match="boom"):
        manager.tick([Tick(release=["a"]), Tick(execute=[b])], boom)
    assert not manager.contains("a", 0)
    manager.try_admit([context("a")], [1])
    assert manager.contains("a", 1)
    manager.release("a", 1)


def test_a_refused_tick_releases_nothing(
    runtime: FakeRuntime, manager: PagedKVCacheManager, two: tuple[TextContext, TextContext]
) -> None:
    """An id that is not claimed stops a tick before it begins: a is claimed still, and everybody knows."""
    with pytest.raises(NotClaimedError, match="'unknown'"):
        manager.tick([Tick(release=["a", "unknown"]), Tick()])
    assert manager.contains("a", 0)
    with pytest.raises(AlreadyClaimedError):
        manager.claim("a", 1)
    manager.release("a", 0)
    manager.claim("a", 1)


def boom(inputs: Any, batch: Any) -> None:
    raise RuntimeError("boom")


def test_a_replica_that_lost_a_mirror_is_sent_the_tokens_again(
    runtime: FakeRuntime, manager: PagedKVCacheManager, two: tuple[TextContext, TextContext]
) -> None:
    """.. and the others do not do their part twice."""
    _, b = two
    runtime.actor("replica-1").service._mirrors.drop("b")
    with runtime.watch() as sent:
        manager.tick([Tick(release=["a"]), Tick(execute=[b])], stamp)
    assert sent == [("replica-0", "RunTick"), ("replica-1", "RunTick"), ("replica-1", "RunTick")]


def test_several_mirrors_lost_at_once(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    ctxs = [context(name) for name in "abc"]
    manager.try_admit(ctxs, [0, 0, 1])
    for name, replica in zip("abc", (0, 0, 1), strict=True):
        runtime.actor(f"replica-{replica}").service._mirrors.drop(name)
    manager.step([ctxs[:2], ctxs[2:]])


def test_alloc_sends_missing_tokens_again(runtime: FakeRuntime, manager: PagedKVCacheManager) -> None:
    ctx = context("r", range(9))
    manager.try_admit([ctx], [0])
    ctx.update(3)  # one active token: no peers are asked, only new tokens travel
    runtime.actor("replica-0").service._mirrors.drop("r")
    manager.alloc(ctx, 0)
    assert manager.get_req_blocks("r", 0)


def test_a_function_that_replicas_import_is_pickled_once_and_others_as_they_are_now(
    manager: PagedKVCacheManager, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled, ctx, dumps = list[Any](), context("a"), runtime.dumps
    monkeypatch.setattr(runtime, "dumps", lambda value: [pickled.append(value), dumps(value)][1])
    manager.try_admit([ctx], [0])
    for _ in range(3):
        assert manager.execute([[ctx], []], stamp)[0] == 6
    assert pickled == [stamp]
    answers = [7]

    def own(inputs: Any, batch: Any) -> int:
        return answers[-1]

    for expected in (7, 8):
        answers.append(expected)
        assert manager.execute([[ctx], []], own)[0] == expected, "by value"
    assert pickled == [stamp, own, own]
    manager.release("a", 0)
