"""Which spans are copied, whether they pay, and how a line's speed is estimated."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayk.params import OBJECT_STORE
from rayk.scheduler.transfers.copy_cost import LinkEstimate, Span, copy_spans, profitable_spans
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Endpoint


def test_spans_follow_the_order_that_is_given() -> None:
    resident = [2, 9, 5]
    assert copy_spans(1, resident, 7) == [Span(0, 1, 2), Span(1, 2, 7)]
    assert copy_spans(1, resident, 7, [2, 1, 0]) == [Span(2, 1, 5), Span(1, 5, 7)]
    assert copy_spans(1, resident, 7, [2]) == [Span(2, 1, 5)]
    assert copy_spans(7, resident, 7) == []


def test_without_a_prefill_rate_all_is_copied() -> None:
    links = LinkTable(lambda: 0.0)
    links.joined(2, 1, Endpoint("here", "127.0.0.1", [OBJECT_STORE], 1 << 20))
    for source in (0, 1):
        links.carried(source, 2, OBJECT_STORE, 1, 1e9)
    assert PageTransfers(links, 16).plan(2, [4, 5, 0], 0, 5, None) == [Span(0, 0, 4), Span(1, 4, 5)]


@pytest.mark.parametrize(("seconds", "copied"), [(0.9, True), (1.1, False)])
def test_bytes_over_bandwidth_against_tokens_over_prefill_rate(seconds: float, copied: bool) -> None:
    span = Span(1, 2, 12)  # 10 pages of 16 tokens at 160 tokens/s: a second
    assert bool(profitable_spans([span], lambda _: seconds, 16, 160.0)) is copied


def test_a_slow_span_is_carried_by_a_fast_one_behind_it() -> None:
    slow, fast = Span(0, 0, 1), Span(1, 1, 10)
    cost = {slow: 2.0, fast: 1.0}
    assert profitable_spans([slow, fast], cost.__getitem__, 1, 1.0) == [slow, fast]
    assert profitable_spans([slow], cost.__getitem__, 1, 1.0) == []
    assert profitable_spans([fast, slow], {slow: 2.0, fast: 1.0}.__getitem__, 1, 1.0) == [fast]


@given(
    pages=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    costs=st.lists(st.floats(0, 60), min_size=6, max_size=6),
)
def test_no_other_number_of_leading_spans_saves_more(pages: list[int], costs: list[float]) -> None:
    spans, at = [], 0
    for replica, count in enumerate(pages):
        spans.append(Span(replica, at, at + count))
        at += count
    chosen = profitable_spans(spans, lambda s: costs[s.replica], 1, 1.0)

    def saved(count: int) -> float:
        return sum(s.stop - s.start - costs[s.replica] for s in spans[:count])

    assert chosen == spans[: len(chosen)]
    assert saved(len(chosen)) >= max(saved(n) for n in range(len(spans) + 1)) - 1e-9


def test_a_line_is_what_was_assumed_until_something_was_copied() -> None:
    line = LinkEstimate(0.002, 1e9)
    assert line.seconds(10_000_000) == pytest.approx(0.012)
    line.seen(0, 1.0)
    line.seen(100, 0.0)
    assert line.copies == 0 and line.seconds(0) == pytest.approx(0.002)


@pytest.mark.parametrize(("latency", "bandwidth"), [(50e-6, 200e9), (0.03, 100e6), (1e-3, 2.5e9)])
def test_an_estimate_comes_near_the_truth_from_copies_of_many_sizes(latency: float, bandwidth: float) -> None:
    line, rng = LinkEstimate(2e-3, 1e9), random.Random(3)
    for _ in range(60):
        size = rng.choice([1 << 16, 1 << 21, 1 << 24, 1 << 28])
        line.seen(size, (latency + size / bandwidth) * rng.uniform(0.9, 1.1))
    for size in (1 << 16, 1 << 21, 1 << 24, 1 << 28):
        assert line.seconds(size) == pytest.approx(latency + size / bandwidth, rel=0.2)


def test_copies_of_one_size_tell_what_that_size_takes() -> None:
    line = LinkEstimate(2e-3, 1e9)
    for _ in range(30):
        line.seen(1 << 24, 0.5)
    assert line.seconds(1 << 24) == pytest.approx(0.5, rel=0.05)
    assert line.latency >= 0 and line.bandwidth > 0


def test_a_line_that_gets_slower_is_noticed() -> None:
    line = LinkEstimate(1e-3, 1e9)
    for seconds in [0.02] * 30 + [0.2] * 30:
        line.seen(16 << 20, seconds)
    assert line.seconds(16 << 20) == pytest.approx(0.2, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 1 << 32), st.floats(1e-6, 100)), min_size=1, max_size=40))
def test_whatever_was_seen_an_estimate_makes_sense(copies: list[tuple[int, float]]) -> None:
    line = LinkEstimate(1e-3, 1e9)
    for size, seconds in copies:
        line.seen(size, seconds)
        assert line.latency >= 0 and line.bandwidth > 0
        assert 0 < line.seconds(1 << 20) <= line.seconds(1 << 30)
