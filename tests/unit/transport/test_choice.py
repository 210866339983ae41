"""Which kind of line a pair of replicas uses."""

from __future__ import annotations

import pytest

from rayk.params import CUDA_IPC, GROUP, LINES, OBJECT_STORE, SHARED_MEMORY
from rayk.transport.choice import ASSUMED_RATES, Endpoint, choose_line


def station(host: str = "a", *lines: str) -> Endpoint:
    return Endpoint(host, "127.0.0.1", list(lines or (SHARED_MEMORY, GROUP, OBJECT_STORE)), 1 << 20)


GPU = (CUDA_IPC, GROUP, OBJECT_STORE)


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        (station("a", *GPU), station("a", *GPU), CUDA_IPC),
        (station("a"), station("a"), SHARED_MEMORY),
        (station("a"), station("b"), GROUP),
        (station("a", *GPU), station("b", *GPU), GROUP),
        (station("a", *GPU), station("a"), GROUP),
        (station("a", OBJECT_STORE), station("a"), OBJECT_STORE),
    ],
)
def test_the_best_line_that_reaches(source: Endpoint, target: Endpoint, kind: str) -> None:
    assert choose_line(source, target) == kind


def test_a_wanted_line_is_taken_where_it_can_be_used() -> None:
    assert choose_line(station(), station(), OBJECT_STORE) == OBJECT_STORE
    assert choose_line(station(), station(), GROUP) == GROUP
    assert choose_line(station(), station("b"), SHARED_MEMORY) == GROUP
    assert choose_line(station(), station(), CUDA_IPC) == SHARED_MEMORY


def test_broken_lines_fall_back_to_the_object_store_in_the_end() -> None:
    broken: list[str] = []
    seen = []
    for _ in range(4):
        seen.append(choose_line(station(), station(), "auto", broken))
        broken.append(seen[-1])
    assert seen == [SHARED_MEMORY, GROUP, OBJECT_STORE, OBJECT_STORE]
    assert choose_line(station(), station(), GROUP, {GROUP}) == SHARED_MEMORY


def test_every_line_has_a_rate_to_begin_with() -> None:
    assert set(ASSUMED_RATES) == set(LINES)
