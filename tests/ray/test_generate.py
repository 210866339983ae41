"""Engines in actors: the same tokens as in one process, batches of reports, and replicas that die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray import cloudpickle

from rayk import InferenceSession, ReplicaLostError
from rayk.actors.engine import RayReplicas
from rayk.cluster import Cluster
from rayk.errors import PlanError
from rayk.protocol.engine import Report
from rayk.request_errors import RequestCancelledError, RequestError

from ..greedy.matrix import dense_answers  # noqa: TID252  # tests/ is no package that has an absolute name
from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine import fake  # noqa: TID252  # as above
from ..unit.engine.fake import EOS, PageModel, Tokenizer, expected  # noqa: TID252  # as above
from ..unit.models.checkpoints import dense, write  # noqa: TID252  # as above
from .forwards import running

# Workers cannot import these modules: what they hold travels by value.
cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def model(device: str) -> PageModel:
    assert device == "cpu"
    return PageModel(tokenizer=Tokenizer())


def slow_model(device: str) -> PageModel:
    class Slow(PageModel):
        def logits(self, inputs, tokens, counts):  # type: ignore[no-untyped-def]
            time.sleep(0.02)  # so that there is something to interrupt
            return super().logits(inputs, tokens, counts)

    return Slow(tokenizer=Tokenizer())


def broken_model(device: str) -> PageModel:
    raise RuntimeError("no such weights")


SETTINGS = {"replicas": 2, "page_size": 4, "pages": 200, "max_batch_size": 8, "chunk_size": 32}


@pytest.fixture(scope="module")
def cluster(session: InferenceSession) -> Iterator[Cluster]:
    with Cluster(model, session, **SETTINGS) as cluster:
        yield cluster


def engine_pids() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::EngineActor"):
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_tokens_over_two_replicas(cluster: Cluster) -> None:
    prompts = [[i, *range(20), i] for i in range(30)]
    outputs = cluster.generate(prompts, max_new_tokens=12)
    assert [o.tokens for o in outputs] == [expected(p, 12) for p in prompts]
    assert {o.replica for o in outputs} == {0, 1}
    assert all(o.text == Tokenizer().decode(o.tokens) and o.error is None for o in outputs)
    assert [facts.pages for facts in cluster.facts] == [200, 200]
    first, second = (cluster.generate([list(range(40, 80))], max_new_tokens=5)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 36) and first.tokens == second.tokens


def test_bad_requests_among_good_ones(cluster: Cluster) -> None:
    good, bad, worse = cluster.generate([[1, 2], [EOS + 5], []], max_new_tokens=4)
    assert good.tokens == expected([1, 2], 4)
    assert isinstance(bad.error, RequestError) and "vocabulary" in str(bad.error) and bad.error.request_id == bad.id
    assert "empty" in str(worse.error)


def test_streams_threads_and_coroutines_at_once(cluster: Cluster) -> None:
    async def read(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async for update in cluster.astream(prompt, max_new_tokens=40):
            tokens += update.tokens
        return tokens

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(read([i, 3]) for i in range(6)))

    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.extend(o.tokens for o in cluster.generate([[50, 1]] * 3)))
    thread.start()
    assert asyncio.run(all_of_them()) == [expected([i, 3], 40) for i in range(6)]
    thread.join(30)
    assert found == [expected([50, 1], 64)] * 3


def test_a_report_has_many_tokens(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token costs no message."""
    seen: list[Report] = []
    reports = RayReplicas.reports

    def watch(self: RayReplicas, replica: int) -> Iterator[Report]:
        for report in reports(self, replica):
            seen.append(report)
            yield report

    monkeypatch.setattr(RayReplicas, "reports", watch)
    with Cluster(model, session, **SETTINGS | {"replicas": 1}) as cluster:
        outputs = cluster.generate([[i] for i in range(8)], max_new_tokens=60)
    tokens = sum(len(o.tokens) for o in outputs)
    assert tokens == 480
    assert len([report for report in seen if report.tokens]) <= 70, "at most one for each step"


