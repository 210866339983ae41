"""Both runtimes give the same answers: random traffic, operation by operation, on cores and on actors.

What is compared: windows, page ids, contents, counters, metrics, hit counts, inputs, and errors by type and text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayk import InferenceSession, PagedKVCacheManager, RaykError, TextContext, Tick
from rayk.errors import ConfigError, NotClaimedError

from ..actors.fake import FakeRuntime, manager_on, params, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

REPLICAS = 2
PROMPTS = [[1] * 9, [1] * 9, [1] * 4 + [2] * 9, [3] * 5, [3] * 17, [4], [5] * 60]
NAMES = [f"r{i}" for i in range(5)]

replica = st.integers(0, REPLICAS - 1)
name = st.sampled_from(NAMES)
OPERATIONS = st.one_of(
    st.tuples(st.just("new"), name, st.sampled_from(range(len(PROMPTS))), st.sampled_from([None, "salt"])),
    st.tuples(st.just("claim"), name, replica),
    st.tuples(st.just("alloc"), name, replica),
    st.tuples(st.just("serve"), name, replica, st.sampled_from(range(len(PROMPTS)))),
    st.tuples(st.just("admit"), st.lists(name, min_size=1, max_size=3), st.one_of(st.none(), replica)),
    st.tuples(st.just("admit_all"), name),
    st.tuples(st.just("reserve"), name, replica),
    st.tuples(st.just("dummy"), name, replica),
    st.tuples(st.just("chunk"), name, st.integers(1, 6)),
    st.tuples(st.just("update"), name),
    st.tuples(st.just("placeholder"), name),
    st.tuples(st.just("realize"), name),
    st.tuples(st.just("reset"), name),
    st.tuples(st.just("drafts"), name, st.integers(0, 3)),
    st.tuples(st.just("execute"), st.lists(name, max_size=3, unique=True)),
    st.tuples(st.just("step"), st.lists(name, max_size=3, unique=True)),
    st.tuples(st.just("inputs"), st.lists(name, max_size=3, unique=True)),
    st.tuples(st.just("tick"), st.lists(st.tuples(name, st.integers(0, 15)), max_size=4, unique_by=lambda x: x[0])),
    st.tuples(st.just("release"), name, replica),
    st.tuples(st.just("reset_prefix_cache")),
    st.tuples(st.just("reset_metrics")),
    st.tuples(st.just("queries"), name),
)  # fmt: skip


class Side:
    """One manager with contexts of its own; `do` performs an operation and returns all that can be seen of it."""

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self.manager = manager
        self.ctxs = {n: TextContext(n, PROMPTS[i % len(PROMPTS)], 10_000) for i, n in enumerate(NAMES)}
        self.where: dict[str, int] = {}

    def do(self, operation: tuple[Any, ...]) -> Any:
        try:
            answer = getattr(self, operation[0])(*operation[1:])
        except RaykError as error:
            fields = error.args[:2] if isinstance(error, NotClaimedError) else error.args
            answer = (type(error).__name__, fields)
        return answer, self.visible()

    def visible(self) -> Any:
        m = self.manager
        m.check_integrity()
        return (
            {
                n: (c.tokens.length, c.tokens.processed, c.tokens.end, c.cached_prefix_length)
                for n, c in self.ctxs.items()
            },
            [(m.num_free_blocks(r), m.get_num_used_pages(r)) for r in range(REPLICAS)],
            {(n, r): m.get_req_blocks(n, r) for n in NAMES for r in range(REPLICAS) if m.contains(n, r)},
            m.get_metrics_aggregated(),
        )

    def batches(self, names: Sequence[str]) -> list[list[TextContext]]:
        return [[self.ctxs[n] for n in names if self.where.get(n) == r] for r in range(REPLICAS)]

    def new(self, n: str, prompt: int, salt: str | None) -> None:
        self.ctxs[n] = TextContext(n, PROMPTS[prompt], 10_000, salt)

    def claim(self, n: str, r: int) -> None:
        self.manager.claim(n, r)
        self.where[n] = r

    def alloc(self, n: str, r: int) -> None:
        self.manager.alloc(self.ctxs[n], r)

    def serve(self, n: str, r: int, prompt: int) -> None:
        """A whole short life, so that something is cached."""
        if n in self.where:
            self.release(n, self.where[n])
        self.new(n, prompt, None)
        self.claim(n, r)
        self.alloc(n, r)
        self.manager.execute(self.batches([n]), stamp)
        self.ctxs[n].update(9)
        self.manager.step(self.batches([n]))

    def admit(self, names: list[str], r: int | None) -> list[Any]:
        names = names if not self.manager.params.enable_dp_cross_replica_prefix_copy else names[:1]
        ctxs = [self.ctxs[n] for n in names]
        # One by one without a place, so that a refused one does not change where the next is counted.
        done = (
            self.manager.try_admit(ctxs, [r] * len(ctxs))
            if r is not None
            else [a for ctx in ctxs for a in self.manager.try_admit([ctx])]
        )
        self.where |= {n: a.replica for n, a in zip(names, done, strict=True) if a.error is None}
        return [
            (type(a.error), a.error.args) if a.error is not None else (a.replica, a.device_tokens, a.peer_tokens)
            for a in done
        ]

    def admit_all(self, n: str) -> list[int]:
        """Of one: what a refused batch of several had admitted before it was undone is counted, on either side."""
        [self.where[n]] = done = self.manager.admit([self.ctxs[n]])
        return done

    def reserve(self, n: str, r: int) -> list[int]:
        batches: list[list[TextContext]] = [[] for _ in range(REPLICAS)]
        batches[r] = [self.ctxs[n]]
        with self.manager.reserve(batches):
            return self.manager.get_req_blocks(n, r)

    def dummy(self, n: str, r: int) -> None:
        self.manager.alloc_dummy(n, r)
        self.where[n] = r

    def chunk(self, n: str, tokens: int) -> None:
        self.ctxs[n].tokens.chunk(tokens)

    def update(self, n: str) -> None:
        self.ctxs[n].update(11)

    def placeholder(self, n: str) -> None:
        self.ctxs[n].update_with_future_token()

    def realize(self, n: str) -> None:
        self.ctxs[n].realize_future_token(12)

    def reset(self, n: str) -> None:
        self.ctxs[n].reset()

    def drafts(self, n: str, count: int) -> None:
        self.ctxs[n].draft_tokens_to_verify = [7] * count
        self.ctxs[n].maybe_accepted_draft_tokens = [8] * (count // 2)

    def execute(self, names: list[str]) -> list[Any]:
        return self.manager.execute(self.batches(names), stamp_where_it_fits)

    def step(self, names: list[str]) -> None:
        self.manager.step(self.batches(names))

    def inputs(self, names: list[str]) -> list[Any]:
        shards = [astuple(replace(s, kv_blocks=None)) for s in self.manager.runtime_inputs(self.batches(names)).inputs]
        return [[v.tolist() if isinstance(v, torch.Tensor) else v for v in shard] for shard in shards]

    def tick(self, work: list[tuple[str, int]]) -> list[Any]:
        ticks = []
        for r in range(REPLICAS):
            mine = [(self.ctxs[n], bits) for n, bits in work if self.where.get(n) == r]
            gone = [c.request_id for c, bits in mine if bits & 2]
            stay = [(c, bits) for c, bits in mine if not bits & 2]
            ticks.append(
                Tick(
                    step=[c for c, bits in mine if bits & 1],
                    release=gone,
                    alloc=[c for c, bits in stay if bits & 4],
                    execute=[c for c, bits in stay if bits & 8],
                )
            )
        done = self.manager.tick(ticks, stamp_where_it_fits)
        for t in ticks:
            for n in t.release:
                del self.where[n]
        return [
            (d.value, {n: e.args for n, e in d.refused.items()}, d.free_pages, d.used_pages)
            for d, t in zip(done, ticks, strict=True)
            if not t.empty
        ]

    def release(self, n: str, r: int) -> None:
        self.manager.release(n, r)
        self.where.pop(n, None)

    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()

    def reset_metrics(self) -> None:
        self.manager.reset_metrics()

    def queries(self, n: str) -> Any:
        m, ctx = self.manager, self.ctxs[n]
        fractions = [m.get_pct_used_blocks_after_allocation(ctx, r) for r in range(REPLICAS)]
        return m.get_prefix_cache_hit_counts(ctx), fractions

    def pages(self) -> list[Any]:
        return [self.manager.read_pages(range(self.manager.get_num_pages(r)), r)[0].tolist() for r in range(REPLICAS)]


def stamp_where_it_fits(inputs: Any, batch: Any) -> int:
    """stamp(), and what it is given: the copies of the contexts must be the driver's."""
    seen = [(c.request_id, c.tokens.all.tolist(), c.tokens.processed, c.tokens.end) for c in batch]
    return stamp(inputs, batch) + len(repr(seen))


