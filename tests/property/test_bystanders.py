"""Whatever one request brings, all others get their undisturbed tokens and pages.

Bystanders decode beside a stranger that comes with hostile ids, salts and numbers, with other contexts under live ids,
with ids twice, and with releases of what is not its own. Each bystander's tokens are those that it has when alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import ContextBatch, InferenceSession, MHAKVCacheParams, PagedKVCacheManager, TextContext, Tick
from rayk.errors import RaykError

PAGE, PAGES, STEPS = 4, 40, 6
PARAMS = MHAKVCacheParams(
    dtype="float32", head_dim=1, num_layers=1, n_kv_heads=1, page_size=PAGE, devices=["cpu"],
    data_parallel_degree=1, enable_prefix_caching=True,
)  # fmt: skip
PROMPTS = {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9], "b": [1, 2, 3, 4, 50], "c": [7]}
SALTS = {"a": None, "b": "tenant", "c": None}

TEXT = st.one_of(
    st.sampled_from([*PROMPTS, "", "x", "\ud800", "a\udfff", "\x00", "ä" * 300, 5, None, b"a", 1.5, True, ["a"]]),
    st.text(st.characters(codec=None, categories=["Cs", "L", "Cc"]), max_size=4),
)
NUMBER = st.one_of(
    st.integers(-3, 30),
    st.sampled_from(
        [None, 2**31, -(2**31) - 1, 2**63, 2**70, -(2**70), 10**400, float("nan"), float("inf"), 1.5, "9", True]
    ),
)
TOKENS = st.one_of(
    st.lists(st.integers(0, 9), max_size=12),
    st.sampled_from([PROMPTS["a"], PROMPTS["b"], [2**31], [2**70], [-1], [1.5], "abc", b"abc", None, [[1]], [None]]),
)
MADE = st.fixed_dictionaries(
    {"request_id": TEXT, "tokens": TOKENS, "max_length": NUMBER},
    optional={
        "cache_salt": TEXT, "adapter": TEXT, "session_id": TEXT, "tenant": TEXT,
        "priority": NUMBER, "deadline": NUMBER, "pending_future_count": NUMBER,
    },
)  # fmt: skip
ORDINARY = st.builds(
    lambda request_id, tokens, salt: {
        "request_id": request_id, "tokens": tokens, "max_length": 99, "cache_salt": salt,
    },
    st.sampled_from([*PROMPTS, "x", "y"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.sampled_from([None, "tenant", "other"]),
)  # fmt: skip
Act = Callable[[PagedKVCacheManager, TextContext, list[TextContext]], Any]
ACTS: dict[str, Act] = {
    "claim": lambda m, c, others: m.claim(c.request_id, 0),
    "admit": lambda m, c, others: m.try_admit([c], [0]),
    "admit twice": lambda m, c, others: m.try_admit([c, c], [0, 0]),
    "alloc": lambda m, c, others: m.alloc(c, 0),
    "alloc_many": lambda m, c, others: m.alloc_many([[*others, c]]),
    "step": lambda m, c, others: m.step([[*others, c]]),
    "step alone": lambda m, c, others: m.step([[c]]),
    "step twice": lambda m, c, others: m.step([[*others, *others]]),
    "inputs": lambda m, c, others: m.runtime_inputs([[*others, c]]),
    "execute": lambda m, c, others: m.execute([[c]], forward),
    "execute twice": lambda m, c, others: m.execute([[c, c]], forward),
    "execute arrays": lambda m, c, others: m.execute([ContextBatch([c])], forward),
    "tick": lambda m, c, others: m.tick([Tick(step=[c], alloc=[c], execute=[c])], forward),
    "fraction": lambda m, c, others: m.get_pct_used_blocks_after_allocation(c, 0),
    "hits": lambda m, c, others: m.get_prefix_cache_hit_counts(c),
    "blocks": lambda m, c, others: m.get_req_blocks(c.request_id, 0),
    "release": lambda m, c, others: m.release(c.request_id if c.request_id not in PROMPTS else "nobody", 0),
    "release twice": lambda m, c, others: m.tick([Tick(release=["a", "a"])]),
    "release both": lambda m, c, others: m.tick([Tick(release=["b", "nobody"])]),
}


def forward(inputs: Any, batch: Any) -> dict[str, int]:
    """The next token of each, out of what the slots of all earlier ones hold."""
    [shard] = inputs.shards
    result = {}
    for row, ctx in enumerate(batch):
        w, table, value = ctx.tokens, shard.lookup_table[row].tolist(), 1
        for at in range(w.processed_length, w.processed_length + w.active_length):
            before = (
                shard.kv_blocks[table[(at - 1) // PAGE], 0, 0, (at - 1) % PAGE].item()
                if at
                else len(str(ctx.cache_salt))
            )
            value = (31 * int(before) + int(w.all[at]) + 7) % 9973
            shard.kv_blocks[table[at // PAGE], :, :, at % PAGE] = float(value)
        result[ctx.request_id] = value % 100
    return result


def decode(manager: PagedKVCacheManager, ctxs: list[TextContext]) -> None:
    manager.alloc_many([ctxs])
    [tokens] = manager.execute([ctxs], forward)
    for ctx in ctxs:
        ctx.update(tokens[ctx.request_id])
    manager.step([ctxs])


def begin(manager: PagedKVCacheManager, names: str) -> list[TextContext]:
    ctxs = [TextContext(name, PROMPTS[name], 99, SALTS[name]) for name in names]
    assert all(a.error is None for a in manager.try_admit(ctxs, [0] * len(ctxs)))
    return ctxs


def managed() -> PagedKVCacheManager:
    return PagedKVCacheManager(PARAMS, InferenceSession(), PAGES, enable_runtime_checks=True, max_batch_size=8)


def alone() -> dict[str, list[int]]:
    found = {}
    for name in PROMPTS:
        with managed() as manager:
            [ctx] = begin(manager, name)
            for _ in range(STEPS):
                decode(manager, [ctx])
            found[name] = ctx.tokens.all.tolist()
    return found


RIGHT = alone()


@settings(max_examples=150, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.one_of(MADE, ORDINARY), st.lists(st.sampled_from(sorted(ACTS)), max_size=4)),
        min_size=STEPS,
        max_size=STEPS,
    )
)
def test_bystanders_get_their_own_tokens_whatever_a_stranger_brings(
    brought: list[tuple[dict[str, Any], list[str]]],
) -> None:
    with managed() as manager:
        ctxs = begin(manager, "abc")
        for fields, acts in brought:
            try:
                stranger = TextContext(**fields)
            except RaykError as error:
                str(error).encode()
                manager_claims(manager, fields["request_id"])
            else:
                for act in acts:
                    windows = [(c.tokens.processed, c.tokens.end) for c in ctxs]
                    try:
                        ACTS[act](manager, stranger, ctxs)
                    except RaykError as error:
                        str(error).encode()
                    for ctx, (processed, end) in zip(ctxs, windows, strict=True):
                        ctx.tokens.processed, ctx.tokens.end = processed, end
            decode(manager, ctxs)
        assert {ctx.request_id: ctx.tokens.all.tolist() for ctx in ctxs} == RIGHT
        for ctx in ctxs:
            assert len(manager.get_req_blocks(ctx.request_id, 0)) * PAGE >= ctx.tokens.processed
        manager.check_integrity()


def manager_claims(manager: PagedKVCacheManager, request_id: Any) -> None:
    """No context came of it: a claim of the id is refused, or is one of its own."""
    with suppress(RaykError):
        manager.claim(request_id, 0)
        manager.release(request_id, 0)
