"""Two replicas in this process that can be held up, and what must be true of them after each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.engine.local_replicas import InlineReplicas
from rayk.protocol.engine import Command, encode

from ..engine.fake import PageModel, Tokenizer  # noqa: TID252  # tests/ is no package


class Gated(PageModel):
    """It forwards only while `watermarks` is open, so that there is something to interrupt."""

    watermarks = threading.Event()

    def logits(self, *given: Any) -> Any:
        assert self.watermarks.wait(30)
        return super().logits(*given)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """All that is said to its replicas could be sent. Afterwards they are there, and have nothing."""
    post = InlineReplicas.post

    def watch(self: InlineReplicas, replica: int, command: Command) -> None:
        encode(command)
        post(self, replica, command)

    monkeypatch.setattr(InlineReplicas, "post", watch)
    Gated.watermarks.set()
    shape = {"replicas": 2, "page_size": 4, "pages": 64, "max_batch_size": 4, "chunk_size": 16}
    with Cluster(lambda device: Gated(tokenizer=Tokenizer()), **shape) as cluster:  # type: ignore[arg-type]  # all ints
        yield cluster
        Gated.watermarks.set()
        assert cluster.replica_states() == ["ready", "ready"]
        idle(cluster)


def idle(cluster: Cluster) -> None:
    """Wait until the replicas have nothing; all pages are back, and nobody is remembered."""
    for replica in cluster.live:
        while (stats := cluster.stats(replica)).running or stats.waiting:
            threading.Event().wait(0.002)
        assert stats.free_pages == stats.pages
    cluster.check_integrity()
    dispatcher = cluster._dispatcher
    while dispatcher._handles:  # their last reports are on their way
        threading.Event().wait(0.002)
    assert not dispatcher._ids and not dispatcher.core.waiting and not dispatcher.router._placed
    assert not dispatcher.core.tickets