def both(check: Callable[[Side, Side], None], lazy: bool, **changes: Any) -> None:
    settings_ = {"replicas": REPLICAS, "kv_hash_seed": b"0" * 32} | changes
    with manager_on(FakeRuntime(lazy=lazy), pages=12, **settings_) as actors, InferenceSession() as session:
        cores = PagedKVCacheManager(params(**settings_), session, 12, 0, True, max_batch_size=8, router="least-loaded")
        check(Side(cores), Side(actors))


@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=st.lists(OPERATIONS, min_size=10, max_size=50),
    copies=st.booleans(),
    caching=st.sampled_from([True, True, True, False]),
    lazy=st.booleans(),
    speculative=st.sampled_from([{}, {"num_draft_tokens": 2, "speculative_method": "eagle"}]),
)
def test_both_runtimes_agree(operations: Any, copies: bool, caching: bool, lazy: bool, speculative: Any) -> None:
    def check(cores: Side, actors: Side) -> None:
        for operation in operations:
            expected, got = cores.do(operation), actors.do(operation)
            assert got == expected, operation
        assert actors.pages() == cores.pages()

    both(check, lazy, enable_prefix_caching=caching, enable_dp_cross_replica_prefix_copy=copies, **speculative)


def test_the_operations_reach_what_they_should() -> None:
    """A fixed story with hits, copies, chunks, a preemption and an eviction; its figures are known."""
    story = [
        ("serve", "r0", 0, 1), ("release", "r0", 0), ("queries", "r1"),
        ("claim", "r1", 1), ("alloc", "r1", 1), ("execute", ["r1"]), ("update", "r1"), ("step", ["r1"]),
        ("new", "r2", 4, None), ("chunk", "r2", 6), ("admit", ["r2"], 0), ("tick", [("r2", 12), ("r1", 12)]),
        ("update", "r2"), ("tick", [("r2", 13), ("r1", 3)]), ("new", "r3", 6, None), ("admit", ["r3"], 0),
        ("reset", "r2"), ("release", "r2", 0), ("admit", ["r2"], None), ("reset_prefix_cache",), ("queries", "r1"),
    ]  # fmt: skip

    def check(cores: Side, actors: Side) -> None:
        for operation in story:
            expected, got = cores.do(operation), actors.do(operation)
            assert got == expected, operation
        metrics = actors.manager.get_metrics_aggregated()
        assert metrics.cross_replica_blocks_copied == 2

    both(check, True)


WRONG_PAGES: list[Any] = [3, None, "abc", [1.5], [True], [torch.tensor(1.5)], [None], [2**70], [-1], [17], [[0]]]


@pytest.mark.parametrize("ids", WRONG_PAGES, ids=repr)
@pytest.mark.parametrize("kind", ["inline", "ray"])
def test_pages_are_read_by_whole_numbers_only(kind: str, ids: Any) -> None:
    with manager_on(FakeRuntime()) if kind == "ray" else inline() as manager:
        with pytest.raises(ConfigError, match="page ids must be"):
            manager.read_pages(ids, 0)
        [nothing], [pages] = manager.read_pages([], 0), manager.read_pages(np.array([0, 16]), 0)
        assert nothing.shape == (0, *pages.shape[1:]) and nothing.dtype == pages.dtype
        assert len(pages) == 2


def inline() -> PagedKVCacheManager:
    return PagedKVCacheManager(params(), InferenceSession(), 16, max_batch_size=8)
