"""Pages that rows have in common: what is found in tables, that it is read once, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.attention import PagedPool, Rules, pack
from rayk.attention.gathering import plan_rows
from rayk.attention.sdpa import TorchSdpa
from rayk.attention.shared import shared_pages

from .cases import RULES, Case, make_case, rules_of

SIZE = 16


def tree_case(rows: list[tuple[list[int], int, int]], dim: int = 16, dtype: torch.dtype = torch.float32) -> Case:
    """Rows as (pages that others may have too, tokens after these in pages of its own, new tokens of these)."""
    generator, own = torch.Generator().manual_seed(1), 100
    pages = 200
    stored = torch.full((pages + 1, 2, 2, SIZE, 2, dim), torch.nan)
    width = max(len(common) + -(-tokens // SIZE) for common, tokens, _ in rows) + 2
    table = torch.full((len(rows), width), pages, dtype=torch.int32)
    for row, (common, tokens, _) in enumerate(rows):
        ids = [*common, *range(own, own + -(-tokens // SIZE))]
        own += -(-tokens // SIZE)
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        for at, page in enumerate(ids):
            filled = min(SIZE, len(common) * SIZE + tokens - at * SIZE)
            if stored[page].isnan().all():
                stored[page, :, :, :filled] = torch.randn((2, 2, filled, 2, dim), generator=generator)
    stored = stored.to(dtype)
    cached = torch.tensor([len(c) * SIZE + tokens - new for c, tokens, new in rows], dtype=torch.int32)
    counts = [new for _, _, new in rows]
    query = torch.randn((sum(counts), 4, dim), generator=generator).to(dtype)
    return Case(PagedPool(stored.transpose(1, 2)), stored, pack(table, cached, counts, SIZE), query)


PROMPT = list(range(20))  # 320 tokens
DOCUMENT = list(range(30, 50))
TREE = [
    (PROMPT, 5, 1),
    (PROMPT + DOCUMENT, 40, 1),
    ([60], 3, 1),  # nobody's
    (PROMPT + DOCUMENT, 17, 17),  # a chunk
    (PROMPT, 33, 2),
    (PROMPT + DOCUMENT[:12], 1, 1),
    ([], 7, 7),
]


@pytest.mark.parametrize("rules", RULES)
def test_a_tree_of_prefixes(rules: str) -> None:
    case = tree_case(TREE)
    asked = rules_of(**RULES[rules])
    got = TorchSdpa().attend(case.query, *case.views, case.batch, asked)
    assert torch.allclose(got.double(), case.expected(asked), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case, rules = tree_case(TREE, dtype=dtype), rules_of(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    got = TorchSdpa().attend(case.query, *case.views, case.batch, rules)
    assert got.dtype == dtype and torch.allclose(got.double(), case.expected(rules), atol=3e-2)


def test_what_is_shared_is_gathered_once() -> None:
    plan = plan_rows(tree_case(TREE).batch, None, 64)
    shared = [page for part in plan.shared for page in part.pages.tolist()]
    assert shared == [*PROMPT, *DOCUMENT[:12], *DOCUMENT[12:]]
    rest = [page for each in (*plan.groups, *plan.chunks) for page in each.pages.tolist()]
    assert not {*shared} & {page for page in rest if page < 100}
    assert not plan_rows(tree_case(TREE).batch, 24, 64).shared  # a window begins elsewhere for each row


def test_long_prefixes_and_many_tokens_are_taken_in_parts() -> None:
    case = make_case([300, 1, 70], [1700, 1601, 1690], shared=100)
    plan = plan_rows(case.batch, None, 64)
    assert max(len(part.pages) * SIZE for part in plan.shared) <= 1024
    assert max(len(part.tokens) for part in plan.shared) <= 256
    got = TorchSdpa().attend(case.query, *case.views, case.batch, Rules(0.25))
    assert torch.allclose(got.double(), case.expected(Rules(0.25)), atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_of_any_kind(data: Any) -> None:
    """Of each row the columns from the first on, without a gap; equal pages only; none beyond what is full."""
    rows, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6))

    def draw(each: Any, count: int) -> Any:
        return data.draw(st.lists(each, min_size=count, max_size=count))

    table = np.array([draw(st.integers(0, 2), width) for _ in range(rows)])
    full = np.array(draw(st.integers(0, width), rows))
    least = data.draw(st.integers(1, 40))
    reached = np.zeros(rows, np.int64)
    for rows_of, first, pages in shared_pages(table, full, SIZE, least):
        assert len(rows_of) > 1 and len(pages) and (len(rows_of) - 1) * len(pages) * SIZE >= least
        assert (reached[rows_of] == first).all() and (full[rows_of] >= first + len(pages)).all()
        assert (table[rows_of, first : first + len(pages)] == pages).all()
        reached[rows_of] += len(pages)
    if least == 1:
        for a in range(rows):
            for b in range(a):
                if full[a] and full[b] and table[a, 0] == table[b, 0]:
                    assert reached[a] and reached[b]
