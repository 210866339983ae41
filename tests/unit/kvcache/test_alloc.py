"""alloc as a transaction: what is reused, where the window goes, what a refusal leaves behind (nothing)."""

import pytest

import rayk
from rayk import InsufficientBlocksError, TextContext
from rayk.errors import BatchError, NotClaimedError

from ..conftest import write_window  # noqa: TID252  # tests/ is no package that has an absolute name


def state(cache, *ctxs: TextContext):
    m = cache.manager
    return (
        [(len(c.tokens), c.tokens.processed, c.tokens.end, c.cached_prefix_length) for c in ctxs],
        [m.get_req_blocks(c.request_id, 0) for c in ctxs],
        m.num_free_blocks(),
        m.get_metrics_aggregated(),
        [m.get_prefix_cache_hit_counts(c) for c in ctxs],
    )


# -- pages and windows -----------------------------------------------------------------------------------


def test_pages_for_all_tokens_and_none_for_the_next(make) -> None:
    cache = make(8)
    ctx = cache.start("a", range(8))
    assert len(cache.manager.get_req_blocks("a", 0)) == 2
    cache.turn(ctx)
    cache.manager.alloc(ctx, 0)
    assert len(cache.manager.get_req_blocks("a", 0)) == 3


def test_the_last_token_is_never_reused(make) -> None:
    cache = make(8)
    cache.serve("old", range(8))
    assert cache.start("same", range(8)).tokens.processed == 4
    assert cache.start("longer", range(9)).tokens.processed == 8


def test_reuse_shows_the_same_pages_and_right_content(make) -> None:
    cache = make(8)
    old = cache.serve("old", range(9), keep=True)
    new = cache.start("new", [*range(8), 50, 51])
    assert (new.tokens.processed, new.cached_prefix_length) == (8, 8)
    pages = [cache.manager.get_req_blocks(c.request_id, 0) for c in (old, new)]
    assert pages[0][:2] == pages[1][:2] and pages[0][2] != pages[1][2]
    assert cache.manager.get_num_used_pages(0) == 4
    cache.turn(new)
    assert cache.wrong_slots(new) == cache.wrong_slots(old) == 0


def test_alloc_again_without_progress_takes_no_page_but_counts_its_input(make) -> None:
    cache = make(8)
    ctx = cache.start("a", range(6))
    before = cache.manager.get_req_blocks("a", 0)
    cache.manager.alloc(ctx, 0)
    assert cache.manager.get_req_blocks("a", 0) == before
    assert cache.manager.get_metrics_aggregated().input_tokens == 12


def test_cached_prefix_length_is_set_at_the_first_admission(make) -> None:
    cache = make(8)
    assert cache.serve("a", range(9)).cached_prefix_length == 0
    ctx = cache.start("b", range(9))
    assert ctx.cached_prefix_length == 8
    cache.turn(ctx)
    ctx.reset()
    assert ctx.cached_prefix_length == 8


@pytest.mark.parametrize("caching", [True, False])
def test_a_prompt_of_one_token_does_not_look(make, caching: bool) -> None:
    cache = make(8, enable_prefix_caching=caching)
    assert cache.start("a", [1]).cached_prefix_length is None


def test_without_prefix_caching_nothing_is_kept(make) -> None:
    cache = make(8, enable_prefix_caching=False)
    ctx = cache.serve("a", range(9))
    assert (cache.hits(range(9)), ctx.cached_prefix_length, cache.manager.num_free_blocks()) == ([0], None, 8)
    assert cache.start("b", range(9)).tokens.processed == 0


def test_metrics_of_a_hit(make) -> None:
    cache = make(8)
    cache.serve("old", range(9))
    cache.manager.reset_metrics()
    cache.start("new", range(10))
    assert cache.manager.get_metrics_aggregated() == rayk.KVCacheMetrics(
        input_tokens=2, cache_tokens=8, device_blocks_served=2
    )
    assert cache.manager.get_metrics_aggregated().cache_hit_rate == 0.8


# -- refusals leave no trace ----------------------------------------------------------------------------


def test_too_few_free_pages(make) -> None:
    cache = make(5)
    cache.serve("shared", range(9), keep=True)  # 3 pages
    ctx = TextContext("new", [*range(8), *range(50, 63)], 99)  # 6 pages, 2 of them hits
    cache.manager.claim("new", 0)
    before = state(cache, ctx)
    with pytest.raises(InsufficientBlocksError) as caught:
        cache.manager.alloc(ctx, 0)
    assert state(cache, ctx) == before
    assert (caught.value.request_id, caught.value.replica) == ("new", 0)
    cache.manager.check_integrity()


