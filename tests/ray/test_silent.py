"""A replica whose process is stopped (SIGSTOP) and goes on later."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rayk import InferenceSession, PagedKVCacheManager, TextContext
from rayk.actors.replica_calls import QUESTION_SECONDS, SILENT_SECONDS
from rayk.errors import CallTimeoutError

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import chain, contents, params, pid, stamp

SLACK = 5.0  # seconds that a machine under load may take longer


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + SLACK


def test_a_stopped_replica_harms_only_itself_and_comes_back(session: InferenceSession) -> None:
    with PagedKVCacheManager(
        params(), session, 64, max_batch_size=8, enable_runtime_checks=True, replace=False
    ) as manager:
        pids = manager.execute([[], []], pid)
        warm = [TextContext(f"w{r}", [5] * 64, 200) for r in range(2)]  # a prefix that both have
        manager.try_admit(warm, [0, 1])
        manager.execute([[warm[0]], [warm[1]]], stamp)
        for ctx in warm:
            ctx.update(1)
        manager.step([[warm[0]], [warm[1]]])
        used, computed = manager.get_num_used_pages(1), manager.get_metrics_aggregated().input_tokens
        os.kill(pids[1], signal.SIGSTOP)
        try:
            with at_most(QUESTION_SECONDS):
                [admission] = manager.try_admit([TextContext("healthy", [5] * 64 + [1], 200)], [0])
                assert admission.error is None
            with at_most(QUESTION_SECONDS + SILENT_SECONDS):
                [admission] = manager.try_admit([TextContext("late", [9] * 40, 200)], [1])
                assert isinstance(admission.error, CallTimeoutError) and admission.error.target == "replica 1"
            with at_most(0.0):
                assert manager.replica_states() == ["ready", "silent"]
                assert manager.admit([TextContext(f"auto{i}", [20 + i] * 40, 200) for i in range(3)]) == [0, 0, 0]
                assert manager.get_metrics_aggregated().input_tokens == computed // 2 + 1 + 3 * 40
                assert manager.check_integrity() == [1]
        finally:
            os.kill(pids[1], signal.SIGCONT)
        until(lambda: manager.replica_states() == ["ready", "ready"])
        until(lambda: manager.get_num_used_pages(1) == used)
        assert not manager.contains("late", 1) and manager.contains("w1", 1)
        assert contents(manager, "w1", 1, 64) == chain([5] * 64)
        assert manager.check_integrity() == []
        [admission] = manager.try_admit([TextContext("late", [9] * 40, 200)], [1])
        assert admission.error is None
