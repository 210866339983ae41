"""Replicas that are added, drained, replaced and removed while requests run: nobody's answer changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.engine.engine import Engine
from rayk.errors import (
    ClosedError,
    ConfigError,
    DrainError,
    LineError,
    ReplicaIndexError,
    ReplicaRemovedError,
    ReplicaStateError,
)
from rayk.request_errors import RequestCancelledError
from rayk.sampling import SamplingParams
from rayk.scheduler.scaling import Removed
from rayk.transport.direct import DirectLine

from ..engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # tests/ is no package
from ..engine.test_engine import prompts  # noqa: TID252  # tests/ is no package
from .test_cluster import dying

SETTINGS: dict[str, Any] = {"page_size": 4, "pages": 64, "max_batch_size": 4, "chunk_size": 16}


class Gated(PageModel):
    """It forwards only while `watermarks` is open, so that there is something to interrupt."""

    watermarks = threading.Event()

    def logits(self, *given: Any) -> Any:
        assert self.watermarks.wait(30)
        return super().logits(*given)


def model(device: str) -> PageModel:
    return Gated(tokenizer=Tokenizer())


@pytest.fixture(autouse=True)
def watermarks() -> Iterator[threading.Event]:
    Gated.watermarks.set()
    yield Gated.watermarks
    Gated.watermarks.set()


def some_tokens(handles: list[Any], count: int) -> None:
    """Wait until all have so many tokens."""
    news = threading.Event()
    for handle in handles:
        handle.on_news = lambda handle: (handle.take(), news.set())
    while not all(len(handle.tokens) >= count or handle.done for handle in handles):
        assert news.wait(10)
        news.clear()


def test_an_added_replica_takes_what_waits(watermarks: threading.Event) -> None:
    with Cluster(model, **SETTINGS) as cluster:
        watermarks.clear()
        handles = cluster.submit_all([[i, 1, 2] for i in range(30)], max_new_tokens=12)
        adding = threading.Thread(target=cluster.add_replicas, args=(2,))
        adding.start()
        watermarks.set()
        adding.join(20)
        more = cluster.generate([[i, 5] for i in range(20)], max_new_tokens=4)
        outputs = [handle.result(20) for handle in handles]
        assert [output.tokens for output in outputs] == [expected([i, 1, 2], 12) for i in range(30)]
        assert {output.replica for output in [*outputs, *more]} == {0, 1, 2}
        assert cluster.live == [0, 1, 2] and cluster.replica_states() == ["ready"] * 3
        assert [facts.replica for facts in cluster.facts] == [0, 1, 2]
        assert cluster.stats(2).pages == 64


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_what_a_removed_replica_had_goes_on_elsewhere(temperature: float, tokens: int) -> None:
    asked = prompts(14, 20)
    settings = [SamplingParams(max_new_tokens=14, temperature=temperature, seed=i, stop=("never",)) for i in range(14)]
    with Cluster(model, page_size=4, pages=64) as whole:
        wanted = [output.tokens for output in whole.generate(asked, settings)]
    with Cluster(model, replicas=2, **SETTINGS) as cluster:
        text = dict.fromkeys(range(14), "")
        streamed: dict[int, list[int]] = {i: [] for i in range(14)}
        outputs: dict[int, Any] = {}
        removing = None
        for update in cluster.stream(asked, settings):
            streamed[update.index] += update.tokens
            text[update.index] += update.text
            if update.output is not None:
                outputs[update.index] = update.output
            if removing is None and max(map(len, streamed.values())) >= tokens:
                removing = threading.Thread(target=cluster.remove_replica, args=(0,))
                removing.start()
        assert removing is not None
        removing.join(20)
        assert [outputs[i].tokens for i in range(14)] == [streamed[i] for i in range(14)] == wanted
        assert [text[i] for i in range(14)] == [outputs[i].text for i in range(14)]
        assert all(output.error is None and output.retries == 0 for output in outputs.values())
        assert cluster.replica_states() == ["removed", "ready"] and cluster.live == [1]
        with pytest.raises(ReplicaRemovedError):
            cluster.stats(0)
        assert cluster.add_replicas() == [2]
        assert {output.replica for output in cluster.generate(asked, settings)} == {1, 2}


def test_a_drained_replica_ends_what_it_has_and_takes_no_more(watermarks: threading.Event) -> None:
    with Cluster(model, replicas=2, **SETTINGS) as cluster:
        watermarks.clear()
        handles = cluster.submit_all([[i, 1] for i in range(4)], max_new_tokens=20)
        cluster.drain_replica(0)
        cluster.drain_replica(0)
        with pytest.raises(DrainError, match="2 request"):
            cluster.remove_replica(0, hand_over=False, timeout=0.01)
        watermarks.set()
        later = cluster.generate([[i, 2] for i in range(8)], max_new_tokens=3)
        assert {output.replica for output in later} == {1}
        assert sorted(handle.result(20).replica for handle in handles) == [0, 0, 1, 1]  # type: ignore[type-var]  # no None
        cluster.resume_replica(0)
        assert {o.replica for o in cluster.generate([[i, 3] for i in range(8)], max_new_tokens=3)} == {0, 1}
        cluster.remove_replica(0, hand_over=False)
        assert cluster.replica_states() == ["removed", "ready"]


def test_requests_wait_while_all_replicas_drain() -> None:
    with Cluster(model, **SETTINGS) as cluster:
        cluster.drain_replica(0)
        handle = cluster.submit([1, 2], max_new_tokens=5)
        assert cluster.add_replicas(1) == [1]
        assert handle.result(20).tokens == expected([1, 2], 5) and handle.result().replica == 1


def test_wrong_use() -> None:
    with Cluster(model, **SETTINGS) as cluster:
        with pytest.raises(ReplicaStateError, match="last one"):
            cluster.remove_replica(0)
        with pytest.raises(ReplicaIndexError):
            cluster.drain_replica(1)
        with pytest.raises(ConfigError, match="n must be"):
            cluster.add_replicas(0)
        assert cluster.generate([[1]], max_new_tokens=2)[0].tokens == expected([1], 2)


def test_cancelled_between_a_hand_over_and_its_arrival(watermarks: threading.Event) -> None:
    with Cluster(model, replicas=2, **SETTINGS) as cluster:
        handles = cluster.submit_all([[i, 1] for i in range(4)], max_new_tokens=100)
        some_tokens(handles, 2)
        watermarks.clear()
        mine = [handle for handle in handles if handle.replica == 0]
        cluster.drain_replica(0, hand_over=True)
        mine[0].cancel()
        watermarks.set()
        assert isinstance(mine[0].result(20).error, RequestCancelledError)
        assert mine[1].result(20).error is None and mine[1].result().replica == 1


def test_a_lost_replica_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(monkeypatch, {0: 7}) as cluster:
        outputs = cluster.generate([[i, 1] for i in range(8)], max_new_tokens=10)
        assert [output.tokens for output in outputs] == [expected([i, 1], 10) for i in range(8)]
        assert cluster.replica_states() == ["lost", "ready"]
        with pytest.raises(ReplicaStateError, match="lost"):
            cluster.drain_replica(0)
        cluster._replicas.doomed = {}  # type: ignore[attr-defined]  # they are Dying; nobody dies any more
        assert cluster.add_replicas(2) == [0, 2]
        again = cluster.generate([[i, 2] for i in range(20)], max_new_tokens=10)
        assert [output.tokens for output in again] == [expected([i, 2], 10) for i in range(20)]
        assert {output.replica for output in again} == {0, 1, 2}


def test_a_lost_replica_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(monkeypatch, {0: 7}) as cluster:
        cluster.generate([[i, 1] for i in range(8)], max_new_tokens=10)
        cluster.remove_replica(0)
        assert cluster.replica_states() == ["removed", "ready"] and cluster.add_replicas() == [2]


def test_a_thread_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(model, replicas=2, replace=False, host_memory="64KiB", **SETTINGS) as cluster:
        with monkeypatch.context() as broken:
            broken.setattr(Engine, "step", lambda self: 1 / 0)
            assert cluster.generate([[1, 2]])[0].error is not None
            while cluster.live:
                threading.Event().wait(0.005)
        assert cluster.replica_states() == ["lost", "lost"]
        assert cluster.add_replicas(2) == [0, 1]
        outputs = cluster.generate([[i, 2] for i in range(8)], max_new_tokens=5)
        assert [output.tokens for output in outputs] == [expected([i, 2], 5) for i in range(8)]
        cluster.check_integrity()


def test_what_came_from_a_tier_outlives_its_replica() -> None:
    asked = prompts(12, 40, seed=2)
    with Cluster(model, replicas=2, host_memory="64KiB", **SETTINGS) as cluster:
        cluster.generate(asked, max_new_tokens=3)
        cluster.add_replicas()
        cluster.remove_replica(0)
        cluster.remove_replica(1)
        outputs = cluster.generate(asked, max_new_tokens=3)
        assert [output.tokens for output in outputs] == [expected(p, 3) for p in asked]
        assert sum(o.cached_tokens for o in outputs) == sum((len(p) - 1) // 4 * 4 for p in asked)
        assert {output.replica for output in outputs} == {2}
        cluster.check_integrity()


@pytest.mark.parametrize("router", ["cost", "round-robin"])
def test_what_a_removed_replica_had_cached_is_cached_elsewhere(router: str) -> None:
    asked = prompts(12, 40, seed=3)
    with Cluster(model, replicas=3, router=router, **SETTINGS | {"pages": 160}) as cluster:
        cluster.generate(asked, max_new_tokens=3)
        for r in (0, 2):
            before = sum(cluster.stats(r).cache.cross_replica_blocks_copied for r in cluster.live if r != 0)
            removed = cluster.remove_replica(r)
            assert removed.cached and (removed.known, removed.taken) == (0, removed.cached)
            after = sum(cluster.stats(r).cache.cross_replica_blocks_copied for r in cluster.live)
            assert after - before == removed.taken or r == 2
        outputs = cluster.generate(asked, max_new_tokens=3)
        assert [output.tokens for output in outputs] == [expected(p, 3) for p in asked]
        assert sum(o.cached.device_tokens for o in outputs) == sum((len(p) - 1) // 4 * 4 for p in asked)
        cluster.check_integrity()


def test_the_router_knows_what_was_kept() -> None:
    asked = prompts(8, 40, seed=4)
    with Cluster(model, replicas=3, **SETTINGS | {"pages": 160}) as cluster:
        cluster.generate(asked, max_new_tokens=3)
        taken = cluster.remove_replica(1).taken
        assert taken
        outputs = [output for prompt in asked for output in cluster.generate([prompt], max_new_tokens=3)]
        assert sum(o.cached.device_tokens for o in outputs) == sum((len(p) - 1) // 4 * 4 for p in asked)
        assert sum(cluster.stats(r).cache.cross_replica_blocks_copied for r in cluster.live) == taken, "none on demand"


@pytest.mark.parametrize("more", [{"peer_copies": False}, {"host_memory": "64KiB"}, {"prefix_caching": False}])
def test_where_nothing_is_offered(more: dict[str, Any]) -> None:
    with Cluster(model, replicas=2, **SETTINGS, **more) as cluster:
        cluster.generate(prompts(4, 20), max_new_tokens=3)
        assert cluster.remove_replica(0) == Removed()


def test_requests_go_on_while_pages_are_offered(watermarks: threading.Event) -> None:
    asked = prompts(20, 30, seed=5)
    with Cluster(model, replicas=2, **SETTINGS | {"pages": 600}) as cluster:
        cluster.generate(asked, max_new_tokens=2)
        handles = cluster.submit_all([[i, 1] for i in range(16)], max_new_tokens=60)
        some_tokens(handles, 5)
        removed = cluster.remove_replica(1)
        assert removed.taken and [handle.result(20).tokens for handle in handles] == [
            expected([i, 1], 60) for i in range(16)
        ]
        outputs = cluster.generate(asked, max_new_tokens=2)
        assert [output.tokens for output in outputs] == [expected(p, 2) for p in asked]
        cluster.check_integrity()


def test_an_engine_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(model, replicas=2, **SETTINGS) as cluster, monkeypatch.context() as patch:
        cluster.generate(prompts(4, 20), max_new_tokens=3)
        patch.setattr("rayk.scheduler.serving.removal.OFFER_SECONDS", 0.05)
        patch.setattr(Engine, "query", lambda self, query: None)
        assert cluster.remove_replica(0) == Removed() and cluster.replica_states() == ["removed", "ready"]


@pytest.mark.parametrize("error", [ZeroDivisionError, LineError])
def test_a_copy_that_fails_is_passed_over(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DirectLine, export: Any, first: int, pages: Any) -> None:
        raise error() if error is ZeroDivisionError else LineError("shared-memory", 0, "a fault")

    asked = prompts(8, 30)
    with Cluster(model, replicas=2, **SETTINGS) as cluster, monkeypatch.context() as patch:
        cluster.generate(asked, max_new_tokens=3)
        patch.setattr(DirectLine, "fetch", broken)
        assert cluster.remove_replica(0).taken == 0
        outputs = cluster.generate(asked, max_new_tokens=3)
        assert [output.tokens for output in outputs] == [expected(p, 3) for p in asked]
        cluster.check_integrity()


def test_closing_ends_a_removal_that_waits(watermarks: threading.Event) -> None:
    cluster = Cluster(model, replicas=2, **SETTINGS)
    watermarks.clear()
    cluster.submit_all([[i, 1] for i in range(4)], max_new_tokens=20)

    def remove() -> None:
        with pytest.raises(ClosedError):
            cluster.remove_replica(0, hand_over=False)

    removing = threading.Thread(target=remove)
    removing.start()
    while cluster.replica_states()[0] != "draining":
        threading.Event().wait(0.002)
    closing = threading.Thread(target=cluster.close)
    closing.start()
    watermarks.set()
    removing.join(10), closing.join(10)
    assert not removing.is_alive() and not closing.is_alive()
