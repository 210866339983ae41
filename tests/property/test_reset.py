"""Weights that change under random life: a request never reads KV that was computed before it began, wherever from.

Every slot is stamped with the version of the weights and its token. A request begins with the first alloc that gives
it pages; versions below that one may come from no device page, tier, peer, hand-over or pinned copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayk import (
    ContextBatch,
    InferenceSession,
    KVConnectorConfig,
    MHAKVCacheParams,
    PagedKVCacheManager,
    PrefixCacheReset,
    TextContext,
)
from rayk.errors import DrainError, InsufficientBlocksError
from rayk.kvcache.page_pins import PageExport
from rayk.kvcache.replica import ReplicaCore

from ..unit.kvcache.test_page_pins import direct  # noqa: TID252  # tests/ is no package that has an absolute name

SIZE, PAGES, REPLICAS, STRIDE = 2, 14, 2, 100
N = st.integers(0, 9)
OPERATIONS = st.one_of(
    st.tuples(st.just("start"), st.lists(st.integers(0, 1), min_size=3, max_size=8), st.integers(0, 1)),
    st.tuples(st.just("start"), st.integers(5, 9).map(lambda n: [1] * n), st.integers(0, 1)),
    st.tuples(st.just("start"), st.integers(5, 9).map(lambda n: [1] * n), st.integers(0, 1)),
    st.tuples(st.just("turn"), N, st.sampled_from([1, 2, 3, 9])),
    st.tuples(st.just("turn"), N, st.sampled_from([1, 9, 9, 9])),
    st.tuples(st.just("turn"), N, st.just(9)),
    st.tuples(st.just("decode"), st.integers(0, 1), st.integers(1, 5)),
    st.tuples(st.just("release"), N),
    st.tuples(st.just("preempt"), N),
    st.tuples(st.just("export"), N),
    st.tuples(st.just("land"), N),
    st.tuples(st.sampled_from(["drain", "poll", "change", "change", "plain_reset", "replace"])),
)


def stamp(version: int, inputs: Any, batch: Sequence[Any]) -> None:
    [shard] = inputs.shards
    for row, ctx in enumerate(batch):
        for at, token in enumerate(ctx.tokens.active.tolist(), ctx.tokens.processed_length):
            page = int(shard.lookup_table[row, at // SIZE])
            shard.kv_blocks[page, :, :, at % SIZE] = version * STRIDE + token


class Life:
    """A manager, the version of its weights, and the version at which each live request began."""

    def __init__(self, session: InferenceSession, folder: Path, tiers: str, copies: bool, checks: bool) -> None:
        config = KVConnectorConfig(
            disk_offload_dir=folder if tiers == "tiered" else None,
            disk_offload_max_bytes=1 << 12,
            num_disk_workers=1,
            model_id="m",
        )
        params = MHAKVCacheParams(
            dtype="float32", head_dim=1, num_layers=1, n_kv_heads=1, page_size=SIZE, devices=["cpu"] * REPLICAS,
            data_parallel_degree=REPLICAS, enable_prefix_caching=True, enable_dp_cross_replica_prefix_copy=copies,
            kv_connector=tiers, kv_connector_config=config if tiers != "null" else None,
        )  # fmt: skip
        host = 8 if tiers != "null" else 0
        self.manager = PagedKVCacheManager(params, session, PAGES, host, checks, max_batch_size=8)
        self.there = [0, 1]
        self.version = self.made = 0
        self.live: list[tuple[TextContext, int]] = []
        self.began: dict[str, int] = {}
        self.exports: list[tuple[ReplicaCore, PageExport, TextContext]] = []

    def core(self, replica: int) -> ReplicaCore:
        return self.manager._calls.core(replica)  # type: ignore[attr-defined]  # the inline one's

    def batches(self, batch: Sequence[TextContext], at: int) -> list[Sequence[TextContext]]:
        return [batch if r == at else [] for r in range(max(self.there) + 1)]

    def start(self, tokens: list[int], which: int) -> None:
        self.made += 1
        ctx, r = TextContext(f"r{self.made}", tokens, 200), self.there[which]
        self.manager.claim(ctx.request_id, r)
        self.live.append((ctx, r))
        self.try_alloc(ctx, r)

    def try_alloc(self, ctx: TextContext, r: int) -> bool:
        try:
            self.manager.alloc(ctx, r)
        except InsufficientBlocksError:
            return False
        self.began.setdefault(ctx.request_id, self.version)
        return True

    def turn(self, n: int, chunk: int) -> None:
        if not self.live or not self.try_alloc(*self.live[n % len(self.live)]):
            return
        ctx, r = self.live[n % len(self.live)]
        if chunk < ctx.tokens.active_length:
            ctx.tokens.chunk(chunk)
        self.compute([ctx], r)

    def compute(self, batch: Sequence[TextContext], r: int) -> None:
        self.manager.execute(self.batches(batch, r), partial(stamp, self.version))
        for ctx in batch:
            ctx.update(1)
        self.manager.step(self.batches(batch, r))
        for ctx in batch:
            self.look(ctx, r)

    def decode(self, which: int, steps: int) -> None:
        """Some steps of all that decode there, as arrays: what they process is published late."""
        r = self.there[which]
        batch = ContextBatch(c for c, at in self.live if at == r and c.tokens.active_length == 1)
        try:
            for _ in range(steps):
                if not len(batch) or self.manager.alloc_many(self.batches(batch, r))[r]:
                    break
                self.manager.runtime_inputs(self.batches(batch, r))
                self.compute(batch, r)
        finally:
            for ctx in list(batch):
                batch.remove(ctx.request_id)

    def look(self, ctx: TextContext, r: int) -> None:
        [pages] = self.manager.read_pages(self.manager.get_req_blocks(ctx.request_id, r), r)
        slots = [int(value) for value in pages[:, 0, 0, :, 0, 0].flatten()[: ctx.tokens.processed_length]]
        assert [slot % STRIDE for slot in slots] == ctx.tokens.all.tolist()[: len(slots)]
        assert min(slots) // STRIDE >= self.began[ctx.request_id], "KV of weights from before the request"

    def release(self, n: int) -> None:
        if self.live:
            ctx, r = self.live.pop(n % len(self.live))
            self.manager.release(ctx.request_id, r)

    def preempt(self, n: int) -> None:
        if self.live:
            ctx, r = self.live[n % len(self.live)]
            self.manager.release(ctx.request_id, r)
            ctx.reset()
            self.began.pop(ctx.request_id, None)
            self.manager.claim(ctx.request_id, r)

    def export(self, n: int) -> None:
        """Pin what a replica has of a request for the other; it lands whenever it does."""
        if self.live:
            ctx, r = self.live[n % len(self.live)]
            core, pages = self.core(r), (ctx.tokens.length - 1) // SIZE
            self.exports.append((core, core.exports.export(ctx, 0, pages), ctx.snapshot()))

    def land(self, n: int) -> None:
        """A request with that prefix is admitted at the other replica, with the pages that were pinned for it."""
        if not self.exports:
            return
        source, export, of = self.exports.pop(n % len(self.exports))
        target = self.core(next(r for r in self.there if r != source.replica) if len(self.there) > 1 else self.there[0])
        self.made += 1
        ctx = TextContext(f"r{self.made}", of.tokens.all, 200)
        self.manager.claim(ctx.request_id, target.replica)
        self.live.append((ctx, target.replica))
        try:
            target.alloc(ctx, [direct(source, export, target)])
        except InsufficientBlocksError:
            pass
        else:
            self.began[ctx.request_id] = self.version
        source.exports.acknowledge(export.export_id)

    def drain(self) -> None:
        self.manager.drain()

    def poll(self) -> None:
        self.manager.poll_transfers()

    def change(self) -> None:
        """Other weights. The answer says what it could not drop: exactly what is not free."""
        self.version += 1
        done = self.manager.reset_prefix_cache(weights_changed=True)
        used = {r: self.manager.get_num_used_pages(r) for r in self.there}
        assert done == PrefixCacheReset(used, hits=False)
        for r in self.there:
            assert self.core(r).tree.cached == 0

    def plain_reset(self) -> None:
        assert self.manager.reset_prefix_cache().hits

    def replace(self) -> None:
        """The first replica hands its requests over and goes; another one joins."""
        gone = self.there[0]
        self.exports = [each for each in self.exports if each[0].replica != gone]
        added = self.manager.add_replicas(1)
        with suppress(DrainError):
            self.manager.drain_replica(gone, deadline=0)
        self.live = [(ctx, self.manager.holder(ctx.request_id)) for ctx, _ in self.live]
        for ctx, r in [each for each in self.live if each[1] == gone]:
            self.live.remove((ctx, r))
            self.manager.release(ctx.request_id, r)
        self.manager.remove_replica(gone)
        self.there = [self.there[1], *added]

    def end(self) -> None:
        for source, export, _ in self.exports:
            source.exports.acknowledge(export.export_id)
        for ctx, r in self.live:
            self.manager.release(ctx.request_id, r)
        self.manager.drain()
        self.manager.check_integrity()
        assert [self.manager.num_free_blocks(r) for r in self.there] == [PAGES] * REPLICAS
        assert [self.core(r).tree.retired for r in self.there] == [0] * REPLICAS
        self.manager.shutdown()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=st.lists(OPERATIONS, min_size=30, max_size=90),
    tiers=st.sampled_from(["null", "local", "tiered"]),
    copies=st.booleans(),
    checks=st.booleans(),
)
def test_no_request_reads_what_older_weights_computed(
    operations: list[tuple[Any, ...]], tiers: str, copies: bool, checks: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, InferenceSession("inline") as session:
        life = Life(session, Path(folder), tiers, copies, checks)
        for name, *arguments in operations:
            getattr(life, name)(*arguments)
        life.end()
