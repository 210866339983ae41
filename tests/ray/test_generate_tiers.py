"""Engines in actors with tiers below them: shared by a node's replicas, kept over a restart, sound after a death."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from rayk import InferenceSession
from rayk.cluster import Cluster
from rayk.kvcache.request import Reused

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine import fake  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # as above
from ..unit.engine.test_engine import prompts  # noqa: TID252  # as above
from .test_generate import engine_pids

cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def model(device: str) -> PageModel:
    return PageModel(tokenizer=Tokenizer())


def slow_model(device: str) -> PageModel:
    class Slow(PageModel):
        def logits(self, inputs, tokens, counts):  # type: ignore[no-untyped-def]
            time.sleep(0.005)  # so that there is something to interrupt
            return super().logits(inputs, tokens, counts)

    return Slow(tokenizer=Tokenizer())


SETTINGS = {"replicas": 2, "page_size": 4, "pages": 16, "max_batch_size": 4, "model_id": "fake"}
ASKED = prompts(30, 40, seed=5)
WHOLE = sum((len(prompt) - 1) // 4 * 4 for prompt in ASKED)


def serve(cluster: Cluster, asked: list[list[int]]) -> Reused:
    outputs = cluster.generate(asked, max_new_tokens=6)
    assert [output.tokens for output in outputs] == [expected(p, 6) for p in asked]
    cluster.check_integrity()
    reused = Reused(0, 0)
    for output in outputs:
        reused = reused.plus(output.cached)
    return reused


def pools(engines: set[int]) -> set[Path]:
    """The pools in shared memory that those engines have mapped; other tests of this machine have theirs."""
    lines = [line for engine in engines for line in Path(f"/proc/{engine}/maps").read_text().splitlines()]
    return {Path(line.split()[5]) for line in lines if "/dev/shm/rayk-pool-" in line}


def test_replicas_share_their_tiers_and_a_restart_finds_the_pages(session: InferenceSession, tmp_path: Path) -> None:
    others = engine_pids()
    tiers = {"host_memory": 20 * 64, "disk_dir": tmp_path, "disk_memory": "1MiB"}
    with Cluster(model, session, router="round-robin", **tiers, **SETTINGS) as cluster:
        assert serve(cluster, ASKED).total < WHOLE / 2
        warm = serve(cluster, [ASKED[-1], *ASKED[:-1]])  # each on the other replica
        assert warm.total == WHOLE and warm.disk_tokens > 0
        assert cluster.stats(0).tiers == cluster.stats(1).tiers and cluster.stats(0).tiers.host_total == 20
        assert cluster.stats(0).cache.failed_loads == 0
        mapped = pools(engine_pids() - others)
        assert mapped and all(pool.exists() for pool in mapped)
    assert not [pool for pool in mapped if pool.exists()]
    with Cluster(model, session, **tiers, **SETTINGS) as cluster:
        again = serve(cluster, ASKED)
        assert again.total == WHOLE and again.disk_tokens > WHOLE / 2


@pytest.mark.parametrize("seed", range(2))
def test_an_engine_that_is_killed_leaves_its_tiers_sound(session: InferenceSession, tmp_path: Path, seed: int) -> None:
    before, draw = engine_pids(), random.Random(seed)
    tiers = {"host_memory": 20 * 64, "disk_dir": tmp_path, "disk_memory": "16KiB"}
    with Cluster(slow_model, session, replace=False, **tiers, **SETTINGS) as cluster:
        doomed = draw.choice(sorted(engine_pids() - before))
        handles, moment = cluster.submit_all(ASKED * 2, max_new_tokens=6), draw.randrange(1, 50)
        until(lambda: sum(handle.done for handle in handles) >= moment)
        os.kill(doomed, signal.SIGKILL)
        outputs = [handle.result(120) for handle in handles]
        assert [output.tokens for output in outputs] == [expected(p, 6) for p in ASKED * 2]
        until(lambda: len(cluster.live) == 1)
        serve(cluster, ASKED)
        stats = cluster.stats(cluster.live[0])
        assert stats.free_pages == stats.pages and stats.tiers.disk_used <= stats.tiers.disk_total
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.kv")) <= 16 << 10
    with Cluster(model, session, **tiers, **SETTINGS) as cluster:
        serve(cluster, ASKED)