def test_a_hit_on_a_free_page_uses_it_up(make) -> None:
    """2 cached pages nobody holds and 1 empty page: a request that hits both has 1 left."""
    cache = make(3)
    cache.serve("old", range(9))
    ctx = TextContext("new", range(13), 99)
    cache.manager.claim("new", 0)
    before = state(cache, ctx)
    with pytest.raises(InsufficientBlocksError, match=r"needs 4 more page.*has 3 in all"):
        cache.manager.alloc(ctx, 0)
    assert state(cache, ctx) == before
    assert cache.hits(range(9)) == [2]


def test_the_eviction_order_survives_a_refused_alloc(make) -> None:
    cache = make(6)
    cache.serve("old", range(9))
    cache.serve("new", range(100, 109))
    cache.serve("blocker", range(200, 204), keep=True)
    ctx = TextContext("big", [*range(8), *range(50, 66)], 99)
    cache.manager.claim("big", 0)
    with pytest.raises(InsufficientBlocksError):
        cache.manager.alloc(ctx, 0)
    cache.start("taker", [7] * 8)
    assert (cache.hits(range(8)), cache.hits(range(100, 108))) == ([1], [2])


def test_a_request_that_can_never_fit_says_so(make) -> None:
    cache = make(4)
    ctx = TextContext("big", range(17), 99)
    cache.manager.claim("big", 0)
    with pytest.raises(InsufficientBlocksError, match=r"'big' needs 5 more page.*4 in all: it can never fit"):
        cache.manager.alloc(ctx, 0)
    ctx = TextContext("drafts", range(14), 99)
    ctx.draft_tokens_to_verify = [0] * 3
    cache.manager.claim("drafts", 0)
    with pytest.raises(InsufficientBlocksError):
        cache.manager.alloc(ctx, 0)


def test_a_refused_decode_keeps_its_pages_and_succeeds_later(make) -> None:
    cache = make(3)
    ctx = cache.start("a", range(8))
    cache.serve("b", [9], keep=True)
    cache.turn(ctx)
    before = state(cache, ctx)
    with pytest.raises(InsufficientBlocksError, match=r"needs 1 more page.*0 of 3 are free"):
        cache.manager.alloc(ctx, 0)
    assert state(cache, ctx) == before
    cache.manager.release("b", 0)
    cache.manager.alloc(ctx, 0)
    cache.turn(ctx)
    assert cache.wrong_slots(ctx) == 0


def test_a_refused_alloc_of_a_stale_window_keeps_the_window(make) -> None:
    cache = make(4)
    ctx = cache.serve("a", range(8))  # processed 8, released without reset()
    cache.start("blocker", range(100, 116))
    cache.manager.claim("a", 0)
    before = state(cache, ctx)
    with pytest.raises(InsufficientBlocksError):
        cache.manager.alloc(ctx, 0)
    assert state(cache, ctx) == before


# -- chunks -------------------------------------------------------------------------------------------------


def test_chunked_prefill(make) -> None:
    cache = make(8)
    ctx = cache.start("a", range(11))
    for processed in (4, 8):
        ctx.tokens.chunk(4)
        cache.turn(ctx)
        assert ctx.tokens.processed == processed
        cache.manager.alloc(ctx, 0)
    cache.turn(ctx)
    assert (len(ctx.tokens), cache.wrong_slots(ctx), cache.hits(range(8))) == (12, 0, [2])


def test_a_chunk_before_alloc_that_the_hit_covers_moves_on(make) -> None:
    cache = make(8)
    cache.serve("old", range(9))
    ctx = TextContext("new", range(14), 99)
    ctx.tokens.chunk(3)
    cache.manager.claim("new", 0)
    cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, ctx.tokens.active_length) == (8, 3)
    for _ in range(2):
        cache.turn(ctx)
        cache.manager.alloc(ctx, 0)
    assert cache.wrong_slots(ctx) == 0 and ctx.tokens.processed == 14


def test_a_covered_chunk_at_the_end_is_what_is_left(make) -> None:
    cache = make(8)
    cache.serve("old", range(13))
    ctx = TextContext("new", range(14), 99)
    ctx.tokens.chunk(5)
    cache.manager.claim("new", 0)
    cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, ctx.tokens.active_length) == (12, 2)


def test_a_chunk_that_reaches_beyond_the_hit_keeps_its_end(make) -> None:
    cache = make(8)
    cache.serve("old", range(5))
    ctx = TextContext("new", range(14), 99)
    ctx.tokens.chunk(7)
    cache.manager.claim("new", 0)
    cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, ctx.tokens.active_length) == (4, 3)


