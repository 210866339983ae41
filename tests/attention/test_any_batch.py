"""Plain torch's attention over any batch: lengths, counts, page sizes, windows and rules as they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.attention import gathering
from rayk.attention.sdpa import TorchSdpa, _padded_decode

from ..unit.attention.cases import make_case, rules_of  # noqa: TID252  # tests are no package

pytestmark = pytest.mark.slow

ROWS = st.lists(
    st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=12
)  # cached tokens, and tokens to attend


@settings(max_examples=250)
@given(
    rows=ROWS,
    page_size=st.sampled_from([1, 2, 5, 16, 64]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    group_bytes=st.sampled_from([1, 4096, gathering.GROUP_BYTES]),
    seed=st.integers(0, 5),
)
def test_any_batch(rows, page_size, heads, window, softcap, sinks, group_bytes, seed) -> None:
    """Whatever is gathered together, foreign slots (NaN) are not read."""
    counts, lengths = [count for _, count in rows], [cached + count for cached, count in rows]
    case = make_case(counts, lengths, page_size, *heads, dim=4, seed=seed)
    rules = rules_of(4, window=window, softcap=softcap, sinks=torch.linspace(-1, 2, heads[0]) if sinks else None)
    want = case.expected(rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "GROUP_BYTES", group_bytes)
        got = TorchSdpa().attend(case.query, *case.views, case.batch, rules)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    if case.batch.is_decode:
        got = _padded_decode(case.query, *case.views, case.batch, rules)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
