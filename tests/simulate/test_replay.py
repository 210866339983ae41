"""The LRU model by hand, and the replay of a run's events."""

import numpy as np
import pytest

from rayk.simulate.replay import Event, Keys, PageLru, replay
from rayk.workloads.request import BenchRequest


def test_hits_are_leading_pages_and_are_pinned() -> None:
    lru = PageLru(6)
    assert lru.admit(0, [1, 2], pages=3) == 0
    lru.commit(0, [1, 2])
    assert lru.admit(1, [1, 9, 2], pages=3) == 1
    lru.check_integrity()
    lru.release(0)
    assert lru.admit(2, [1, 2], pages=2) == 2
    assert lru.pinned == {1: 2, 2: 1} and not lru.evictable
    lru.check_integrity()


def test_deepest_page_of_the_oldest_release_goes_first() -> None:
    lru = PageLru(4)
    for request, keys in enumerate([[1, 2], [3, 4]]):
        lru.admit(request, keys, pages=2)
        lru.commit(request, keys)
        lru.release(request)
    assert list(lru.evictable) == [2, 1, 4, 3]
    assert lru.admit(5, [7], pages=1) == 0
    assert list(lru.evictable) == [1, 4, 3]
    assert lru.admit(6, [1], pages=1) == 1  # a hit leaves the order and comes back at its end
    lru.release(6)
    assert list(lru.evictable) == [4, 3, 1]
    lru.check_integrity()


def test_pages_without_a_key_become_empty_and_are_taken_first() -> None:
    lru = PageLru(4)
    lru.admit(0, [1, 2, 3], pages=4)
    lru.commit(0, [1, 2])
    lru.release(0)
    assert lru.private == 0 and list(lru.evictable) == [2, 1]
    lru.admit(1, [8], pages=2)
    assert list(lru.evictable) == [2, 1]


def test_a_refusal_changes_nothing() -> None:
    lru = PageLru(4)
    lru.admit(0, [1, 2], pages=2)
    lru.commit(0, [1, 2])
    lru.release(0)
    lru.admit(1, [5], pages=2)
    assert lru.admit(2, [1, 2, 3], pages=3) is None  # its two hits are what it would have to evict
    assert not lru.grow(1, 5)
    assert list(lru.evictable) == [2, 1] and lru.private == 2
    assert lru.grow(1, 4) and not lru.evictable
    lru.check_integrity()


def test_equal_pages_collapse_on_commit() -> None:
    lru = PageLru(4)
    lru.admit(0, [1], pages=2)
    lru.admit(1, [1], pages=2)
    lru.commit(0, [1])
    lru.commit(1, [1])
    assert lru.pinned == {1: 2} and lru.private == 2
    lru.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_keeps_the_counts_true(seed: int) -> None:
    random = np.random.default_rng(seed)
    lru, live = PageLru(20), {}
    for request in range(400):
        if live and random.random() < 0.5:
            lru.release(live.popitem()[0])
        keys = [int(random.integers(3)) * 100 + depth for depth in range(int(random.integers(1, 7)))]
        if lru.admit(request, keys[:-1], len(keys)) is not None:
            live[request] = keys
            if random.random() < 0.7:
                lru.commit(request, keys)
            if random.random() < 0.3:
                lru.grow(request, len(keys) + 1)
        lru.check_integrity()


def _request(index: int, runs: list[list[int]], output: int, output_first: int) -> BenchRequest:
    prompt = sum(count for _, count in runs)
    return BenchRequest(index, f"r{index}", 0.0, None, prompt, output, np.array(runs, np.int64), output_first)


def test_replay_counts_each_request_once_and_keeps_generated_pages() -> None:
    requests = [
        _request(0, [[0, 8]], 5, -2),
        _request(1, [[0, 8], [-2, 5], [50, 3]], 2, -20),  # quotes the answer of request 0
    ]
    events = [
        Event("admit", 0, 8),
        Event("commit", 0, 8),
        Event("grow", 0, 9),
        Event("release", 0, 10),  # preempted
        Event("admit", 0, 10),
        Event("release", 0, 12),
        Event("admit", 1, 16),
        Event("release", 1, 17),
    ]
    out = replay(events, requests, page_size=4, capacity=None)
    assert (out.prompt, out.cached) == ([8, 16], [0, 12])
    assert out.hit_rate == pytest.approx(12 / 24)
    assert replay(events, requests, page_size=4, capacity=3).cached == [0, 0]  # request 1 does not fit at all
    assert replay([], requests, page_size=4, capacity=3).hit_rate is None


def test_the_last_token_of_a_prompt_is_never_a_hit() -> None:
    requests = [_request(i, [[0, 8]], 1, -2 - i) for i in range(2)]
    events = [Event("admit", 0, 8), Event("release", 0, 8), Event("admit", 1, 8), Event("release", 1, 8)]
    assert replay(events, requests, page_size=4, capacity=8).cached == [0, 4]


def test_keys_are_those_of_full_pages() -> None:
    keys = Keys([_request(0, [[0, 8]], 5, -2)], page_size=4)
    assert [len(keys.of(0, n)) for n in (3, 4, 11, 13)] == [0, 1, 2, 3]
    keys.drop(0)
    assert len(keys.of(0, 8)) == 2
