"""What a replica that goes has cached, and what another one keeps: order, room, and nothing evicted for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import TextContext
from rayk.kvcache.evacuation import CachedPrefix, adopt_pages, list_prefixes, spare_pages
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.replica import ReplicaCore

from .test_page_pins import PROMPT, broken, core, direct, right_content, serve


def listed(at: ReplicaCore, skip: int = 0, count: int = 99, size: int = 1 << 20) -> list[tuple[list[int], int]]:
    """Tokens and fresh pages of each prefix."""
    return [(np.frombuffer(p.tokens, np.int32).tolist(), p.fresh) for p in list_prefixes(at, skip, count, size)]


def context(prefix: CachedPrefix) -> TextContext:
    tokens = [*np.frombuffer(prefix.tokens, np.int32).tolist(), 0]
    return TextContext("probe", tokens, len(tokens) + 1, prefix.root[0], adapter=prefix.root[1])


def whole(source: ReplicaCore, target: ReplicaCore, prefix: CachedPrefix) -> list[PageImport]:
    ctx = context(prefix)
    return [direct(source, source.exports.export(ctx, 0, ctx.tokens.length // 2), target)]


def give(source: ReplicaCore, target: ReplicaCore) -> list[int]:
    """What the target keeps of each prefix, coldest first."""
    return [
        adopt_pages(target, context(p), whole(source, target, p))
        for p in reversed(list_prefixes(source, 0, 99, 1 << 20))
    ]


# -- the source ------------------------------------------------------------------------------------------


def test_what_was_released_last_comes_first() -> None:
    at = core(16)
    for first in (1, 2, 3):
        serve(at, f"r{first}", [first] * 5)
    serve(at, "again", [1] * 5)
    assert listed(at) == [([1] * 4, 2), ([3] * 4, 2), ([2] * 4, 2)]
    assert listed(at, skip=1, count=1) == [([3] * 4, 2)]
    assert listed(at, size=33) == [([1] * 4, 2), ([3] * 4, 2)], "32 bytes of tokens"
    assert listed(at, size=1) == [([1] * 4, 2)], "at least one"
    assert listed(at, skip=3) == []


def test_a_shared_part_belongs_to_whoever_used_it_last() -> None:
    at = core(16)
    serve(at, "long", [1, 1, 2, 2, 3, 3, 4])
    serve(at, "other", [1, 1, 5, 5, 6])
    assert listed(at) == [([1, 1, 5, 5], 2), ([1, 1, 2, 2, 3, 3], 2)]
    serve(at, "short", [1, 1, 2, 2, 9])
    assert listed(at) == [([1, 1, 2, 2], 2), ([1, 1, 5, 5], 1), ([1, 1, 2, 2, 3, 3], 1)]


def test_salts_and_adapters_come_along() -> None:
    at = core(16)
    serve(at, "a", [1] * 3, cache_salt="s")
    serve(at, "b", [1] * 3, adapter="x")
    assert [p.root for p in list_prefixes(at, 0, 9, 99)] == [(None, "x"), ("s", None)]


TOKENS = st.lists(st.integers(0, 1), min_size=3, max_size=14)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(prompts=st.lists(TOKENS, min_size=1, max_size=12), pages=st.integers(8, 20), space=st.integers(4, 40))
def test_any_history_is_given_in_order(prompts: list[list[int]], pages: int, space: int) -> None:
    """Every page is fresh once; what is kept is evicted by the target as the source would have done."""
    source, target = core(pages), core(space, replica=1)
    for i, prompt in enumerate(prompts):
        serve(source, f"r{i}", prompt)
    before = listed(source)
    assert sum(fresh for _, fresh in before) == source.usage.cached
    kept = give(source, target)
    assert sum(kept) == target.usage.cached == min(source.usage.cached, target.usage.cached)
    assert spare_pages(target) == 0 or target.usage.cached == source.usage.cached
    assert source.usage.cached == sum(fresh for _, fresh in listed(source)), "exports cost nothing"
    if target.usage.cached == source.usage.cached:
        assert listed(target) == before
    source.check_integrity()


# -- the target ------------------------------------------------------------------------------------------


def test_kept_pages_hold_the_right_content_and_are_no_hits_yet() -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    assert give(source, target) == [3]
    metrics = target.metrics
    assert (metrics.cross_replica_blocks_copied, metrics.cache_tokens, metrics.input_tokens) == (3, 0, 0)
    assert metrics.cross_replica_bytes_copied == 3 * target.params.bytes_per_page
    assert target.usage == (8, 8, 3)
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx)
    assert ctx.tokens.processed == 6 and right_content(target, "new")
    target.reset_metrics()
    assert target.metrics.cross_replica_blocks_copied == 0


def test_what_is_there_is_not_evicted() -> None:
    source, target = core(16), core(8, replica=1)
    for first in (1, 2, 3):
        serve(source, f"r{first}", [first] * 5)
    own = serve(target, "own", [9] * 7)
    assert spare_pages(target) == 5
    assert give(source, target) == [2, 2, 1], "the hottest comes last here, and its first page finds room"
    assert (spare_pages(target), target.metrics.evicted_blocks, target.cached_pages(own)) == (0, 0, 3)
    assert give(source, target) == [0, 0, 0]


def test_some_pages_stay_empty_for_those_who_run() -> None:
    source, target = core(99), core(64, replica=1)
    for first in (1, 2):
        serve(source, f"r{first}", [first] * 81)
    assert spare_pages(target) == 62
    assert give(source, target) == [40, 22]
    assert (target.pool.empty, spare_pages(target)) == (2, 0)


def test_the_last_one_kept_is_evicted_last() -> None:
    source, target = core(16), core(6, replica=1)
    old, new = serve(source, "old", [1] * 5), serve(source, "new", [2] * 5)
    assert give(source, target) == [2, 2]
    target.claim("eater")
    target.alloc(TextContext("eater", [8] * 8, 99))
    assert (target.cached_pages(old), target.cached_pages(new)) == (0, 2)
    target.release("eater")


def test_without_pages_a_prefix_is_only_used_again() -> None:
    at = core(16)
    for first in (1, 2):
        serve(at, f"r{first}", [first] * 5)
    [_, old] = list_prefixes(at, 0, 9, 999)
    assert adopt_pages(at, context(old), ()) == 0
    assert [tokens[0] for tokens, _ in listed(at)] == [1, 2]
    assert adopt_pages(at, TextContext("probe", [7] * 5, 99), ()) == 0
    at.check_integrity()


def test_a_shared_part_is_taken_once() -> None:
    source, target = core(16), core(16, replica=1)
    serve(source, "a", [1] * 6 + [2] * 3)
    serve(source, "b", [1] * 6 + [3] * 3)
    assert give(source, target) == [4, 1]
    assert target.usage.cached == source.usage.cached == 5


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_hash_ends_it(wrong: int) -> None:
    source, target = core(), core(replica=1)
    old = serve(source, "old", PROMPT)
    [prefix] = list_prefixes(source, 0, 9, 999)
    [part] = whole(source, target, prefix)
    hashes = [b"x" * 32 if i == wrong else h for i, h in enumerate(part.hashes)]
    assert adopt_pages(target, context(prefix), [replace(part, hashes=hashes)]) == wrong
    assert target.cached_pages(old) == target.usage.cached == wrong


def test_pages_of_another_seed_or_layout_are_refused() -> None:
    target = core(replica=2)
    for source in (core(head_dim=4), core(kv_hash_seed=b"s" * 32)):
        serve(source, "old", PROMPT)
        assert give(source, target) == [0]
    assert target.pool.empty == 8


def test_a_line_that_breaks_leaves_what_came_before() -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    [prefix] = list_prefixes(source, 0, 9, 999)
    ctx = context(prefix)
    first, rest = (direct(source, source.exports.export(ctx, *span), target) for span in ((0, 1), (1, 3)))
    assert adopt_pages(target, ctx, [first, broken(rest)]) == 1
    assert (target.pool.empty, target.usage.cached) == (7, 1)
    target.check_integrity()


def test_an_error_leaves_nothing_held() -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    serve(target, "part", PROMPT[:3])
    [prefix] = list_prefixes(source, 0, 9, 999)

    def fail(first: int, pages: object) -> None:
        raise ZeroDivisionError

    [part] = whole(source, target, prefix)
    with pytest.raises(ZeroDivisionError):
        adopt_pages(target, context(prefix), [replace(part, fill=fail)])
    assert (target.pool.empty, target.usage) == (7, (8, 8, 1))
    target.check_integrity()
