"""Which kind of line a pair of replicas uses."""

from __future__ import annotations

import pytest

from rayk.params import CUDA_IPC, GROUP, LINES, OBJECT_STORE, SHARED_MEMORY
from rayk.transport.choice import ASSUMED_RATES, Endpoint, choose_line


def endpoint(host: str = "a", *lines: str) -> Endpoint:
    return Endpoint(host, "127.0.0.1", list(lines or (SHARED_MEMORY, GROUP, OBJECT_STORE)), 1 << 20)


GPU = (CUDA_IPC, GROUP, OBJECT_STORE)


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        (endpoint("a", *GPU), endpoint("a", *GPU), CUDA_IPC),
        (endpoint("a"), endpoint("a"), SHARED_MEMORY),
        (endpoint("a"), endpoint("b"), GROUP),
        (endpoint("a", *GPU), endpoint("b", *GPU), GROUP),
        (endpoint("a", *GPU), endpoint("a"), GROUP),
        (endpoint("a", OBJECT_STORE), endpoint("a"), OBJECT_STORE),
    ],
)
def test_the_best_line_that_reaches(source: Endpoint, target: Endpoint, kind: str) -> None:
    assert choose_line(source, target) == kind


def test_a_wanted_line_is_taken_where_it_can_be_used() -> None:
    assert choose_line(endpoint(), endpoint(), OBJECT_STORE) == OBJECT_STORE
    assert choose_line(endpoint(), endpoint(), GROUP) == GROUP
    assert choose_line(endpoint(), endpoint("b"), SHARED_MEMORY) == GROUP
    assert choose_line(endpoint(), endpoint(), CUDA_IPC) == SHARED_MEMORY


def test_broken_lines_fall_back_to_the_object_store_in_the_end() -> None:
    broken: list[str] = []
    seen = []
    for _ in range(4):
        seen.append(choose_line(endpoint(), endpoint(), "auto", broken))
        broken.append(seen[-1])
    assert seen == [SHARED_MEMORY, GROUP, OBJECT_STORE, OBJECT_STORE]
    assert choose_line(endpoint(), endpoint(), GROUP, {GROUP}) == SHARED_MEMORY


def test_every_line_has_a_rate_to_begin_with() -> None:
    assert set(ASSUMED_RATES) == set(LINES)
