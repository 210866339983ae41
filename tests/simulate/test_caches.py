"""Caches by segments against caches of single pages, written the plain way."""

from collections.abc import Callable
from typing import Any

import pytest

from rayk.simulate.caches import BeladyCache, LruCache, next_uses
from rayk.simulate.paths import Paths, build_paths


class PlainCache:
    """Pages one by one. `worth` says how dear a page is now; the least dear leaf goes first, never one in use."""

    def __init__(self, paths: Paths, capacity: int | None, worth: Callable[[dict[int, int], int, int], Any]) -> None:
        self.paths, self.capacity, self.worth = paths, capacity, worth
        self.depth: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.tick = 0

    def serve(self, request: int) -> int:
        self.tick += 1
        keys = self.paths.keys(request)
        hits = next((i for i, key in enumerate(keys) if key not in self.used), len(keys))
        path = [
            page
            for s in self.paths.path[request]
            for page in range(self.paths.first[s], self.paths.first[s] + self.paths.size[s])
        ]
        cached = next((i for i, page in enumerate(path) if page not in self.used), len(path))
        for page in path[:cached]:
            self.used[page] = self.tick
        for depth, page in list(enumerate(path))[cached:]:
            if self.capacity is not None and len(self.used) >= self.capacity:
                idle = [p for p, tick in self.used.items() if tick != self.tick]
                if not idle:
                    break
                del self.used[min(idle, key=lambda p: self.worth(self.used, p, self.depth[p]))]
            self.used[page], self.depth[page] = self.tick, depth
        return hits


@pytest.mark.parametrize("capacity", [1, 7, 20, 60, None])
@pytest.mark.parametrize("seed", range(3))
def test_lru_is_the_least_recent_deepest_page(tangled: Callable[..., Any], seed: int, capacity: int | None) -> None:
    paths = build_paths(tangled(seed, 120), 3)
    plain = PlainCache(paths, capacity, lambda used, page, depth: (used[page], -depth))
    held: set[int] = set()

    def stored(first: int, count: int) -> None:
        assert not held & set(range(first, first + count))
        held.update(range(first, first + count))

    def removed(first: int, count: int) -> None:
        assert held >= set(range(first, first + count))
        held.difference_update(range(first, first + count))

    cache = LruCache(paths, capacity, stored, removed)
    for request in range(120):
        assert cache.serve(request) == plain.serve(request)
        assert held == plain.used.keys()


@pytest.mark.parametrize("capacity", [7, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_belady_drops_what_is_needed_last(tangled: Callable[..., Any], seed: int, capacity: int) -> None:
    requests = tangled(seed, 120)
    paths = build_paths(requests, 3)
    order = list(range(120))
    uses = {key: [i for i in order if key in paths.keys(i)] for key in range(paths.pages)}

    def worth(used: dict[int, int], page: int, depth: int) -> Any:
        return (-next((i for i in uses[page] if i >= plain.tick), 120), -depth, -page)

    plain = PlainCache(paths, capacity, worth)
    cache = BeladyCache(paths, capacity, next_uses(paths, order, [0] * 120))
    lru = LruCache(paths, capacity)
    found = [cache.serve(i) for i in order]
    assert sum(found) == sum(plain.serve(i) for i in order)
    assert sum(found) >= sum(lru.serve(i) for i in order)


def test_next_uses_are_those_of_the_same_cache(made: Callable[..., Any]) -> None:
    paths = build_paths(made([[(0, 5)], [(100, 5)], [(0, 5)], [(0, 5)]], outputs=1), 4)
    assert next_uses(paths, [0, 1, 2, 3], [0, 0, 0, 0]) == [[2], [4], [3], [4]]
    assert next_uses(paths, [0, 1, 2, 3], [0, 1, 1, 0]) == [[3], [4], [4], [4]]


def test_a_prompt_larger_than_the_cache_is_kept_as_far_as_it_fits(made: Callable[..., Any]) -> None:
    requests = made([[(0, 41)], [(0, 41)], [(500, 9)], [(0, 41)]], outputs=1)
    for kind in (LruCache, BeladyCache):
        paths = build_paths(requests, 4)
        more = (next_uses(paths, [0, 1, 2, 3], [0] * 4),) if kind is BeladyCache else ()
        cache = kind(paths, 6, *more)  # type: ignore[operator]
        assert [cache.serve(i) for i in range(4)][:3] == [0, 6, 0]