def test_cancelling_while_it_computes(session: InferenceSession) -> None:
    with Cluster(slow_model, session, **SETTINGS | {"replicas": 1}) as cluster:
        keep, drop = cluster.submit_all([[1, 2], [3, 4]], max_new_tokens=50)
        until(lambda: len(drop.tokens) > 3)
        before = time.monotonic()
        assert cluster.stats(0).running == 2, "control calls are answered meanwhile"
        drop.cancel()
        assert isinstance(drop.result(10).error, RequestCancelledError)
        assert time.monotonic() - before < scaled(5)
        assert keep.result(30).tokens == expected([1, 2], 50)
        assert drop.tokens == expected([3, 4], len(drop.tokens)) and len(drop.tokens) < 50


def test_a_killed_replicas_requests_go_on(session: InferenceSession) -> None:
    others = engine_pids()
    with Cluster(slow_model, session, replace=False, **SETTINGS) as cluster:
        pids = sorted(engine_pids() - others)
        assert len(pids) == 2
        prompts = [[i, i + 1] for i in range(8)]
        handles = cluster.submit_all(prompts, max_new_tokens=60)
        until(lambda: all(len(handle.tokens) > 2 for handle in handles))
        os.kill(pids[0], signal.SIGKILL)
        outputs = [handle.result(60) for handle in handles]
        assert [o.tokens for o in outputs] == [expected(p, 60) for p in prompts]
        assert all(o.error is None for o in outputs) and sum(o.retries for o in outputs) == 4
        [left] = cluster.live
        os.kill(pids[1], signal.SIGKILL)
        [lost] = cluster.generate([[1, 2]], max_new_tokens=60)
        assert isinstance(lost.error, ReplicaLostError) and "process" in str(lost.error)
        assert cluster.live == [] and left in (0, 1)


def test_a_silent_replica_counts_as_lost(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.actors.engine.SILENT_SECONDS", 4.0)
    others = engine_pids()
    with Cluster(slow_model, session, replace=False, **SETTINGS) as cluster:
        stopped = min(engine_pids() - others)
        handles = cluster.submit_all([[i, i + 1] for i in range(4)], max_new_tokens=60)
        until(lambda: all(len(handle.tokens) > 2 for handle in handles))
        os.kill(stopped, signal.SIGSTOP)
        outputs = [handle.result(60) for handle in handles]
        assert [o.tokens for o in outputs] == [expected([i, i + 1], 60) for i in range(4)]
        assert len(cluster.live) == 1 and sum(o.retries for o in outputs) == 2
        until(lambda: not running([stopped]))


def test_a_checkpoint_from_a_folder(session: InferenceSession, tmp_path: Path) -> None:
    folder = write(tmp_path, "llama")
    prompts = [[5 + i, *range(10, 30), i + 3] for i in range(8)]
    answers = dense_answers(dense(folder), prompts, 8)
    with Cluster(folder, session, replicas=2, page_size=4, pages=100, router="round-robin") as cluster:
        outputs = cluster.generate(prompts, max_new_tokens=8)
        assert [facts.max_length for facts in cluster.facts] == [1024, 1024]
    assert [o.tokens for o in outputs] == [answer.tokens for answer in answers]
    assert [o.replica for o in outputs] == [0, 1] * 4


def test_nothing_is_left_behind(session: InferenceSession) -> None:
    before = engine_pids()
    cluster = Cluster(slow_model, session, **SETTINGS)
    new = engine_pids() - before
    handle = cluster.submit([1], max_new_tokens=100)
    cluster.close()
    assert handle.result(1).finish_reason == "cancelled"
    until(lambda: not running(sorted(new)))
    until(lambda: engine_pids() <= before)  # those of the test before may go meanwhile
    assert not any(reader.is_alive() for reader in cluster._lifecycle.readers.values())


def test_a_model_that_cannot_be_loaded(session: InferenceSession) -> None:
    before, groups = engine_pids(), placements()
    with pytest.raises(PlanError, match=r"replica.*no such weights"):
        Cluster(broken_model, session, replicas=2)
    until(lambda: engine_pids() <= before)  # those of the test before may go meanwhile
    assert placements() == groups


def placements() -> list[str]:
    from ray.util import placement_group_table

    return sorted(i for i, group in placement_group_table().items() if group["state"] != "REMOVED")
