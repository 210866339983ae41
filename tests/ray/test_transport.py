"""Copies between real replicas over each kind of line: both directions at once, either side killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from rayk import InferenceSession, PagedKVCacheManager, ReplicaLostError, TextContext
from rayk import protocol as m
from rayk.errors import RaykError

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import PAGE, chain, contents, params, stamp

PROMPT = 64 * PAGE + 1  # 64 pages that can be copied, and a token
LARGE: dict[str, Any] = {"n_kv_heads": 8, "head_dim": 64, "num_layers": 8}  # pages of half a MiB
SOURCE, TARGET = 0, 1
KILLS = int(os.environ.get("RAYK_KILLS", "1"))  # rounds; each at other moments of a copy


def prompt(number: int) -> list[int]:
    return [number, *range(PROMPT - 1)]


def serve(manager: PagedKVCacheManager, number: int, replica: int) -> int:
    """Compute a prompt on a replica and release it, so that it is cached there; the process that did."""
    ctx = TextContext(f"old-{number}", prompt(number), 10_000)
    [admission] = manager.try_admit([ctx], [replica])
    assert admission.error is None
    batches: list[list[TextContext]] = [[], []]
    batches[replica] = [ctx]
    process: int = manager.execute(batches, stamp_and_tell)[replica]
    ctx.update(1)
    manager.step(batches)
    manager.release(ctx.request_id, replica)
    return process


def stamp_and_tell(inputs: Any, batch: Any) -> int:
    if batch:
        stamp(inputs, batch)
    return os.getpid()


def lines(manager: PagedKVCacheManager) -> list[m.LineState]:
    done: m.Description = manager._calls.scheduler.ask(m.Describe())  # type: ignore[attr-defined]
    return done.lines


@pytest.mark.parametrize("kind", ["group", "shared-memory", "object-store"])
def test_copies_in_both_directions_at_once(session: InferenceSession, kind: str) -> None:
    settings = params(page_transport=kind, **LARGE)
    with PagedKVCacheManager(
        settings, session, 200, enable_runtime_checks=True, max_batch_size=8, replace=False
    ) as manager:
        for turn in range(2):  # the second time over lines that are open
            first, second = 2 * turn, 2 * turn + 1
            serve(manager, first, 0)
            serve(manager, second, 1)
            x, y = TextContext("x", prompt(first), 10_000), TextContext("y", prompt(second), 10_000)
            assert [a.error for a in manager.try_admit([x, y], [1, 0])] == [None, None]
            for ctx, replica in ((x, 1), (y, 0)):
                assert ctx.tokens.processed_length == PROMPT - 1
                expected = chain(ctx.tokens.all.tolist())[: PROMPT - 1]
                assert contents(manager, ctx.request_id, replica, PROMPT - 1) == expected
                manager.release(ctx.request_id, replica)
        assert manager.get_metrics_aggregated().cross_replica_blocks_copied == 4 * 64
        assert [(x.source, x.target, x.kind, x.copies, x.failures) for x in lines(manager)] == [
            (0, 1, kind, 2, 0),
            (1, 0, kind, 2, 0),
        ]
        assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0]


@pytest.mark.parametrize("after", [0.03])
@pytest.mark.parametrize("side", [SOURCE, TARGET])
def test_a_process_that_is_killed_in_a_copy(session: InferenceSession, side: int, after: float) -> None:
    """No torn page is believed, no pin is left, and nobody hangs."""
    for turn in range(KILLS):
        settings = params(page_transport="group", **LARGE)
        with PagedKVCacheManager(
            settings, session, 200, enable_runtime_checks=True, max_batch_size=8, replace=False
        ) as manager:
            pids = {SOURCE: serve(manager, 1, SOURCE), TARGET: serve(manager, 2, TARGET)}
            ctx, done = TextContext("new", prompt(1), 10_000), []

            def admit() -> None:
                try:
                    done.append(manager.try_admit([ctx], [TARGET])[0].error)  # noqa: B023  # called in this turn
                except RaykError as error:
                    done.append(error)  # noqa: B023

            thread = threading.Thread(target=admit, daemon=True)
            moment = time.monotonic() + after * (turn + 1)
            thread.start()
            until(lambda: time.monotonic() > moment)  # noqa: B023
            os.kill(pids[side], signal.SIGKILL)
            thread.join(60)
            assert not thread.is_alive()
            if side == TARGET:
                assert isinstance(done[0], ReplicaLostError) or done[0] is None
                until(lambda: manager.get_num_used_pages(SOURCE) == 0)
                continue
            assert done == [None]
            cached = ctx.tokens.processed_length
            assert cached % PAGE == 0
            if cached:
                assert contents(manager, "new", TARGET, cached) == chain(prompt(1))[:cached]
            manager.release("new", TARGET)
            assert manager.get_num_used_pages(TARGET) == 0
