"""The page tree calls pages equal exactly when the tokens up to their end are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rayk.simulate.paths import Paths, build_paths, merged, page_values
from rayk.workloads.request import run_tokens


def pages_of(paths: Paths, request: int) -> list[int]:
    """The page numbers of a request's whole path."""
    return [page for s in paths.path[request] for page in range(paths.first[s], paths.first[s] + paths.size[s])]


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("seed", range(4))
def test_pages_are_equal_when_the_tokens_are(
    tangled: Callable[..., Any], page_texts: Callable[..., Any], seed: int, page_size: int
) -> None:
    requests = tangled(seed, 80)
    paths = build_paths(requests, page_size)
    number: dict[bytes, int] = {}
    for request in requests:
        texts, reusable = page_texts(request, page_size)
        pages = pages_of(paths, request.index)
        assert len(pages) == len(texts) == paths.length[request.index]
        assert paths.keys(request.index) == pages[:reusable]
        for text, page in zip(texts, pages, strict=True):
            assert number.setdefault(text, page) == page
    assert sorted(number.values()) == list(range(paths.pages))


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_a_tree_of_which_requests_use_whole_segments(tangled: Callable[..., Any], seed: int) -> None:
    paths = build_paths(tangled(seed, 60), 2)
    assert sum(paths.size) == paths.pages and min(paths.size) >= 1
    assert all(parent < s for s, parent in enumerate(paths.parent))
    for path in paths.path:
        assert [paths.parent[s] for s in path] == [-1, *path][: len(path)]


def test_equal_tokens_are_equal_runs() -> None:
    runs = np.array([[5, 2], [7, 3], [-4, 2], [-6, 1], [-7, 2], [-1, 1], [0, 1], [9, 1], [9, 1]], np.int64)
    whole = merged(runs)
    assert whole.tolist() == [[5, 5], [-4, 5], [-1, 1], [0, 1], [9, 1], [9, 1]]
    assert np.array_equal(run_tokens(whole), run_tokens(runs))


def test_where_a_page_begins_matters() -> None:
    one, two = np.array([[0, 8]], np.int64), np.array([[90, 1], [0, 7]], np.int64)
    values = [*page_values(one, 2, 4).tolist(), *page_values(two, 2, 4).tolist()]
    assert len(set(values)) == 8
    again = np.array([[0, 2], [0, 2], [0, 2]], np.int64)
    assert len(set(page_values(again, 2, 3).tolist())) == 3


def test_short_requests_have_no_pages(made: Callable[..., Any]) -> None:
    paths = build_paths(made([[(0, 3)], [(0, 4)]], outputs=1), 4)
    assert paths.path == [[], [0]] and paths.prompt_segments == [0, 0] and paths.keys(1) == []
    assert build_paths([], 4).pages == 0