def test_later_chunks_reuse_what_another_request_committed_meanwhile(make) -> None:
    cache = make(12)
    slow, fast = cache.start("slow", range(14)), cache.start("fast", range(14))
    slow.tokens.chunk(2)
    cache.turn(slow)
    cache.turn(fast)
    own = cache.manager.get_req_blocks("slow", 0)
    free = cache.manager.num_free_blocks()
    cache.manager.alloc(slow, 0)
    shared = cache.manager.get_req_blocks("slow", 0)
    assert slow.tokens.processed == 12
    assert shared[:3] == cache.manager.get_req_blocks("fast", 0)[:3] and not set(shared[:3]) & set(own)
    assert cache.manager.num_free_blocks() == free + 3  # its own pages made way
    cache.turn(slow)
    assert cache.wrong_slots(slow) == 0
    assert slow.cached_prefix_length == 0  # that of the first admission


def test_a_hit_behind_the_window_moves_it_back(make) -> None:
    """A request that was forwarded and never stepped: its own pages go, the cached ones count."""
    cache = make(12)
    ctx = cache.start("a", range(14))
    ctx.tokens.chunk(7)
    cache.manager.execute([[ctx]], lambda inputs, batch: None)
    ctx.update(0)
    cache.serve("b", range(5))
    cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, ctx.tokens.end) == (4, 14)
    cache.turn(ctx)
    assert cache.wrong_slots(ctx) == 0


@pytest.mark.parametrize("gone", [True, False])
def test_a_chunk_that_a_hit_moves_back_keeps_its_end(make, gone: bool) -> None:
    """Its own pages are gone, or were never stepped and make way. As in the reference, only the start moves."""
    cache = make(12)
    ctx = cache.start("a", range(14))
    ctx.tokens.chunk(8)
    cache.manager.execute([[ctx]], lambda inputs, batch: None)
    ctx.update(0)
    ctx.tokens.chunk(2)
    if gone:
        cache.manager.release("a", 0)
        cache.manager.claim("a", 0)
    cache.serve("b", range(5))
    cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, ctx.tokens.end) == (4, 10)
    cache.turn(ctx)
    assert cache.wrong_slots(ctx) == 0


# -- sharing on commit ---------------------------------------------------------------------------------------


def test_equal_pages_collapse_into_one_at_commit(make) -> None:
    cache = make(8)
    a, b = cache.start("a", range(9)), cache.start("b", range(9))
    assert cache.manager.num_free_blocks() == 2
    cache.turn(a)
    cache.turn(b)
    assert cache.manager.num_free_blocks() == 4
    pages = [cache.manager.get_req_blocks(c.request_id, 0) for c in (a, b)]
    assert pages[0][:2] == pages[1][:2] and pages[0][2] != pages[1][2]
    assert cache.wrong_slots(a) == cache.wrong_slots(b) == 0


def test_requests_of_one_batch_collapse_too(make) -> None:
    cache = make(8)
    ctxs = [cache.start(name, range(9)) for name in ("a", "b")]
    cache.manager.execute([ctxs], write_window)
    for ctx in ctxs:
        ctx.update(9)
    cache.manager.step([ctxs])
    assert cache.manager.num_free_blocks() == 4


def test_a_commit_in_the_middle_of_what_another_cached(make) -> None:
    cache = make(12)
    long, short = cache.start("long", range(17)), cache.start("short", [*range(8), 70, 71])
    cache.turn(long)
    cache.turn(short)
    pages = [cache.manager.get_req_blocks(c.request_id, 0) for c in (long, short)]
    assert pages[0][:2] == pages[1][:2]
    assert cache.wrong_slots(long) == cache.wrong_slots(short) == 0
    assert cache.hits(range(16)) == [4]


def test_generated_tokens_are_cached_too(make) -> None:
    cache = make(8)
    ctx = cache.start("a", range(5))
    for token in (50, 51, 52, 53):
        cache.turn(ctx, token)
        cache.manager.alloc(ctx, 0)
    assert cache.hits([*range(5), 50, 51, 52]) == [2]


def test_placeholders_are_not_cached_until_they_are_known(make) -> None:
    cache = make(8)
    ctx = cache.start("a", range(4))
    for _ in range(4):
        cache.manager.execute([[ctx]], write_window)
        ctx.update_with_future_token()
        cache.manager.step([[ctx]])
        cache.manager.alloc(ctx, 0)
        ctx.realize_future_token(60)
    assert cache.hits([*range(4), 60, 60, 60, 60]) == [1]
    cache.turn(ctx, 61)
    assert cache.hits([*range(4), 60, 60, 60, 60]) == [2]


