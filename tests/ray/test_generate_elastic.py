"""Engines that come and go on Ray: placements of their own, hand-overs, and replacements for the dead."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
from ray import cloudpickle

from rayk import InferenceSession
from rayk.cluster import Cluster
from rayk.errors import PlanError, ReplicaRemovedError

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine import fake  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import expected  # noqa: TID252  # as above
from .forwards import running
from .test_generate import SETTINGS, engine_pids, placements, slow_model

cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[slow_model.__module__])


def test_one_joins_and_one_leaves_while_requests_run(session: InferenceSession) -> None:
    groups, others = placements(), engine_pids()
    with Cluster(slow_model, session, **SETTINGS | {"replicas": 1}) as cluster:
        [first] = engine_pids() - others
        cluster.generate([[90, 91]], max_new_tokens=20)
        adding = threading.Thread(target=cluster.add_replicas)
        adding.start()
        while adding.is_alive():
            [output] = cluster.generate([[1, 2]], max_new_tokens=20)
            assert output.tokens == expected([1, 2], 20)
        assert len(placements()) == len(groups) + 2, "it has a placement group of its own"
        asked = [[i, i + 1] for i in range(8)]
        streamed: dict[int, list[int]] = {i: [] for i in range(8)}
        leaving, outputs, gone = None, {}, []
        for update in cluster.stream(asked, max_new_tokens=60):
            streamed[update.index] += update.tokens
            if update.output is not None:
                outputs[update.index] = update.output
            if leaving is None and sum(len(tokens) > 3 for tokens in streamed.values()) > 4:
                leaving = threading.Thread(target=lambda: gone.append(cluster.remove_replica(0)))
                leaving.start()
        assert leaving is not None
        leaving.join(60)
        assert [streamed[i] for i in range(8)] == [expected(p, 60) for p in asked]
        assert all(o.error is None and o.retries == 0 and o.replica == 1 for o in outputs.values())
        assert cluster.replica_states() == ["removed", "ready"] and not running([first])
        [removed] = gone
        assert removed.cached >= removed.taken >= 5, "a conversation of 22 tokens that only it had is here now"
        [again] = cluster.generate([[90, 91, *expected([90, 91], 20)]], max_new_tokens=2)
        assert again.cached.device_tokens == 20 and again.tokens == expected([90, 91], 22)[20:]
        assert len(placements()) == len(groups) + 1
        with pytest.raises(ReplicaRemovedError):
            cluster.stats(0)
    until(lambda: engine_pids() == others and placements() == groups)


@pytest.mark.parametrize(("stop", "seconds"), [(signal.SIGKILL, 10.0), (signal.SIGSTOP, 20.0)])
def test_a_killed_or_hung_replica_is_replaced_in_its_place(
    session: InferenceSession, stop: signal.Signals, seconds: float
) -> None:
    groups, others = placements(), engine_pids()
    with Cluster(slow_model, session, **SETTINGS) as cluster:
        doomed = min(engine_pids() - others)
        handles = cluster.submit_all([[i, i + 1] for i in range(8)], max_new_tokens=200)
        until(lambda: all(len(handle.tokens) > 2 for handle in handles))
        began = time.monotonic()
        os.kill(doomed, stop)
        until(lambda: not running([doomed]))
        until(lambda: cluster.replica_states() == ["ready", "ready"])
        assert time.monotonic() - began < seconds, "most of it is the start of a process on a busy machine"
        assert len(placements()) == len(groups) + 1, "in the bundle of the one before"
        assert [handle.result(60).tokens for handle in handles] == [expected([i, i + 1], 200) for i in range(8)]
        again = cluster.generate([[i, 3] for i in range(20)], max_new_tokens=5)
        assert [output.tokens for output in again] == [expected([i, 3], 5) for i in range(20)]
        assert {output.replica for output in again} == {0, 1} and cluster.replacements() == []
    until(lambda: engine_pids() == others and placements() == groups)


def test_what_finds_no_place_leaves_nothing_behind(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(slow_model, session, **SETTINGS | {"replicas": 1}) as cluster:
        groups, pids = placements(), engine_pids()
        with monkeypatch.context() as greedy:
            greedy.setattr("rayk.actors.launch.SLIVER", 100.0)
            with pytest.raises(PlanError, match="no place for 2 replica"):
                cluster.add_replicas(2, timeout=1)
        until(lambda: placements() == groups)
        assert engine_pids() == pids and cluster.replica_states() == ["ready"]
        assert cluster.generate([[1, 2]], max_new_tokens=3)[0].tokens == expected([1, 2], 3)
