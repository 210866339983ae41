"""The window algebra of a context, and what it refuses."""

import numpy as np
import pytest
import torch

from rayk import TextContext
from rayk.context import INT32_MAX, INT32_MIN, PLACEHOLDER
from rayk.errors import TokenError


def window(ctx: TextContext) -> tuple[int, int, int]:
    """Length, processed, active."""
    return len(ctx.tokens), ctx.tokens.processed_length, ctx.tokens.active_length


@pytest.fixture
def ctx() -> TextContext:
    return TextContext("r", [10, 11, 12, 13, 14, 15], 8)


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], np.int64),
        np.array([1, 2, 3], np.uint8),
        torch.tensor([1, 2, 3]),
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_any_flat_sequence_of_ints_is_taken_as_int32(tokens) -> None:
    got = TextContext("r", tokens, 9).tokens.all
    assert got.dtype == np.int32 and got.tolist() == [1, 2, 3]


def test_the_context_has_its_own_copy_of_the_tokens() -> None:
    mine = np.array([1, 2, 3], np.int32)
    ctx = TextContext("r", mine, 9)
    mine[0] = 7
    assert ctx.tokens.all.tolist() == [1, 2, 3]


def test_int32_is_taken_to_its_bounds() -> None:
    ctx = TextContext("r", [INT32_MIN, INT32_MAX], 9)
    ctx.update(INT32_MIN)
    ctx.update(np.int64(INT32_MAX))
    assert ctx.tokens.all.tolist() == [INT32_MIN, INT32_MAX, INT32_MIN, INT32_MAX]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([5, 2**31], "2147483648 at position 1"),
        ([-(2**31) - 1], "-2147483649 at position 0"),
        (np.array([2**63], np.uint64), "9223372036854775808"),
        ([1, 2**70], "ints"),
        ([1.0, 2.0], "float64"),
        ([True, False], "bool"),
        (["a"], "ints"),
        ([[1, 2]], "shape"),
        ([[1], [2, 3]], "ints"),
        (None, "ints"),
        (7, "shape"),
        ([], "at least one token"),
        (list(range(10)), "10 tokens are more than max_length 9"),
    ],
)
def test_other_tokens_are_refused_with_the_request_and_the_numbers(tokens, says: str) -> None:
    with pytest.raises(TokenError, match=says) as caught:
        TextContext("r7", tokens, 9)
    assert isinstance(caught.value, ValueError)
    assert "r7" in str(caught.value)


@pytest.mark.parametrize(
    "token", [1.5, 1.0, np.float32(2), "7", None, [3], 2**31, np.int64(2**40), torch.tensor(2**40)]
)
def test_a_sampled_token_that_is_no_int32_is_refused_and_nothing_moves(token) -> None:
    ctx = TextContext("r", [1, 2], 9)
    with pytest.raises(TokenError, match=r"'r'.*not an int32"):
        ctx.update(token)
    assert window(ctx) == (2, 0, 2)
    ctx.update(torch.tensor(3))
    assert ctx.tokens.all.tolist() == [1, 2, 3]


def test_views_of_the_tokens_cannot_be_written(ctx: TextContext) -> None:
    for view in (ctx.tokens.all, ctx.tokens.active):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1


def test_many_appends_keep_all_tokens() -> None:
    ctx = TextContext("r", [0], 10_000)
    for token in range(1, 1000):
        ctx.update(token)
    assert ctx.tokens.all.tolist() == list(range(1000))
    assert window(ctx) == (1000, 999, 1)


@pytest.mark.parametrize("pending", [-1, 3])
def test_placeholders_must_be_among_the_tokens(pending: int) -> None:
    with pytest.raises(TokenError, match=f"pending_future_count {pending} of 2"):
        TextContext("r", [1, 2], 9, pending_future_count=pending)


