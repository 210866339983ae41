"""Whatever one request brings, all others get their undisturbed tokens: plays on a Cluster in this process.

Its two replicas have as few pages as the longest request needs, copy from each other whatever the other one has, and
compute a forward at a time, when the play says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayk.cluster import Cluster
from rayk.scheduler.transfers.indexed_copies import CopyPlanner

from ..unit.dispatch.conftest import idle  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import PageModel, Tokenizer  # noqa: TID252  # as above
from ..unit.engine.plays import (  # noqa: TID252  # as above
    HOSTILE,
    Act,
    Cancelled,
    Good,
    Hostile,
    Late,
    Left,
    Moves,
    Play,
    Steps,
)


class Permitted(PageModel):
    """A forward waits for its permit, until all are free."""

    def __init__(self) -> None:
        super().__init__(tokenizer=Tokenizer())
        self.permits = threading.Semaphore(0)
        self.free = False

    def logits(self, *given: Any) -> Any:
        while not self.free and not self.permits.acquire(timeout=0.01):
            pass
        return super().logits(*given)


prompt = st.lists(st.integers(0, 94), min_size=1, max_size=12)
acts: st.SearchStrategy[Act] = st.one_of(
    st.builds(
        Good,
        st.integers(0, 4),
        st.lists(prompt, min_size=1, max_size=6),
        st.integers(1, 16),
        st.sampled_from([None, "x"]),
    ),
    st.builds(Hostile, st.integers(0, HOSTILE - 1), prompt),
    st.builds(Cancelled, st.integers(0, 99)),
    st.builds(Late, st.lists(prompt, min_size=1, max_size=2), st.sampled_from([1e-3, 0.02])),
    st.builds(Left, st.lists(prompt, min_size=1, max_size=3), st.integers(0, 2), st.booleans()),
    st.builds(Moves, st.integers(0, 2)),
    st.builds(Steps, st.integers(1, 12)),
)


@pytest.fixture(autouse=True, scope="module")
def copies() -> Iterator[None]:
    """The model is quick: as if nobody knew, all that another replica has is copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CopyPlanner, "prefills", lambda self, replica, rate: False)
        yield


PINNED = [
    *(Good(0, [[1]], 1), Steps(9), Moves(1), Good(4, [[7], [8]], 16), Steps(3)),  # busy while what comes is copied
    *(Good(0, [[2], [3]], 2), Moves(0), Steps(2), Good(2, [[5] * 12], 16), Steps(30)),
]


@example(acts=PINNED)
@settings(settings.get_profile("rayk-machines"))
@given(st.lists(acts, min_size=3, max_size=25))
def test_whatever_one_request_brings_the_others_get_their_tokens(acts: list[Act]) -> None:
    model = Permitted()
    shape = {"replicas": 2, "page_size": 4, "pages": 12, "max_batch_size": 2, "chunk_size": 12}
    with Cluster(lambda device: model, **shape) as cluster:  # type: ignore[arg-type]  # all are ints

        def let(forwards: int) -> None:
            """So many, fewer when there is nothing to do."""
            model.permits.release(forwards)
            while model.permits._value and cluster._dispatcher._handles:
                threading.Event().wait(0.0005)
            while model.permits.acquire(blocking=False):
                pass

        play = Play(cluster, let)
        try:
            for act in acts:
                play.act(act)
        finally:
            model.free = True
        play.end()
        idle(cluster)
        good = sum(handle.result(0).error is None for handle, _, _ in play.handles)
        assert sum(cluster.stats(replica).finished for replica in (0, 1)) <= good + play.begun, "left ones were ended"
