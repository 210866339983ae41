"""What the scheduler makes of lines: the best that works, the next one while it rests, and what is to be closed."""

from __future__ import annotations

import logging

import pytest

from rayk.params import GROUP, OBJECT_STORE, SHARED_MEMORY
from rayk.scheduler.transfers.links import REST_SECONDS, LinkTable
from rayk.transport.choice import Endpoint


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def lines(now: list[float]) -> LinkTable:
    made = LinkTable(lambda: now[0])
    for replica in range(3):
        host = "a" if replica < 2 else "b"
        made.joined(replica, 10 + replica, Endpoint(host, "", [SHARED_MEMORY, GROUP, OBJECT_STORE], 1 << 20))
    return made


def test_a_line_that_fails_rests_with_one_warning(
    lines: LinkTable, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    assert [lines.kind(0, 1), lines.kind(0, 2), lines.kind(0, 7)] == [SHARED_MEMORY, GROUP, OBJECT_STORE]
    with caplog.at_level(logging.WARNING):
        lines.failed(0, 1, SHARED_MEMORY, "gone")
        assert [lines.kind(0, 1), lines.kind(1, 0)] == [GROUP, SHARED_MEMORY]
        now[0] += REST_SECONDS
        assert lines.kind(0, 1) == SHARED_MEMORY
        lines.failed(0, 1, SHARED_MEMORY, "gone")
        now[0] += REST_SECONDS
        assert lines.kind(0, 1) == GROUP  # twice as long now
    assert len(caplog.records) == 1 and "using group" in caplog.text


def test_the_quickest_source_is_that_of_the_measured_line(lines: LinkTable) -> None:
    assert lines.quickest([1, 2], 0, 16) == [1, 2]
    for _ in range(20):
        lines.carried(1, 0, SHARED_MEMORY, 16, 5.0)
    assert lines.quickest([1, 2], 0, 16) == [2, 1]
    [state] = lines.table()
    assert (state.source, state.target, state.copies, state.bytes) == (1, 0, 20, 20 * 16 << 20)


def test_who_had_a_line_to_a_replica_that_left_is_told_once(lines: LinkTable) -> None:
    lines.use(0, 1)
    lines.use(2, 1)
    lines.keep({0: 10, 1: 99, 2: 12})  # replica 1 was replaced
    assert 1 not in lines.peers and 0 in lines.peers
    assert lines.peers_to_disconnect() == {0: [1], 2: [1]}
    assert lines.peers_to_disconnect() == {}