@pytest.mark.parametrize("name", ["cache_salt", "adapter"])
def test_what_keeps_pages_apart_is_text(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TextContext("r", [1], 9, **{name: 7})


# -- the window ------------------------------------------------------------------------------------


def test_update_processes_the_window_and_appends(ctx: TextContext) -> None:
    assert window(ctx) == (6, 0, 6)
    ctx.update(16)
    assert window(ctx) == (7, 6, 1)
    assert ctx.tokens.active.tolist() == [16]


def test_update_after_chunk_consumes_the_chunk_and_ignores_the_token(ctx: TextContext) -> None:
    ctx.tokens.chunk(4)
    assert (window(ctx), ctx.tokens.active.tolist()) == ((6, 0, 4), [10, 11, 12, 13])
    ctx.update(99)
    assert (window(ctx), ctx.tokens.active.tolist()) == ((6, 4, 2), [14, 15])
    ctx.update(16)
    assert window(ctx) == (7, 6, 1)
    assert ctx.tokens.all.tolist() == [10, 11, 12, 13, 14, 15, 16]


def test_a_chunk_can_be_chunked(ctx: TextContext) -> None:
    ctx.tokens.chunk(4)
    ctx.tokens.chunk(2)
    assert window(ctx) == (6, 0, 2)
    with pytest.raises(TokenError, match=r"chunk\(2\) needs 1 <= n < 2"):
        ctx.tokens.chunk(2)


@pytest.mark.parametrize("n", [-1, 0, 6, 7])
def test_chunk_leaves_something_out(ctx: TextContext, n: int) -> None:
    with pytest.raises(TokenError, match="6 active"):
        ctx.tokens.chunk(n)
    assert window(ctx) == (6, 0, 6)


def test_skip_and_rewind(ctx: TextContext) -> None:
    ctx.tokens.skip(5)
    assert window(ctx) == (6, 5, 1)
    for n in (-1, 1):
        with pytest.raises(TokenError, match="skip"):
            ctx.tokens.skip(n)
    ctx.tokens.rewind(3)
    assert window(ctx) == (6, 2, 4)
    for n in (-1, 3):
        with pytest.raises(TokenError, match="rewind"):
            ctx.tokens.rewind(n)
    assert window(ctx) == (6, 2, 4)


def test_max_length_ends_a_request_and_says_so(ctx: TextContext) -> None:
    ctx.update(16)
    ctx.update(17)
    with pytest.raises(TokenError, match="max_length of 8"):
        ctx.update(18)
    assert window(ctx) == (8, 7, 1)


def test_reset_makes_all_tokens_the_prompt_and_drops_drafts(ctx: TextContext) -> None:
    ctx.update(16)
    ctx.cached_prefix_length = 4
    ctx.draft_tokens_to_verify, ctx.maybe_accepted_draft_tokens = [1, 2], [3]
    ctx.reset()
    assert window(ctx) == (7, 0, 7)
    assert (len(ctx.draft_tokens_to_verify), len(ctx.maybe_accepted_draft_tokens)) == (0, 0)
    assert ctx.cached_prefix_length == 4


def test_reset_ends_a_chunk(ctx: TextContext) -> None:
    ctx.tokens.chunk(2)
    ctx.reset()
    assert window(ctx) == (6, 0, 6)


# -- placeholders ------------------------------------------------------------------------------------


def test_placeholders_are_filled_in_oldest_first(ctx: TextContext) -> None:
    ctx.update_with_future_token()
    ctx.update_with_future_token()
    assert (window(ctx), ctx.pending_future_count) == ((8, 7, 1), 2)
    assert ctx.tokens.all[6:].tolist() == [PLACEHOLDER, PLACEHOLDER]
    ctx.realize_future_token(16)
    ctx.realize_future_token(17)
    assert (ctx.tokens.all[6:].tolist(), ctx.pending_future_count) == ([16, 17], 0)
    with pytest.raises(TokenError, match="no placeholder"):
        ctx.realize_future_token(18)


def test_a_consumed_chunk_leaves_no_placeholder(ctx: TextContext) -> None:
    ctx.tokens.chunk(4)
    ctx.update_with_future_token()
    assert (window(ctx), ctx.pending_future_count) == ((6, 4, 2), 0)


def test_a_bad_token_does_not_use_up_a_placeholder(ctx: TextContext) -> None:
    ctx.update_with_future_token()
    with pytest.raises(TokenError):
        ctx.realize_future_token(2**31)
    assert ctx.pending_future_count == 1


# -- snapshots ---------------------------------------------------------------------------------------


def test_a_snapshot_stays_as_it_was(ctx: TextContext) -> None:
    copy = ctx.snapshot()
    assert all(getattr(copy, name) == getattr(ctx, name) for name in TextContext.__slots__ if name != "tokens")
    for token in range(2):
        ctx.update(token)
    assert (window(copy), copy.request_id, copy.max_length) == ((6, 0, 6), "r", 8)
    with pytest.raises(ValueError, match="read-only"):
        copy.tokens.all[0] = 1
