"""The benchmark of the server runs, and says what it measured."""

from __future__ import annotations

from rayk.bench.flags import ServeBenchFlags
from rayk.bench.serve import measure


def test_both_stream_the_same_bytes() -> None:
    rates = measure(ServeBenchFlags(streams=4, tokens=40, rounds=1))
    assert rates.tokens_per_core_s > 0 and rates.bare_tokens_per_core_s > 0
    assert 1 <= rates.chunks <= 43 and rates.ttfb_p50 > 0 and rates.rss_bytes > 1 << 20
