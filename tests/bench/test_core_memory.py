"""Memory beside the pages: what the slopes leave out, and that they see what is kept."""

import pytest

from rayk.bench.core import one_off
from rayk.bench.core.clock import Unit
from rayk.bench.core.memory import (
    Memory,
    bytes_per_cached_page,
    bytes_per_index_entry,
    bytes_per_running_request,
    slowdown,
    traced,
)


def test_what_is_left_allocated_is_seen() -> None:
    kept, made = traced(lambda: bytearray(1 << 20))
    assert 1 << 20 <= kept < (1 << 20) + 100_000 and len(made) == 1 << 20
    assert traced(lambda: len(bytearray(1 << 20)))[0] < 100_000


def test_a_cached_page_keeps_its_tokens_and_little_else() -> None:
    bytes_per_cached_page(1, 16)  # imports
    together, alone = bytes_per_cached_page(32, 1024), bytes_per_cached_page(1024, 16)
    assert 64 < together < 96 < alone < 640


def test_a_running_request_has_a_row_and_an_object() -> None:
    bytes_per_cached_page(1, 16)  # imports
    running = bytes_per_running_request(256, bytes_per_cached_page(128, 1024))
    assert 128 * 4 < running < 1536  # a row of 128 pages, as the table doubled its width at page 65


def test_an_index_keeps_a_key_and_a_place_for_each_entry() -> None:
    entry = bytes_per_index_entry(8, 20_000)
    assert 32 + 16 < entry < 200  # an int and its place in a dict, at least


def test_slowdown_is_a_ratio_of_medians_after_a_warm_up() -> None:
    first = iter([1000.0, 1, 1, 1, 2, 9])
    second = iter([1.0, 3, 3, 3, 3, 1000])
    assert slowdown([lambda: next(first), lambda: next(second)]) == 3.0


def test_figures_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Memory(
        cached_page=80.0,
        page_alone=700.0,
        running_request=900.0,
        index_entry=120.0,
        pages=1_000_000,
        tokens=16_000_000,
        running=10_000,
        beyond_bytes=92_000_000,
        request_slowdown=1.1,
        step_slowdown=1.2,
    )
    monkeypatch.setattr(one_off, "measure_memory", lambda: found)
    figures = {figure.key: figure for figure in one_off.memory_figures(Unit(), 1, lambda _: None)}
    assert figures["page-bytes"].ok and not figures["lone-page-bytes"].ok and figures["full-memory"].value == 92.0
    assert "16M tokens, 10,000 running" in figures["full-memory"].title
