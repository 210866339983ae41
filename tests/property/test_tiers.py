"""Random life above small tiers, with files damaged under way: every slot is right, and nothing is held at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayk import InferenceSession, KVConnectorConfig, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk.errors import InsufficientBlocksError
from rayk.tiers.files import HEADER_BYTES

SIZE, PAGES, REPLICAS = 2, 12, 2
prompts = st.lists(st.integers(0, 1), min_size=3, max_size=14)
replica = st.integers(0, REPLICAS - 1)
OPERATIONS = st.one_of(
    st.tuples(st.just("start"), prompts, replica, st.sampled_from([None, "salt"])),
    st.tuples(st.just("turn"), st.integers(0, 9), st.integers(1, 6)),
    st.tuples(st.just("alloc"), st.integers(0, 9)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("damage"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.sampled_from(["drain", "poll", "reset"])),
)


def chain(tokens: Sequence[int]) -> list[float]:
    values, value = [], 1
    for token in tokens:
        value = (31 * value + token + 7) % 1_000_003
        values.append(float(value))
    return values


def stamp(inputs: Any, batch: Sequence[Any]) -> None:
    [shard] = inputs.shards
    for row, ctx in enumerate(batch):
        start = ctx.tokens.processed_length
        for at, value in enumerate(chain(ctx.tokens.all.tolist())[start : start + ctx.tokens.active_length], start):
            shard.kv_blocks[int(shard.lookup_table[row, at // SIZE]), :, :, at % SIZE] = value


class Life:
    """One manager and the requests that live on it."""

    def __init__(self, session: InferenceSession, folder: Path, host: int, disk: int, copies: bool) -> None:
        self.folder = folder
        params = MHAKVCacheParams(
            dtype="float32",
            head_dim=1,
            num_layers=1,
            n_kv_heads=1,
            page_size=SIZE,
            devices=["cpu"] * REPLICAS,
            data_parallel_degree=REPLICAS,
            enable_prefix_caching=True,
            enable_dp_cross_replica_prefix_copy=copies,
            kv_connector="tiered" if disk else "local",
            kv_connector_config=KVConnectorConfig(
                disk_offload_dir=folder,
                disk_offload_max_bytes=disk * (16 + HEADER_BYTES),
                num_disk_workers=1,
                model_id="m",
            ),
        )
        assert params.bytes_per_page == 16
        self.budget = disk * (16 + HEADER_BYTES)
        self.manager = PagedKVCacheManager(params, session, PAGES, host, True, max_batch_size=8)
        self.live: list[tuple[TextContext, int]] = []
        self.made = 0

    def batches(self, ctx: TextContext, r: int) -> list[list[TextContext]]:
        return [[ctx] if i == r else [] for i in range(REPLICAS)]

    def pick(self, n: int) -> tuple[TextContext, int] | None:
        return self.live[n % len(self.live)] if self.live else None

    def start(self, tokens: list[int], r: int, salt: str | None) -> None:
        self.made += 1
        ctx = TextContext(f"r{self.made}", tokens, 200, cache_salt=salt)
        self.manager.claim(ctx.request_id, r)
        self.live.append((ctx, r))
        self.try_alloc(ctx, r)

    def try_alloc(self, ctx: TextContext, r: int) -> bool:
        before = (ctx.tokens.processed_length, self.manager.get_req_blocks(ctx.request_id, r))
        try:
            self.manager.alloc(ctx, r)
        except InsufficientBlocksError:
            after = (ctx.tokens.processed_length, self.manager.get_req_blocks(ctx.request_id, r))
            assert after[0] <= before[0] and after[1] == before[1]
            return False
        return True

    def alloc(self, n: int) -> None:
        if (one := self.pick(n)) is not None:
            self.try_alloc(*one)

    def turn(self, n: int, chunk: int) -> None:
        one = self.pick(n)
        if one is None or not self.try_alloc(*one):
            return
        ctx, r = one
        if chunk < ctx.tokens.active_length:
            ctx.tokens.chunk(chunk)
        self.manager.execute(self.batches(ctx, r), stamp)
        ctx.update(1)
        self.manager.step(self.batches(ctx, r))
        count, pages = ctx.tokens.processed_length, self.manager.get_req_blocks(ctx.request_id, r)
        [read] = self.manager.read_pages(pages, r)
        assert read[:, 0, 0, :, 0, 0].flatten()[:count].tolist() == chain(ctx.tokens.all.tolist())[:count]

    def release(self, n: int) -> None:
        if (one := self.pick(n)) is not None:
            self.live.remove(one)
            self.manager.release(one[0].request_id, one[1])

    def damage(self, which: int, how: int) -> None:
        files = sorted(self.folder.rglob("*.kv"))
        if files:
            path = files[which % len(files)]
            try:
                data = bytearray(path.read_bytes())
                if how % 3 == 0 or not data:
                    path.write_bytes(bytes(data[: how % (len(data) + 1)]))
                elif how % 3 == 1:
                    data[how % len(data)] ^= 1 << how % 8
                    path.write_bytes(data)
                else:
                    path.write_bytes(files[how % len(files)].read_bytes())
            except FileNotFoundError:
                pass  # a worker gave that page up just now

    def drain(self) -> None:
        self.manager.drain()

    def poll(self) -> None:
        self.manager.poll_transfers()

    def reset(self) -> None:
        self.manager.reset_prefix_cache()

    def end(self) -> None:
        for ctx, r in self.live:
            self.manager.release(ctx.request_id, r)
        self.manager.drain()
        self.manager.check_integrity()
        assert [self.manager.num_free_blocks(r) for r in range(REPLICAS)] == [PAGES] * REPLICAS
        for r in range(REPLICAS):
            assert self.manager.get_num_used_host_pages(r) <= self.manager.get_num_host_pages(r)
            assert self.manager.get_num_used_disk_pages(r) <= self.manager.get_num_disk_pages(r)
        on_disk = sum(path.stat().st_size for path in self.folder.rglob("*.kv"))
        assert on_disk <= self.budget + 3 * (16 + HEADER_BYTES)  # damage may make a file of another's size
        self.manager.shutdown()


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=st.lists(OPERATIONS, min_size=5, max_size=60),
    host=st.integers(1, 10),
    disk=st.sampled_from([0, 0, 3, 20]),
    copies=st.booleans(),
)
def test_any_life_above_tiers(operations: list[tuple[Any, ...]], host: int, disk: int, copies: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, InferenceSession("inline") as session:
        life = Life(session, Path(folder), host, disk, copies)
        for name, *arguments in operations:
            getattr(life, name)(*arguments)
        life.end()
