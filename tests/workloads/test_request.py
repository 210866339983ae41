"""The token space: equal slots are equal tokens and nothing else is."""

import numpy as np
import pytest

from rayk.workloads.chain import page_chain, prefix_chain
from rayk.workloads.request import SLOTS, BenchRequest, TokenSpace, TokenSpaceError, joined, run_tokens, slot_tokens


def test_slot_tokens_are_distinct_and_not_negative() -> None:
    slots = np.concatenate([np.arange(200_000), np.arange(SLOTS - 200_000, SLOTS)])
    tokens = slot_tokens(slots)
    assert tokens.dtype == np.int32 and tokens.min() >= 0
    assert len(np.unique(tokens)) == len(slots)


def test_runs_join_only_where_slots_continue() -> None:
    runs = np.array([[0, 4], [4, 4], [100, 2], [-5, 3], [-8, 2], [10, 1]], np.int64)
    short = joined(runs)
    assert short.tolist() == [[0, 8], [100, 2], [-5, 3], [-8, 2], [10, 1]]
    assert np.array_equal(run_tokens(short), run_tokens(runs))
    assert run_tokens(short)[10:15].tolist() == [-5, -6, -7, -8, -9]


def test_output_is_counted_downwards_and_quoted_by_its_run() -> None:
    request = BenchRequest(0, "r0", 0.0, None, 3, 4, np.array([[7, 3]], np.int64), output_first=-2)
    assert request.output().tolist() == [-2, -3, -4, -5]
    assert np.array_equal(run_tokens(np.array([[-2, 4]], np.int64)), request.output())
    assert request.pages(page_size=3) == 2  # 3 + 4 - 1 tokens are processed


def test_spaces_run_out_with_a_clear_error() -> None:
    space = TokenSpace("some file")
    assert space.slots(SLOTS - 1) == 0
    assert space.generated(5) == -2 and space.generated(1) == -7
    with pytest.raises(TokenSpaceError, match=r"some file: needs 2147483649 distinct tokens.*--requests"):
        space.slots(2)
    with pytest.raises(TokenSpaceError):
        space.generated(SLOTS)


def test_chain_depends_on_every_earlier_token_and_on_order() -> None:
    tokens = np.arange(64, dtype=np.int32)
    chain = prefix_chain(tokens)
    changed = tokens.copy()
    changed[10] += 1
    swapped = tokens.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert np.array_equal(prefix_chain(changed)[:10], chain[:10]) and (prefix_chain(changed)[10:] != chain[10:]).all()
    assert (prefix_chain(swapped)[3:4] != chain[3:4]).all() and (prefix_chain(swapped)[4:] != chain[4:]).all()
    assert np.array_equal(prefix_chain(tokens[:20]), chain[:20])
    assert np.array_equal(page_chain(tokens, 10), chain[[9, 19, 29, 39, 49, 59]])
    assert np.array_equal(prefix_chain(np.repeat(tokens, 2)[::2]), chain)  # not contiguous
