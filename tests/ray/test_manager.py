"""The manager on a real cluster: the life of requests, batches, large messages, shipped functions, copies."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from rayk import InferenceSession, PagedKVCacheManager, TextContext, Tick
from rayk.errors import (
    AlreadyClaimedError,
    ClosedError,
    InsufficientBlocksError,
    NotClaimedError,
    RemoteError,
    ReplicaIndexError,
)
from rayk.kvcache.runtime_inputs import RuntimeInputs

from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import PAGE, PAGES, chain, contents, params, pid, stamp, wait_for_file


def context(request_id: str, tokens: Any, **options: Any) -> TextContext:
    return TextContext(request_id, list(tokens), 1_000_000, **options)


def serve(manager: PagedKVCacheManager, tokens: Any, replica: int) -> None:
    """Compute and cache the full pages of `tokens`."""
    ctx = context("served", tokens)
    [admission] = manager.try_admit([ctx], [replica])
    assert admission.error is None
    batches: list[list[TextContext]] = [[], []]
    batches[replica] = [ctx]
    manager.execute(batches, stamp)
    ctx.update(1)
    manager.step(batches)
    manager.release("served", replica)


def test_the_life_of_a_request(manager: PagedKVCacheManager) -> None:
    tokens = list(range(3 * PAGE + 2))
    ctx = context("r", tokens, cache_salt="salt")
    manager.claim("r", 1)
    assert manager.contains("r", 1) and not manager.contains("r", 0)
    manager.alloc(ctx, 1)
    assert len(manager.get_req_blocks("r", 1)) == 4 and manager.get_num_used_pages(1) == 4
    ctx.tokens.chunk(PAGE + 5)
    assert manager.execute([[], [ctx]], stamp) == [0, PAGE + 5]
    ctx.update(0)
    manager.step([[], [ctx]])
    assert manager.execute([[], [ctx]], stamp) == [0, 2 * PAGE - 3]
    for token in (70, 71, 72):
        ctx.update(token)
        manager.step([[], [ctx]])
        manager.alloc(ctx, 1)
        assert manager.execute([[], [ctx]], stamp) == [0, 1]
    assert contents(manager, "r", 1, len(ctx.tokens)) == chain([*tokens, 70, 71, 72])
    manager.release("r", 1)

    again = context("r", tokens, cache_salt="salt")
    assert manager.get_prefix_cache_hit_counts(again)[1].device_blocks == 3
    assert manager.get_prefix_cache_hit_counts(context("r", tokens))[1].device_blocks == 0, "another salt"
    [admission] = manager.try_admit([again], [1])
    assert admission.device_tokens == again.tokens.processed_length == 3 * PAGE
    assert contents(manager, "r", 1, 3 * PAGE) == chain(tokens)[: 3 * PAGE]
    manager.release("r", 1)
    metrics = manager.get_metrics_aggregated()
    assert metrics.device_blocks_served == 3 and metrics.cache_tokens == 3 * PAGE


def test_errors_arrive_with_type_and_fields(manager: PagedKVCacheManager) -> None:
    with pytest.raises(NotClaimedError):
        manager.release("nobody", 0)
    with pytest.raises(ReplicaIndexError):
        manager.claim("r", 2)
    manager.claim("r", 0)
    with pytest.raises(AlreadyClaimedError) as claimed:
        manager.claim("r", 1)
    assert (claimed.value.request_id, claimed.value.replica) == ("r", 0)
    ctx = context("r", range((PAGES + 1) * PAGE))
    with pytest.raises(InsufficientBlocksError) as full:
        manager.alloc(ctx, 0)
    assert (full.value.request_id, full.value.replica, full.value.total) == ("r", 0, PAGES)
    assert full.value.needed > PAGES and ctx.tokens.processed_length == 0
    manager.release("r", 0)


def test_inputs_are_those_of_one_process(manager: PagedKVCacheManager) -> None:
    def inputs(of: PagedKVCacheManager) -> RuntimeInputs:
        ctxs = [context("a", range(20)), context("b", range(100, 150)), context("c", range(200, 203))]
        assert [a.error for a in of.try_admit(ctxs, [0, 0, 1])] == [None] * 3
        try:
            return of.runtime_inputs([ctxs[:2], ctxs[2:]])
        finally:
            of.tick([Tick(release=["a", "b"]), Tick(release=["c"])])

    with InferenceSession() as session:
        one = inputs(PagedKVCacheManager(params(), session, PAGES, max_batch_size=64)).inputs
        two = inputs(manager).inputs
    for mine, theirs in zip(one, two, strict=True):
        assert theirs.kv_blocks is None and mine.kv_blocks is not None
        assert (mine.lookup_table == PAGES).tolist() == (theirs.lookup_table == PAGES).tolist(), (
            "pages in the same places"
        )
        assert mine.lookup_table.dtype == theirs.lookup_table.dtype
        for name in ("cache_lengths", "max_prompt_length", "max_cache_length"):
            assert getattr(mine, name).tolist() == getattr(theirs, name).tolist(), name
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype, name
        assert mine.attention_dispatch_metadata.tolist() == theirs.attention_dispatch_metadata.tolist()
    assert [b.shape for b in manager.get_device_buffer(0).all_buffers] == [(PAGES + 1, 2, 1, PAGE, 1, 4)]
    assert {b.device.type for b in manager.get_device_buffer(0).all_buffers} == {"meta"}


def test_64_requests_in_one_batch(manager: PagedKVCacheManager) -> None:
    prompts = [[i, *range(40)] for i in range(64)]
    ctxs = [context(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
    placed = manager.admit(ctxs)
    assert sorted(placed) == [0] * 32 + [1] * 32
    batches = [[c for c, r in zip(ctxs, placed, strict=True) if r == replica] for replica in range(2)]
    done = manager.tick([Tick(execute=batch) for batch in batches], stamp)
    assert [d.value for d in done] == [32 * 41] * 2
    for ctx in ctxs:
        ctx.update(5)
    done = manager.tick([Tick(step=b, alloc=b, execute=b) for b in batches], stamp)
    assert [d.value for d in done] == [32, 32] and not any(d.refused for d in done)
    for i in (0, 33, 63):
        assert contents(manager, f"r{i}", placed[i], 42) == chain([*prompts[i], 5])
    done = manager.tick([Tick(release=[c.request_id for c in b]) for b in batches])
    assert [d.free_pages for d in done] == [PAGES, PAGES]


def test_messages_over_the_size_that_travels_inline(manager: PagedKVCacheManager) -> None:
    """Ray sends arguments and results of more than 100 KiB through its object store."""
    pages = 1875
    tokens = [i % 50_000 for i in range(pages * PAGE + 7)]  # 117 KiB
    ctx = context("long", tokens)
    manager.claim("long", 0)
    manager.alloc(ctx, 0)
    assert manager.execute([[ctx], []], stamp) == [len(tokens), 0]
    ctx.update(3)
    manager.step([[ctx], []])
    assert contents(manager, "long", 0, len(tokens)) == chain(tokens)
    twin = context("twin", tokens)
    [admission] = manager.try_admit([twin], [1])  # 937 KiB of pages from the other replica
    assert admission.peer_tokens == pages * PAGE
    assert contents(manager, "twin", 1, pages * PAGE) == chain(tokens)[: pages * PAGE]
    answer = bytes(200_000)
    assert manager.execute([[], [twin]], lambda inputs, batch: answer[: 200_000 * len(batch)]) == [b"", answer]
    manager.release("long", 0)
    manager.release("twin", 1)


def test_two_managers_at_once(manager: PagedKVCacheManager) -> None:
    with PagedKVCacheManager(params(3), manager._session, 8, max_batch_size=4) as other:
        other.claim("r", 2)
        manager.claim("r", 0)
        assert not manager.contains("r", 1) and other.contains("r", 2)
        pids = manager.execute([[], []], pid) + other.execute([[], [], []], pid)
        assert len(set(pids)) == 5, "a process for each replica"
    for call in (
        lambda: other.claim("r", 0),
        lambda: other.execute([[], [], []], pid),
        lambda: other.tick([Tick()] * 3),
        lambda: other.num_free_blocks(0),
        other.check_integrity,
    ):
        with pytest.raises(ClosedError, match="make a new one"):
            call()
    other.shutdown()
    assert manager.contains("r", 0), "the other one's end is not this one's"
    manager.release("r", 0)


# -- shipped functions ---------------------------------------------------------------------------------


def test_lambdas_and_closures(manager: PagedKVCacheManager) -> None:
    factor = 3
    ctx = context("r", range(5))
    manager.try_admit([ctx], [1])
    assert manager.execute([[], [ctx]], lambda inputs, batch: factor * len(batch)) == [0, 3]

    def describe(inputs: Any, batch: Any) -> Any:
        seen = [(c.request_id, c.tokens.all.tolist(), c.tokens.active_length) for c in batch]
        return seen, tuple(inputs.shards[0].kv_blocks.shape), batch and batch[0].tokens.all.flags.writeable

    assert manager.execute([[], [ctx]], describe)[1] == (
        [("r", [0, 1, 2, 3, 4], 5)],
        (PAGES + 1, 2, 1, PAGE, 1, 4),
        False,
    )
    manager.release("r", 1)


def test_a_function_that_is_pickled_by_value_keeps_its_helpers(manager: PagedKVCacheManager) -> None:
    """stamp() calls chain(), and no worker can import the module of either."""
    assert (
        manager.execute([[], []], lambda inputs, batch: __import__("sys").modules.get(stamp.__module__)) == [None] * 2
    )
    ctx = context("r", range(5))
    manager.try_admit([ctx], [0])
    assert manager.execute([[ctx], []], stamp) == [5, 0]
    manager.release("r", 0)


def test_an_exception_in_fn_is_a_remote_error_and_the_replica_lives_on(manager: PagedKVCacheManager) -> None:
    before = manager.execute([[], []], pid)

    class OwnError(Exception):
        pass

    def broken_kernel(inputs: Any, batch: Any) -> None:
        if batch:
            raise OwnError("layer 7")

    ctx = context("r", range(5))
    manager.try_admit([ctx], [1])
    for call in (
        lambda: manager.execute([[], [ctx]], broken_kernel),
        lambda: manager.tick([Tick(), Tick(execute=[ctx])], broken_kernel),
    ):
        with pytest.raises(RemoteError) as caught:
            call()
        error = caught.value
        assert (error.replica, error.kind, error.message) == (1, "OwnError", "layer 7")
        assert "broken_kernel" in error.trace and str(error) == "replica 1 raised OwnError: layer 7"
    with pytest.raises(RemoteError, match="TypeError"):
        manager.execute([[], []], lambda inputs, batch: (x for x in ()))
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        manager.execute([[], []], lambda inputs, batch: 1 // 0)
    assert manager.execute([[], []], pid) == before
    manager.release("r", 1)


def test_a_function_that_would_end_the_process_does_not(session: InferenceSession) -> None:
    with PagedKVCacheManager(params(1), session, 8, max_batch_size=4) as own:
        before = own.execute([[]], pid)
        for leaving in (KeyboardInterrupt, SystemExit):

            def leave(inputs: Any, batch: Any, leaving: type = leaving) -> None:
                raise leaving

            with pytest.raises(RemoteError, match=leaving.__name__):
                own.execute([[]], leave)
            assert own.execute([[]], pid) == before


# -- copies ------------------------------------------------------------------------------------------


def test_both_directions_in_one_batch(manager: PagedKVCacheManager) -> None:
    left, right = list(range(1000, 1000 + 4 * PAGE + 1)), list(range(2000, 2000 + 4 * PAGE + 1))
    serve(manager, left, 0)
    serve(manager, right, 1)
    a, b = context("a", right), context("b", left)
    admissions = manager.try_admit([a, b], [0, 1])
    assert [(x.error, x.device_tokens, x.peer_tokens) for x in admissions] == [(None, 0, 4 * PAGE)] * 2
    assert contents(manager, "a", 0, 4 * PAGE) == chain(right)[: 4 * PAGE]
    assert contents(manager, "b", 1, 4 * PAGE) == chain(left)[: 4 * PAGE]
    metrics = manager.get_metrics_aggregated()
    assert metrics.cross_replica_bytes_copied == 8 * manager.params.bytes_per_page
    manager.release("a", 0)
    manager.release("b", 1)


def test_drivers_that_copy_in_both_directions_do_not_wait_for_each_other_for_ever(
    session: InferenceSession,
) -> None:
    """Two drivers of one named cluster, each pulling what the other's replica has."""
    options = {"enable_runtime_checks": True, "max_batch_size": 8}
    with (
        InferenceSession(runtime="ray", name="crossing") as own,
        InferenceSession(runtime="ray", name="crossing") as too,
    ):
        managers = [PagedKVCacheManager(params(), s, 128, **options) for s in (own, too)]
        failures: list[BaseException] = []
        copied = [0, 0]

        def drive(me: int) -> None:
            try:
                for i in range(12):
                    tokens = [me, i, *range(2 * PAGE)]
                    here, there = context(f"{me}-{i}", tokens), context(f"{me}-{i}-twin", tokens)
                    batches: list[list[TextContext]] = [[], []]
                    batches[me] = [here]
                    managers[me].try_admit([here], [me])
                    managers[me].execute(batches, stamp)
                    here.update(1)
                    managers[me].step(batches)
                    [twin] = managers[me].try_admit([there], [1 - me])
                    copied[me] += twin.peer_tokens
                    assert contents(managers[me], there.request_id, 1 - me, 2 * PAGE) == chain(tokens)[: 2 * PAGE]
                    managers[me].release(here.request_id, me)
                    managers[me].release(there.request_id, 1 - me)
            except BaseException as error:
                failures.append(error)

        try:
            threads = [threading.Thread(target=drive, args=(me,), daemon=True) for me in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads), "a deadlock"
            assert failures == [] and copied == [12 * 2 * PAGE] * 2
            managers[0].check_integrity()
            assert [managers[1].get_num_used_pages(r) for r in range(2)] == [0, 0]
        finally:
            managers[0].shutdown()


# -- lanes ---------------------------------------------------------------------------------------------


def test_the_control_lane_answers_while_the_data_lane_is_busy(manager: PagedKVCacheManager, tmp_path: Path) -> None:
    results: list[Any] = []
    worker = threading.Thread(
        target=lambda: results.append(manager.execute([[], []], wait_for_file(str(tmp_path)))), daemon=True
    )
    worker.start()
    until(lambda: len(list(tmp_path.glob("*.runs"))) == 2)
    cluster = manager._calls.cluster  # type: ignore[attr-defined]
    started = time.monotonic()
    assert sorted(cluster.running) == [0, 1]
    for replica in cluster.running.values():
        assert ray.get(replica.actor.call("ping", control=True), timeout=10) == replica.epoch
    assert ray.get(cluster.scheduler.call("ping", control=True), timeout=10) == cluster.scheduler_epoch
    assert time.monotonic() - started < scaled(5)
    assert not results, "the data lane was busy all the time"
    (tmp_path / "go").touch()
    worker.join(30)
    assert results == [[0, 0]]
