"""Placing by policy, from loads of one's own and pages that engines report."""

from __future__ import annotations

import numpy as np

from rayk.kvcache.page_hash import PageHasher
from rayk.scheduler.router.steering import Steering

PAGE = 4
HASHER = PageHasher("xxh3_128", b"s" * 32, PAGE)


def steering(router: str = "cost", replicas: int = 2, limit: int = 10, pages: bool = True) -> Steering:
    return Steering(router, PAGE, [1000] * replicas, limit, HASHER if pages else None)


def prompt(first: int, length: int = 41) -> np.ndarray:
    return np.arange(first, first + length, dtype=np.int32)


def test_keys_are_those_of_the_pages_that_may_be_reused() -> None:
    steer, hashes = steering(), HASHER.chain(HASHER.root((None, None)), prompt(0).tobytes())
    assert steer.keys(prompt(0), None) == [int.from_bytes(each[:8], "little") for each in hashes]
    assert len(steer.keys(prompt(0, 40), None)) == 9, "the last token is always computed"
    assert steer.keys(prompt(0), "salt") != steer.keys(prompt(0), None)
    assert steer.keys(prompt(0, 3), None) == [] and steering(pages=False).keys(prompt(0), None) == []


def test_a_burst_of_one_prefix_stays_together_and_others_spread() -> None:
    steer = steering()
    keys = steer.keys(prompt(0), None)
    home = steer.place(1, 41, keys, None)
    other = steer.place(2, 41, steer.keys(prompt(500), None), None)
    assert {home, other} == {0, 1}
    assert steer.place(3, 41, keys, None) == home, "it is promised there"


def test_what_was_only_promised_is_forgotten() -> None:
    steer = steering()
    keys = steer.keys(prompt(0), None)
    home = steer.place(1, 41, keys, None)
    steer.remove(1)
    steer.remove(1)
    assert not steer._index.reach(keys).device.any()
    steer.hear(home, [(True, b"".join(key.to_bytes(8, "little") for key in keys))])
    assert steer._index.reach(keys).device[home] == len(keys)
    steer.hear(home, [(False, keys[-1].to_bytes(8, "little"))])
    assert steer._index.reach(keys).device[home] == len(keys) - 1
    assert not steer._fleet.requests.any() and not steer._fleet.prefill_backlog.any() and not steer._fleet.held.any()


def test_replicas_that_are_full_or_lost_get_nothing() -> None:
    steer = steering("round-robin", replicas=2, limit=2)
    placed = [steer.place(i, 10, [], None) for i in range(4)]
    assert sorted(placed) == [0, 0, 1, 1] and steer.place(9, 10, [], None) == -1
    steer.lose(1)
    assert steer.place(9, 10, [], None) == -1
    for number, replica in enumerate(placed):
        if replica == 1:
            steer.remove(number)  # it is gone already
    steer.remove(placed.index(0))
    assert steer.place(9, 10, [], None) == 0 and steer.place(10, 10, [], None) == -1


def test_prefilled_tokens_do_not_count_as_work() -> None:
    steer = steering("cost")
    assert [steer.place(i, 100 + i, [], None) for i in range(2)] == [0, 1]
    for number in (1, 1, 77):
        steer.prefilled(number)
    assert steer._fleet.prefill_backlog.tolist() == [100, 0] and steer.place(2, 10, [], None) == 1


def test_least_loaded_counts_what_is_placed() -> None:
    steer = steering("least-loaded")
    assert [steer.place(i, 10, [], None) for i in range(2)] == [0, 1]
    for number in range(2):
        steer.prefilled(number)
    assert [steer.place(i, 10, [], None) for i in (2, 3)] == [0, 1], "requests that decode are load"
    steer.remove(1)
    assert steer.place(4, 10, [], None) == 1
