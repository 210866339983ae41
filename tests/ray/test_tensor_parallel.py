"""Two replicas of two ranks each, with gloo: the tokens are those of one process, through copies from the same rank of
the other replica, tiers, chunks, preemption, and the death of a rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayk import InferenceSession
from rayk.cluster import Cluster
from rayk.errors import ConfigError, PlanError
from rayk.params import GROUP, SHARED_MEMORY
from rayk.scheduler.transfers.indexed_copies import CopyPlanner

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.models.checkpoints import prompts, write  # noqa: TID252  # as above

SETTINGS: dict[str, Any] = {"page_size": 16, "max_batch_size": 4, "chunk_size": 32, "router": "round-robin"}
ASKED = {"max_new_tokens": 12, "ignore_eos": True}
TEXTS = prompts((5, 40, 17, 64, 33, 90, 20, 21), seed=3)
SHARED = [[*TEXTS[5], *text] for text in TEXTS[:4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def want(folder: Path) -> list[list[int]]:
    """Of one process, after another."""
    with Cluster(folder, **SETTINGS) as cluster:
        return tokens(cluster, TEXTS + SHARED)


def tokens(cluster: Cluster, texts: list[list[int]]) -> list[list[int]]:
    return [output.tokens for output in cluster.generate(texts, **ASKED)]


def rank_pids() -> set[int]:
    """Of ranks other than 0."""
    processes = psutil.Process().children(recursive=True)
    found = set()
    for process in processes:
        try:
            if "".join(process.cmdline()[:1]).startswith("ray::RankActor"):
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_copies_preemption_and_the_death_of_a_rank(
    session: InferenceSession, folder: Path, want: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CopyPlanner, "prefills", lambda self, replica, rate: False)  # all is copied
    with Cluster(folder, session, replicas=2, tp=2, pages=14, **SETTINGS) as cluster:
        assert cluster.facts[0].page_bytes == 2 * 2 * 2 * 2 * 16 * 8 * 4 / 2
        links = cluster._dispatcher.router.fetching.links
        assert tokens(cluster, TEXTS + SHARED) == want
        copied = 0
        for line in (SHARED_MEMORY, GROUP):
            links.wanted = line
            cluster.reset_prefix_cache()
            for at, text in enumerate(SHARED):  # by turns: each finds the prefix at the other replica
                [output] = cluster.generate([text], **ASKED)
                assert output.tokens == want[len(TEXTS) + at]
                copied += output.cached.peer_tokens
        assert copied >= 2 * 80
        assert sum(cluster.stats(replica).preemptions for replica in range(2)) > 0
        cluster.check_integrity()
        before = rank_pids()
        assert len(before) == 2
        handles = cluster.submit_all(TEXTS * 2, **ASKED)
        until(lambda: any(handle.tokens for handle in handles))
        os.kill(min(before), signal.SIGKILL)
        outputs = [handle.result(120) for handle in handles]
        assert [output.tokens for output in outputs] == want[: len(TEXTS)] * 2
        until(lambda: cluster.replica_states() == ["ready", "ready"], 120)
        assert len(rank_pids() - before) == 1  # the whole replica is another one
        assert tokens(cluster, TEXTS + SHARED) == want
    until(lambda: not rank_pids())


def test_tiers_have_pages_of_all_ranks(
    session: InferenceSession, folder: Path, want: list[list[int]], tmp_path: Path
) -> None:
    tiers = {"host_memory": 40 * 4096, "disk_dir": tmp_path, "disk_memory": "1MiB"}
    with Cluster(folder, session, replicas=2, tp=2, pages=14, **tiers, **SETTINGS) as cluster:
        assert tokens(cluster, TEXTS + SHARED) == want
        cluster.check_integrity()
        again = [cluster.generate([text], **ASKED)[0] for text in [*SHARED[1:], *TEXTS]]  # each at the other replica
        assert [output.tokens for output in again] == want[len(TEXTS) + 1 :] + want[: len(TEXTS)]
        assert sum(output.cached.host_tokens + output.cached.disk_tokens for output in again) > 100
        assert cluster.stats(0).tiers.host_total == 40 and cluster.stats(0).cache.failed_loads == 0
        cluster.check_integrity()
    files = [file.stat().st_size for file in tmp_path.rglob("*.kv")]
    assert files and set(files) == {4096 + 64}  # of both ranks


def test_what_cannot_be_is_said_before_anything_starts(session: InferenceSession, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tp=2 needs a process for each rank.*InferenceSession\(\"ray\"\)"):
        Cluster(folder, tp=2, **SETTINGS)
    with pytest.raises(PlanError, match="tp=2 needs nodes with 2 GPUs, and this cluster's have 0 at most"):
        Cluster(folder, session, tp=2, device="cuda", **SETTINGS)
    with pytest.raises(ConfigError, match=r"4 query heads and 2 KV heads do not split over tp=3"):
        Cluster(folder, session, tp=3, **SETTINGS)
