"""Weights that change in place: after a reset no new request reads what the old ones computed, wherever it lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.errors import ReplicaLostError
from rayk.kvcache.page_hash import Mask
from rayk.scheduler.transfers.indexed_copies import CopyPlanner

from .fake import PageModel, digest, scores

SETTINGS: dict[str, Any] = {"replicas": 2, "page_size": 4, "pages": 64, "max_batch_size": 8, "router": "round-robin"}
PROMPT = list(range(30))


class Versioned(PageModel):
    """What it writes to a page, and so its answers, bear the version of its weights."""

    version = 0
    watermarks = threading.Event()

    def logits(self, inputs: Any, tokens: Any, counts: Any) -> Any:
        assert self.watermarks.wait(30)
        return super().logits(inputs, tokens + 100 * self.version, counts)


def expected(prompt: Sequence[int], count: int, version: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(scores(digest([token + 100 * version for token in tokens])).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(autouse=True)
def first_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Versioned, "version", 0)
    monkeypatch.setattr(CopyPlanner, "prefills", lambda self, replica, rate: False)  # all that can be copied is
    Versioned.watermarks.set()
    yield
    Versioned.watermarks.set()


def heard(cluster: Cluster, *replicas: int) -> None:
    """Wait until the router knows that nothing is cached there: what it does not know costs a miss."""
    while any(cluster._dispatcher.router.index.pages(replica) for replica in replicas):
        threading.Event().wait(0.002)


def model(device: str) -> Versioned:
    return Versioned()


def serve(cluster: Cluster, version: int, times: int = 4) -> list[int]:
    """The same prompt on one replica after the other; what each time was cached."""
    cached = []
    for _ in range(times):
        [output] = cluster.generate([PROMPT], max_new_tokens=5)
        assert output.tokens == expected(PROMPT, 5, version)
        cached.append(output.cached_tokens)
    return cached


@pytest.mark.parametrize("tiers", [{}, {"host_memory": "64KiB"}])
def test_nothing_of_the_old_weights_is_read(tiers: dict[str, Any]) -> None:
    with Cluster(model, **SETTINGS, **tiers) as cluster:
        assert serve(cluster, 0) == [0, 28, 28, 28]
        Versioned.version = 1
        [stale] = cluster.generate([PROMPT], max_new_tokens=5)
        assert stale.tokens != expected(PROMPT, 5, 1), "else this test could not fail"
        reset = cluster.reset_prefix_cache()
        assert reset.held == {0: 0, 1: 0} and reset.complete and not reset.hits
        heard(cluster, 0, 1)
        assert serve(cluster, 1) == [0, 28, 28, 28]
        cluster.check_integrity()


@pytest.mark.parametrize("tiers", [{}, {"host_memory": "64KiB"}])
def test_requests_that_run_meanwhile_keep_their_pages_to_themselves(tiers: dict[str, Any]) -> None:
    with Cluster(model, **SETTINGS, **tiers) as cluster:
        began = threading.Event()
        handles = cluster.submit_all([PROMPT, PROMPT], max_new_tokens=100, on_news=lambda _: began.set())
        assert began.wait(20)
        Versioned.watermarks.clear()
        resetting: list[Any] = []
        thread = threading.Thread(target=lambda: resetting.append(cluster.reset_prefix_cache()))
        thread.start()
        Versioned.watermarks.set()
        thread.join(20)
        Versioned.version = 1
        cluster.reset_prefix_cache()  # a second one for the weights as they are now
        [reset] = resetting
        assert not reset.complete and reset.held[0] > 7
        assert serve(cluster, 1)[0] == 0
        assert [len(handle.result(20).tokens) for handle in handles] == [100, 100]
        assert serve(cluster, 1) == [28] * 4
        assert cluster.reset_prefix_cache().complete
        cluster.check_integrity()


def test_a_copy_from_a_replica_that_has_not_heard_of_it_is_not_used() -> None:
    """They hear of it one after the other."""
    with Cluster(model, **SETTINGS) as cluster:
        assert serve(cluster, 0, 2) == [0, 28]
        Versioned.version = 1
        token = Mask.new()
        assert cluster._replicas.reset_prefix_cache([0], token) == {0: 0}
        [output] = cluster.generate([PROMPT], max_new_tokens=5)
        assert output.replica == 0 and output.tokens == expected(PROMPT, 5, 1)
        cluster._replicas.reset_prefix_cache([1], token)
        heard(cluster, 1)
        assert serve(cluster, 1) == [28] * 4, "and between the two it is copied again"


@pytest.mark.parametrize("tiers", [{}, {"host_memory": "64KiB"}])
def test_replicas_that_are_added_later_belong_to_the_others(tiers: dict[str, Any]) -> None:
    with Cluster(model, **SETTINGS | {"replicas": 1}, **tiers) as cluster:
        serve(cluster, 0, 1)
        Versioned.version = 1
        cluster.reset_prefix_cache()
        assert serve(cluster, 1, 2) == [0, 28]
        cluster.add_replicas()
        assert serve(cluster, 1) == [28] * 4, "and what is in tiers is still there"


def test_a_lost_replica_is_no_hindrance() -> None:
    with Cluster(model, **SETTINGS, replace=False) as cluster:
        serve(cluster, 0)
        cluster._replicas.drop(0)
        Versioned.version = 1
        assert cluster.reset_prefix_cache().held == {1: 0}
        cluster.check_integrity()
        with pytest.raises(ReplicaLostError, match="replica 0"):
            cluster.stats(0)
        cluster._dispatcher.lose(0, "it died")
        with pytest.raises(ReplicaLostError, match="it died"):
            cluster.stats(0)
        assert serve(cluster, 1, 2) == [0, 28]