def test_step_before_any_forward_commits_nothing(make) -> None:
    cache = make(8)
    ctx = cache.start("a", range(9))
    cache.manager.step([[ctx]])
    assert cache.hits(range(9)) == [0]


def test_step_of_a_request_with_too_few_pages_is_refused_and_commits_nothing(make) -> None:
    cache = make(8)
    good, bad = cache.start("good", range(9)), TextContext("bad", range(9), 99)
    cache.manager.claim("bad", 0)
    for ctx in (good, bad):
        ctx.update(0)
    with pytest.raises(BatchError, match=r"'bad'.*call alloc"):
        cache.manager.step([[good, bad]])
    assert cache.hits(range(9)) == [0]


# -- salts, adapters, other contexts ----------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"cache_salt": "s"}, {"cache_salt": ""}, {"adapter": "lora"}], ids=str)
@pytest.mark.parametrize("replicas", [1, 2])
def test_salts_and_adapters_keep_pages_apart(make, other, replicas: int) -> None:
    cache = make(8, replicas=replicas)
    r = replicas - 1
    cache.serve("plain", range(9))
    assert cache.start("apart", range(9), r, **other).tokens.processed == 0
    cache.turn(ctx := cache.start("first", range(9), r, **other), r=r)
    assert cache.start("same", range(9), r, **other).tokens.processed == 8
    assert cache.wrong_slots(ctx, r) == 0
    assert cache.hits(range(8), **other)[r] == 2


def test_a_salt_cannot_be_changed_behind_the_caches_back() -> None:
    ctx = TextContext("a", [1], 9, "tenant 1")
    with pytest.raises(AttributeError):
        ctx.cache_salt = "tenant 2"  # pages would still be filed under tenant 1


def test_another_context_for_a_claimed_request_must_say_the_same(make) -> None:
    cache = make(8)
    ctx = cache.serve("a", range(9), keep=True)
    copy = ctx.snapshot()
    cache.manager.alloc(copy, 0)
    for other in (TextContext("a", [9] * 12, 99), TextContext("a", ctx.tokens.all, 99, "salt")):
        other.tokens.skip(9)
        with pytest.raises(BatchError, match="release it"):
            cache.manager.alloc(other, 0)


def test_an_unclaimed_request_is_refused(make) -> None:
    cache = make(8, replicas=2)
    ctx = TextContext("a", range(4), 99)
    with pytest.raises(NotClaimedError, match=r"call claim\(\)"):
        cache.manager.alloc(ctx, 0)
    cache.manager.claim("a", 1)
    with pytest.raises(NotClaimedError, match="claimed on replica 1"):
        cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, cache.manager.num_free_blocks()) == (0, 8)


# -- preemption and reuse of a context ------------------------------------------------------------------------


def test_preempted_and_back(make) -> None:
    cache = make(8)
    ctx = cache.serve("a", range(9))
    cache.turn(cache.start("b", range(100, 110)))
    ctx.reset()
    cache.manager.claim("a", 0)
    cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed, ctx.tokens.active_length) == (8, 2)
    cache.turn(ctx)
    assert cache.wrong_slots(ctx) == 0


def test_back_without_reset_is_computed_again(make) -> None:
    cache = make(8)
    ctx = cache.serve("a", range(9))
    cache.manager.reset_prefix_cache()
    cache.manager.claim("a", 0)
    cache.manager.alloc(ctx, 0)
    assert ctx.tokens.processed == 0
    cache.turn(ctx)
    assert cache.wrong_slots(ctx) == 0


# -- the fraction used after an allocation ---------------------------------------------------------------------


def test_the_predicted_fraction_is_what_alloc_then_uses(make) -> None:
    cache = make(8)
    cache.serve("old", range(9))
    for tokens in (range(9), range(100, 105), range(13)):
        ctx = TextContext("new", tokens, 99)
        before = state(cache, ctx)
        predicted = cache.manager.get_pct_used_blocks_after_allocation(ctx, 0)
        assert state(cache, ctx) == before
        cache.manager.claim("new", 0)
        cache.manager.alloc(ctx, 0)
        assert cache.manager.get_num_used_pages(0) / 8 == predicted
        cache.manager.release("new", 0)
    assert cache.manager.get_pct_used_blocks_after_allocation(TextContext("big", range(99), 99), 0) == 1.0
