"""Engines in actors that copy prefixes from each other: over every line, and from one that dies meanwhile."""

from __future__ import annotations

import os
import random
import signal
import sys

import pytest
from ray import cloudpickle

from rayk import InferenceSession
from rayk.cluster import Cluster
from rayk.params import GROUP, OBJECT_STORE, SHARED_MEMORY
from rayk.scheduler.transfers.indexed_copies import CopyPlanner
from rayk.scheduler.transfers.links import LinkTable

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine import fake  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import expected  # noqa: TID252  # as above
from ..unit.engine.test_engine import prompts  # noqa: TID252  # as above
from .test_generate import engine_pids, model, slow_model

cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[model.__module__])

SETTINGS = {"replicas": 2, "page_size": 4, "pages": 200, "max_batch_size": 8, "router": "round-robin"}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these tests is quick; as if nobody knew that, all is copied."""
    monkeypatch.setattr(CopyPlanner, "prefills", lambda self, replica, rate: False)


def test_every_line_carries_pages(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    carried = LinkTable.carried

    def watch(self: LinkTable, source: int, target: int, kind: str, pages: int, seconds: float) -> None:
        used.append(kind)
        carried(self, source, target, kind, pages, seconds)

    monkeypatch.setattr(LinkTable, "carried", watch)
    with Cluster(model, session, **SETTINGS) as cluster:
        for at, line in enumerate((SHARED_MEMORY, GROUP, OBJECT_STORE)):
            monkeypatch.setattr(cluster._dispatcher.router.fetching.links, "wanted", line)
            for prompt in prompts(4, 40, seed=at):
                prompt = [at, *prompt, *range(10)]
                outputs = [cluster.generate([prompt], max_new_tokens=3)[0] for _ in range(2)]
                assert [output.tokens for output in outputs] == [expected(prompt, 3)] * 2
                assert outputs[1].cached.peer_tokens == (len(prompt) - 1) // 4 * 4
        assert used == [SHARED_MEMORY] * 4 + [GROUP] * 4 + [OBJECT_STORE] * 4
        cluster.check_integrity()


@pytest.mark.parametrize("seed", range(2))
def test_either_side_may_die(session: InferenceSession, seed: int) -> None:
    others, draw = engine_pids(), random.Random(seed)
    asked = prompts(20, 60, seed=seed)
    with Cluster(slow_model, session, replace=False, **SETTINGS | {"replicas": 3}) as cluster:
        doomed = draw.choice(sorted(engine_pids() - others))
        cluster.generate(asked, max_new_tokens=2)
        handles, moment = cluster.submit_all(asked * 2, max_new_tokens=6), draw.randrange(20)
        until(lambda: sum(handle.done for handle in handles) >= moment)
        os.kill(doomed, signal.SIGKILL)
        outputs = [handle.result(120) for handle in handles]
        assert [output.tokens for output in outputs] == [expected(p, 6) for p in asked * 2]
        assert sum(output.cached.peer_tokens for output in outputs) > 0
        until(lambda: len(cluster.live) == 2)
        cluster.check_integrity()
        for replica in cluster.live:
            assert cluster.stats(replica).free_pages == 200, "nothing is pinned any more"
