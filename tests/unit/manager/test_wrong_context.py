"""A live id that comes with another request's context, or twice in one batch: every call refuses it before anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from rayk import ContextBatch, InferenceSession, PagedKVCacheManager, TextContext, Tick
from rayk.errors import BatchError

from ..actors.fake import FakeRuntime, manager_on, params  # noqa: TID252  # tests/ is no package that has an absolute name

PAGE = 4
PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.fixture(params=["inline", "ray"])
def manager(request: pytest.FixtureRequest) -> Iterator[PagedKVCacheManager]:
    if request.param == "ray":
        with manager_on(FakeRuntime(), replicas=1, pages=64, max_batch_size=16) as made:
            yield made
    else:
        session = InferenceSession()
        with PagedKVCacheManager(params(1), session, 64, enable_runtime_checks=True, max_batch_size=16) as made:
            yield made


def context(request_id: str = "r", tokens: Sequence[int] = PROMPT, salt: str | None = None, **more: Any) -> TextContext:
    return TextContext(request_id, tokens, 1000, salt, **more)


def nothing(inputs: Any, batch: Any) -> int:
    return len(batch)


Call = Callable[[PagedKVCacheManager, list[TextContext]], Any]
BATCHES: dict[str, Call] = {
    "alloc_many": lambda m, batch: m.alloc_many([batch]),
    "step": lambda m, batch: m.step([batch]),
    "runtime_inputs": lambda m, batch: m.runtime_inputs([batch]),
    "execute": lambda m, batch: m.execute([batch], nothing),
    "tick-step": lambda m, batch: m.tick([Tick(step=batch)]),
    "tick-alloc": lambda m, batch: m.tick([Tick(alloc=batch)]),
    "tick-execute": lambda m, batch: m.tick([Tick(execute=batch)], nothing),
    "tick-all": lambda m, batch: m.tick([Tick(step=batch, alloc=batch, execute=batch)], nothing),
    "step-arrays": lambda m, batch: m.step([ContextBatch(batch)]),
    "inputs-arrays": lambda m, batch: m.runtime_inputs([ContextBatch(batch)]),
    "alloc-arrays": lambda m, batch: m.alloc_many([ContextBatch(batch)]),
}
CALLS: dict[str, Call] = {
    "alloc": lambda m, batch: m.alloc(batch[0], 0),
    "used_fraction": lambda m, batch: m.get_pct_used_blocks_after_allocation(batch[0], 0),
    **BATCHES,
}


def state(manager: PagedKVCacheManager, *request_ids: str) -> Any:
    blocks = [manager.get_req_blocks(i, 0) for i in request_ids]
    return blocks, manager.num_free_blocks(), manager.get_metrics_aggregated()


def window(ctx: TextContext) -> Any:
    return ctx.tokens.processed, ctx.tokens.end, ctx.tokens.all.tolist(), ctx.cached_prefix_length


def started(manager: PagedKVCacheManager, ctx: TextContext, steps: int) -> TextContext:
    """A request that was prefilled and decoded `steps` tokens, 0 for one that only has its pages."""
    manager.claim(ctx.request_id, 0)
    manager.alloc(ctx, 0)
    for token in range(steps):
        ctx.update(100 + token)
        manager.step([[ctx]])
        manager.alloc(ctx, 0)
    return ctx


OTHERS = {
    "other tokens": lambda: context(tokens=[9] * 6),
    "others at the end of what is processed": lambda: context(tokens=[1, 2, 3, 4, 5, 7]),
    "others, and far on": lambda: _on(context(tokens=[9] * 9), 8),
    "another salt": lambda: context(salt="tenant B"),
    "another adapter": lambda: context(adapter="lora"),
    "a shorter one of other tokens": lambda: context(tokens=[9]),
}


def _on(ctx: TextContext, processed: int) -> TextContext:
    ctx.tokens.skip(processed)
    return ctx


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_another_requests_context_is_refused_and_changes_nothing(
    manager: PagedKVCacheManager, call: str, other: str, steps: int
) -> None:
    right, bystander = started(manager, context(), steps), started(manager, context("b", [5] * 5), 1)
    wrong = OTHERS[other]()
    before = state(manager, "r", "b"), window(right), window(wrong), window(bystander)
    batches = [[wrong]] if call in ("alloc", "used_fraction") else [[wrong], [bystander, wrong], [wrong, bystander]]
    for batch in batches:
        with pytest.raises(BatchError, match=r"'r'.*other tokens or another salt"):
            CALLS[call](manager, batch)
        for ctx in batch:  # a ContextBatch may have it
            if type(ctx.tokens).__name__ == "ArenaWindow":
                ctx.tokens._batch.remove(ctx.request_id)
        assert (state(manager, "r", "b"), window(right), window(wrong), window(bystander)) == before
    for token in range(6):  # the right one goes on as if nothing had been
        manager.alloc_many([[right, bystander]])
        right.update(token)
        bystander.update(token)
        manager.step([[right, bystander]])
    manager.runtime_inputs([[right]]) if right.tokens.length <= len(manager.get_req_blocks("r", 0)) * PAGE else None
    manager.check_integrity()
    probe = context("probe", right.tokens.all.tolist())
    assert manager.get_prefix_cache_hit_counts(probe)[0].device_blocks == right.tokens.processed // PAGE


@pytest.mark.parametrize("call", BATCHES)
@pytest.mark.parametrize("again", ["the same", "an equal one"])
def test_an_id_that_is_twice_in_a_batch_is_refused_by_name(manager: PagedKVCacheManager, call: str, again: str) -> None:
    if "arrays" in call:
        pytest.skip("a ContextBatch refuses that itself")
    right, bystander = started(manager, context(), 2), started(manager, context("b", [5] * 5), 1)
    twice = right if again == "the same" else right.snapshot()
    before = state(manager, "r", "b"), window(right)
    for batch in ([right, twice], [right, bystander, twice], [bystander, right, twice]):
        with pytest.raises(BatchError, match=r"'r' is twice"):
            BATCHES[call](manager, batch)
        assert (state(manager, "r", "b"), window(right)) == before
    many = [started(manager, context(f"m{i}", [i + 20]), 0) for i in range(8)]
    with pytest.raises(BatchError, match=r"'m3' is twice"):
        BATCHES[call](manager, [*many, many[3]])
    manager.check_integrity()


def test_an_id_that_is_twice_among_a_ticks_releases_is_refused(manager: PagedKVCacheManager) -> None:
    started(manager, context(), 1)
    with pytest.raises(BatchError, match=r"'r' is twice"):
        manager.tick([Tick(release=["r", "r"])])
    assert manager.contains("r", 0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "same",
    [
        lambda ctx: ctx.snapshot(),
        lambda ctx: context(tokens=ctx.tokens.all.tolist()),
        lambda ctx: context(tokens=[*ctx.tokens.all.tolist(), 77]),
        lambda ctx: context(tokens=ctx.tokens.all.tolist()[:-1]),
        lambda ctx: _on(context(tokens=ctx.tokens.all.tolist()), ctx.tokens.processed),
        lambda ctx: context(tokens=[*ctx.tokens.all.tolist()[:-1], 3]),
        lambda ctx: context(tokens=[*ctx.tokens.all.tolist()[:-1], -1], pending_future_count=1),
    ],
)
def test_a_context_that_says_the_same_goes_on(
    manager: PagedKVCacheManager, call: str, same: Callable[[TextContext], TextContext]
) -> None:
    """Sent again whole, longer, shorter, rewound, or with another token where none was computed."""
    ctx = same(started(manager, context(), 2))
    if "step" in call:  # else it is the first call with this context
        CALLS[call](manager, [ctx])
        return
    manager.alloc(ctx, 0)
    CALLS[call](manager, [ctx])
    manager.check_integrity()


def test_placeholders_that_were_filled_in_are_no_other_tokens(manager: PagedKVCacheManager) -> None:
    ctx = started(manager, context(), 1)
    for _ in range(2):
        manager.alloc(ctx, 0)
        ctx.update_with_future_token()
        manager.step([[ctx]])
    filled = context(tokens=[*PROMPT, 100, 8, 9])
    filled.tokens.skip(8)
    manager.alloc(filled, 0)
    manager.step([[filled]])
    other = context(tokens=[*PROMPT, 101, 8, 9])
    with pytest.raises(BatchError, match="other tokens"):
        manager.step([[other]])


def test_a_request_without_pages_may_go_on_with_any_context(manager: PagedKVCacheManager) -> None:
    manager.claim("r", 0)
    with pytest.raises(Exception, match="page"):
        manager.alloc(context(tokens=[1] * 999), 0)
    manager.alloc(context(tokens=[2] * 5), 0)
    with pytest.raises(BatchError):
        manager.alloc(context(salt="s", tokens=[2] * 5), 0)


def test_padding_may_be_any_context(manager: PagedKVCacheManager) -> None:
    manager.alloc_dummy("pad", 0)
    for token in range(3):
        manager.execute([[_on(context("pad", [token] * 3), 2)]], nothing)
