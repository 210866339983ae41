"""What a decode iteration puts on the wire: one message a replica, and a few bytes a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from rayk import PagedKVCacheManager
from rayk.actors.channel import Traffic
from rayk.bench.core.cache import make_contexts, random_prompts
from rayk.bench.core.ray_path import iterate
from rayk.context import TextContext
from rayk.manager.calls import Calls

from ..actors.fake import FakeRuntime, manager_on  # noqa: TID252  # tests/ is no package that has an absolute name

BATCH = 32
SENT, RECEIVED = 40, 8  # bytes a request and step, all in all, for ids of 8 characters; 4 of each are a token

Lanes = list[list[TextContext]]


def test_lines_count_what_they_carry() -> None:
    with manager_on(runtime := FakeRuntime(), replicas=2) as manager:
        backend = calls_of(manager)
        before = backend.traffic()
        seen = len(runtime.sent())
        assert manager.num_free_blocks(1) == 16
        (zero, one, scheduler), old = backend.traffic(), before
        assert (zero, scheduler) == (old[0], old[2])  # nobody else was asked
        assert one.calls == old[1].calls + 1 and one.sent > old[1].sent and one.received > old[1].received
        assert [to for to, _ in runtime.sent()[seen:]] == ["replica-1"]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_iteration_is_one_message_to_each_replica(replicas: int) -> None:
    with running(replicas) as (runtime, manager, lanes):
        for _ in range(3):
            with runtime.watch() as messages:
                iterate(manager, lanes)
            assert messages == [(f"replica-{r}", "RunTick") for r in range(replicas)]


@pytest.mark.parametrize("length", [64, 512])
def test_bytes_of_an_iteration_are_few_and_do_not_grow_with_its_requests(length: int) -> None:
    with running(2, length) as (_, manager, lanes):
        iterate(manager, lanes)  # commits the pages of the prompts
        costs = [one_iteration(manager, lanes) for _ in range(40)]  # each request goes on to ten new pages
    rows = 2 * BATCH
    assert costs == [costs[0]] * 40
    assert costs[0].calls == 2 and costs[0].sent <= rows * SENT and costs[0].received <= rows * RECEIVED


def calls_of(manager: PagedKVCacheManager) -> Calls:
    calls = manager._calls
    assert isinstance(calls, Calls)
    return calls


@contextmanager
def running(replicas: int, length: int = 64) -> Iterator[tuple[FakeRuntime, PagedKVCacheManager, Lanes]]:
    """A manager on a fake cluster whose replicas decode BATCH requests each, of `length` tokens and one."""
    runtime = FakeRuntime()
    with manager_on(runtime, replicas, pages=BATCH * (length // 4 + 20), max_batch_size=BATCH) as manager:
        lanes = [make_contexts(random_prompts(BATCH, length, seed=r), f"lane{r}-") for r in range(replicas)]
        everybody = [ctx for lane in lanes for ctx in lane]
        manager.try_admit(everybody, [r for r, lane in enumerate(lanes) for _ in lane])
        for ctx in everybody:
            ctx.update(1)
        yield runtime, manager, lanes


def one_iteration(manager: PagedKVCacheManager, lanes: Lanes) -> Traffic:
    """What one iteration put on all lines together."""
    before = np.array(calls_of(manager).traffic())
    iterate(manager, lanes)
    return Traffic(*(np.array(calls_of(manager).traffic()) - before).sum(axis=0).tolist())
