"""ContextBatch: contexts in and out of the arena. tests/property/test_batch.py compares what the cache makes of it."""

import numpy as np
import pytest

from rayk import ContextBatch, TextContext
from rayk.errors import BatchError, InsufficientBlocksError, NotClaimedError, TokenError


def contexts(*lengths: int, limit: int = 10_000) -> list[TextContext]:
    return [TextContext(f"r{i}", range(i, i + n), limit) for i, n in enumerate(lengths)]


def decoding(*lengths: int, limit: int = 10_000) -> list[TextContext]:
    made = contexts(*lengths, limit=limit)
    for ctx in made:
        ctx.tokens.skip(ctx.tokens.active_length - 1)
    return made


def test_the_window_of_a_context_is_the_same_object_in_and_out_of_a_batch() -> None:
    [ctx] = contexts(3)
    window = ctx.tokens
    batch = ContextBatch([ctx])
    assert ctx.tokens is window and ctx in batch and batch[0] is ctx and list(batch) == [ctx]
    batch.update([7])
    assert batch.remove("r0") is ctx and ctx.tokens is window and ctx not in batch and not batch
    assert (window.all.tolist(), window.processed_length, window.active_length) == ([0, 1, 2, 7], 3, 1)
    window.append(8)
    assert ctx.tokens.all.tolist() == [0, 1, 2, 7, 8]


def test_update_over_many_steps_keeps_all_tokens_apart() -> None:
    batch = ContextBatch(decoding(1, 700, 30))
    for step in range(3000):
        batch.update(np.array([step, -step, 2 * step], np.int32))
    for ctx, start, sign in zip(batch, (1, 700, 30), (1, -1, 2), strict=True):
        assert ctx.tokens.all[start:].tolist() == [sign * step for step in range(3000)]
        assert (ctx.tokens.processed, ctx.tokens.end) == (start + 2999, start + 3000)
    assert batch.lengths.tolist() == [3001, 3700, 3030]
    assert len(batch._tokens) < 8 * 3 * 3700  # places that were left are used again


def test_removing_moves_the_last_context_into_the_gap() -> None:
    batch = ContextBatch(contexts(2, 3, 4))
    batch.remove("r0")
    assert [c.request_id for c in batch] == ["r2", "r1"]
    assert batch.position("r2") == 0 and batch.lengths.tolist() == [4, 3]
    assert batch[0].tokens.all.tolist() == [2, 3, 4, 5]
    batch[0].tokens.append(9)
    assert batch[0].tokens.all.tolist() == [2, 3, 4, 5, 9] and batch[1].tokens.all.tolist() == [1, 2, 3]


def test_a_batch_with_a_chunk_updates_each_by_its_own_rule() -> None:
    batch = ContextBatch(decoding(3, 8))
    batch[1].tokens.rewind(7)
    batch[1].tokens.chunk(2)
    batch.update([5, 6])
    assert batch[0].tokens.all.tolist() == [0, 1, 2, 5]
    assert len(batch[1].tokens) == 8 and (batch[1].tokens.processed, batch[1].tokens.end) == (2, 8)
    assert not batch.decoding


def test_placeholders_and_drafts_make_a_context_no_plain_decode() -> None:
    batch = ContextBatch(decoding(3, 4))
    assert batch.decoding
    batch[0].update_with_future_token()
    assert not batch.decoding
    batch[0].realize_future_token(5)
    batch[1].update(5)
    assert batch.decoding
    batch[1].draft_tokens_to_verify = []
    assert not batch.decoding  # the list may be filled at any time
    batch[1].reset()
    batch[1].tokens.skip(4)
    assert batch.decoding


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [[1, 2]], [1.5, 2], [2**31, 0]])
def test_update_refuses_what_is_not_a_token_for_each(tokens) -> None:
    batch = ContextBatch(decoding(3, 4))
    with pytest.raises(TokenError):
        batch.update(tokens)
    assert batch.lengths.tolist() == [3, 4]


@pytest.mark.parametrize("chunked", [False, True])
def test_update_names_the_request_that_is_full(chunked: bool) -> None:
    batch = ContextBatch([*decoding(3, limit=9), TextContext("full", range(4), 4)])
    batch[1].tokens.skip(3)
    if chunked:
        batch[0].tokens.rewind(2)
        batch[0].tokens.chunk(1)
    with pytest.raises(TokenError, match="'full'"):
        batch.update([1, 1])
    assert batch.lengths.tolist() == [3, 4]


def test_a_context_is_in_one_batch_at_most() -> None:
    [ctx] = contexts(2)
    batch = ContextBatch([ctx])
    with pytest.raises(BatchError, match="in a batch already"):
        ContextBatch([ctx])
    with pytest.raises(BatchError, match="in a batch already"):
        batch.add(TextContext("r0", [1], 9))
    with pytest.raises(BatchError, match="not in this batch of 1"):
        batch.remove("unknown")


def test_a_snapshot_stays_as_it_was() -> None:
    batch = ContextBatch(decoding(3))
    copy = batch[0].snapshot()
    batch.update([9])
    assert (copy.tokens.all.tolist(), copy.tokens.processed) == ([0, 1, 2], 2)


def test_alloc_many_says_what_was_refused(make) -> None:
    small = make(4, page_size=2)
    batch = ContextBatch(contexts(4, 4))
    for ctx in batch:
        small.manager.claim(ctx.request_id, 0)
    assert small.manager.alloc_many([batch]) == [{}]
    batch.update([1, 1])
    [refused] = small.manager.alloc_many([batch])
    assert list(refused) == ["r0", "r1"] and all(isinstance(e, InsufficientBlocksError) for e in refused.values())
    small.manager.release("r1", 0)
    with pytest.raises(NotClaimedError, match="'r1'"):
        small.manager.alloc_many([batch])
    batch.remove("r1")
    assert small.manager.alloc_many([batch]) == [{}]
    assert len(small.manager.get_req_blocks("r0", 0)) == 3
