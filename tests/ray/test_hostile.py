"""Hostile, cancelled and abandoned requests among good ones on replicas in actors, and weights that change there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ray import cloudpickle

from rayk import InferenceSession
from rayk.cluster import Cluster

from ..unit.dispatch.conftest import idle  # noqa: TID252  # as above
from ..unit.engine import fake  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # as above
from ..unit.engine.plays import HOSTILE, Hostile, Play, some_play  # noqa: TID252  # as above

# Workers cannot import these modules: what they hold travels by value.
cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def model(device: str) -> PageModel:
    return PageModel(tokenizer=Tokenizer())


@pytest.fixture(scope="module")
def cluster(session: InferenceSession) -> Iterator[Cluster]:
    shape: dict[str, Any] = {"replicas": 2, "page_size": 4, "pages": 12, "max_batch_size": 3, "chunk_size": 12}
    with Cluster(model, session, **shape) as cluster:
        yield cluster


def test_every_hostile_request_is_its_own_end(cluster: Cluster) -> None:
    play = Play(cluster)
    for which in range(HOSTILE):
        play.act(Hostile(which, [which, 1]))
    play.end()
    idle(cluster)


@pytest.mark.parametrize("seed", range(3))
def test_the_others_get_their_tokens(cluster: Cluster, seed: int) -> None:
    play = Play(cluster)
    for act in some_play(seed, 40):
        play.act(act)
    play.end()
    idle(cluster)


def test_a_command_that_cannot_be_read_ends_the_replica_and_not_its_requests(session: InferenceSession) -> None:
    with Cluster(model, session, replicas=2, page_size=4, pages=64, replace=False) as cluster:
        told = threading.Event()
        handles = cluster.submit_all([[i, 1] for i in range(6)], max_new_tokens=150, on_news=lambda _: told.set())
        assert told.wait(20)
        cluster._replicas._placed[0].actor.call("handle", b"\xc1")
        assert [handle.result(30).tokens for handle in handles] == [expected([i, 1], 150) for i in range(6)]
        assert cluster.replica_states() == ["lost", "ready"]


def test_a_reset_reaches_all_replicas(cluster: Cluster) -> None:
    prompt = list(range(30))
    for _ in range(4):
        cluster.generate([prompt], max_new_tokens=2)
    assert cluster.reset_prefix_cache().held == {0: 0, 1: 0}
    assert cluster.generate([prompt], max_new_tokens=2)[0].cached_tokens == 0
    running = cluster.submit(prompt, max_new_tokens=18)
    reset = cluster.reset_prefix_cache()
    assert set(reset.held) == {0, 1} and running.result(20).tokens == expected(prompt, 18)
    assert cluster.generate([prompt], max_new_tokens=2)[0].tokens == expected(prompt, 2)
    idle(cluster)
