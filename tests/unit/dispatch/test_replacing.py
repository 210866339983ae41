"""A Cluster keeps its target by itself: lost replicas come back, and what cannot come back is given up."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.engine.engine import Engine
from rayk.engine.local_replicas import InlineReplicas
from rayk.errors import NoPlaceError, ReplicaLostError
from rayk.scheduler.supervisor import RestartPolicy

from ...patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..engine.fake import PageModel, expected  # noqa: TID252  # tests/ is no package
from .test_cluster import dying

SETTINGS: dict[str, Any] = {"page_size": 4, "pages": 64, "max_batch_size": 4}


def model(device: str) -> PageModel:
    return PageModel()


def test_a_lost_replica_comes_back_and_nobodys_tokens_change(monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = {0: 7}
    with dying(monkeypatch, doomed, replace=True, max_retries=50) as cluster:
        outputs = cluster.generate([[i, 1] for i in range(8)], max_new_tokens=10)
        assert [output.tokens for output in outputs] == [expected([i, 1], 10) for i in range(8)]
        doomed.clear()
        until(lambda: {o.replica for o in cluster.generate([[i, 2] for i in range(40)], max_new_tokens=9)} == {0, 1})
        assert cluster.replica_states() == ["ready", "ready"] and cluster.replacements() == []


def test_the_last_one_comes_back_and_its_requests_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for it: without a target they would have ended."""
    doomed = {0: 7}
    with dying(monkeypatch, doomed, replace=True, replicas=1, max_retries=50) as cluster:
        update = next(iter(cluster.stream([[9]], max_new_tokens=2)))
        assert update.tokens
        handles = cluster.submit_all([[i, 1] for i in range(8)], max_new_tokens=10)
        until(lambda: any(handle.retries for handle in handles))
        doomed.clear()
        assert [handle.result(20).tokens for handle in handles] == [expected([i, 1], 10) for i in range(8)]


def test_a_cuda_error_is_of_no_request_and_replaces_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its context gives nothing but errors from then on, for every request."""
    broken = threading.Event()
    logits = PageModel.logits

    def fails(self: PageModel, *given: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return logits(self, *given)

    monkeypatch.setattr(PageModel, "logits", fails)
    with Cluster(model, replicas=1, **SETTINGS) as cluster:
        broken.set()
        handle = cluster.submit([1, 2], max_new_tokens=5)
        until(lambda: cluster.replica_states() == ["lost"] or handle.retries)
        broken.clear()
        assert handle.result(20).tokens == expected([1, 2], 5) and handle.retries >= 1
        until(lambda: cluster.replica_states() == ["ready"])


def test_memory_that_ran_out_once_is_a_matter_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, failures = PageModel.logits, [MemoryError("no room")]

    def fails(self: PageModel, *given: Any) -> Any:
        if failures:
            raise failures.pop()
        return logits(self, *given)

    monkeypatch.setattr(PageModel, "logits", fails)
    with Cluster(model, **SETTINGS) as cluster:
        bad, good = cluster.generate([[1, 2]])[0], cluster.generate([[1, 2]], max_new_tokens=3)[0]
        assert "no room" in str(bad.error) and good.tokens == expected([1, 2], 3)
        assert cluster.replacements() == [] and cluster.replica_states() == ["ready"]


class Failing(InlineReplicas):
    """Replicas that cannot be started again."""

    error: Exception | None = None

    def add(self, replicas: Any, timeout: float) -> None:
        if self.error is not None:
            raise self.error
        super().add(replicas, timeout)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr("rayk.dispatch.startup.InlineReplicas", Failing)
    monkeypatch.setattr(Failing, "error", None)
    quick = RestartPolicy(pause=0.01, longest_pause=0.01, place_pause=0.01)
    monkeypatch.setattr("rayk.scheduler.supervisor.POLICY", quick)


def lose(cluster: Cluster) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", lambda self: 1 / 0)
        cluster.submit([3], max_new_tokens=4)
        until(lambda: cluster.replica_states() != ["ready"])


def test_what_cannot_be_started_is_given_up_with_its_reason(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(model, **SETTINGS) as cluster:
        monkeypatch.setattr(Failing, "error", ValueError("the checkpoint is gone"))
        lose(cluster)
        handle = cluster.submit([1, 2], max_new_tokens=5)
        until(lambda: any(each.given_up for each in cluster.replacements()))
        [told] = cluster.replacements()
        assert (told.replica, told.failures) == (0, 5) and "the checkpoint is gone" in told.reason
        assert isinstance(handle.result(20).error, ReplicaLostError), "nobody will come"
        monkeypatch.setattr(Failing, "error", None)
        assert cluster.add_replicas() == [0]
        assert cluster.generate([[1, 2]], max_new_tokens=5)[0].tokens == expected([1, 2], 5)


def test_a_place_is_asked_for_until_there_is_one(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(model, **SETTINGS) as cluster:
        monkeypatch.setattr(Failing, "error", NoPlaceError("no place for 1 replica(s)"))
        lose(cluster)
        handle = cluster.submit([1, 2], max_new_tokens=5)
        until(lambda: any("no place" in each.reason for each in cluster.replacements()))
        assert not cluster.replacements()[0].given_up and not handle.done
        monkeypatch.setattr(Failing, "error", None)
        assert handle.result(20).tokens == expected([1, 2], 5)
        assert cluster.replica_states() == ["ready"]


def test_without_replace_it_stays_lost(impatient: None) -> None:
    with Cluster(model, replace=False, **SETTINGS) as cluster:
        lose(cluster)
        assert cluster.replica_states() == ["lost"] and cluster.replacements() == []
        assert isinstance(cluster.generate([[1]])[0].error, ReplicaLostError)


def test_those_that_are_lost_at_once_start_side_by_side_and_by_themselves_when_that_fails(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, add = list[list[int]](), InlineReplicas.add

    def recorded(self: InlineReplicas, replicas: Any, timeout: float) -> None:
        calls.append(list(replicas))
        if len(calls) == 2:
            raise RuntimeError("one of them is broken")
        add(self, replicas, timeout)

    monkeypatch.setattr(InlineReplicas, "add", recorded)
    with Cluster(model, replicas=3, **SETTINGS) as cluster:
        with cluster._lifecycle._changing:  # nobody is started meanwhile
            for replica in (0, 1):
                cluster._replicas.drop(replica)
                cluster._dispatcher.lose(replica, "it died")
        until(lambda: cluster.replica_states() == ["ready"] * 3)
        assert calls[:2] == [[0, 1, 2], [0, 1]] and sorted(calls[2:]) == [[0], [1]]
        prompts = [[i, 3] for i in range(30)]
        outputs = cluster.generate(prompts, max_new_tokens=4)
        assert [output.tokens for output in outputs] == [expected(prompt, 4) for prompt in prompts]
