"""reset_prefix_cache(weights_changed=True): KV of before stays with the requests that ran, and reaches nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayk import (
    ContextBatch,
    InferenceSession,
    KVConnectorConfig,
    MHAKVCacheParams,
    PagedKVCacheManager,
    PrefixCacheReset,
    TextContext,
)
from rayk.kvcache.page_hash import TOKEN_BYTES, Mask

from .test_page_pins import direct

SIZE = 4
PROMPT = list(range(10, 31))  # five pages and a token
KINDS = ["null", "local", "tiered"]
made: list[PagedKVCacheManager] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No manager of a test outlives it, with the threads of its tiers."""
    yield
    while made:
        made.pop().shutdown()


class Weights:
    """A forward that writes the version of the weights into every slot, and whoever reads it back."""

    def __init__(self, kind: str, folder: Path | None = None, replicas: int = 1) -> None:
        self.version = 0
        disk = folder if kind == "tiered" else None
        config = KVConnectorConfig(disk_offload_dir=disk, disk_offload_max_bytes=1 << 16, model_id="m")
        params = MHAKVCacheParams(
            dtype="float32", head_dim=2, num_layers=1, n_kv_heads=1, page_size=SIZE, devices=["cpu"] * replicas,
            data_parallel_degree=replicas, enable_prefix_caching=True, kv_connector=kind,
            kv_connector_config=config if kind != "null" else None,
        )  # fmt: skip
        host = 0 if kind == "null" else 16
        self.manager = PagedKVCacheManager(params, InferenceSession("inline"), 32, host, max_batch_size=4)
        made.append(self.manager)
        self.replicas = replicas

    def forward(self, inputs: Any, batch: Any) -> None:
        [shard] = inputs.shards
        for row, ctx in enumerate(batch):
            start = ctx.tokens.processed_length
            for at in range(start, start + ctx.tokens.active_length):
                shard.kv_blocks[int(shard.lookup_table[row, at // SIZE]), :, :, at % SIZE] = self.version

    def start(self, request_id: str, tokens: list[int] | None = None, replica: int = 0) -> TextContext:
        ctx = TextContext(request_id, PROMPT if tokens is None else tokens, 99)
        self.manager.claim(request_id, replica)
        self.manager.alloc(ctx, replica)
        return ctx

    def turn(self, batch: Any, replica: int = 0) -> None:
        batches = [batch if r == replica else [] for r in range(self.replicas)]
        for ctx in batch:
            self.manager.alloc(ctx, replica)
        self.manager.execute(batches, self.forward)
        for ctx in batch:
            ctx.update(1)
        self.manager.step(batches)

    def run(self, request_id: str, tokens: list[int] | None = None, replica: int = 0) -> TextContext:
        ctx = self.start(request_id, tokens, replica)
        self.turn([ctx], replica)
        return ctx

    def seen(self, ctx: TextContext, replica: int = 0) -> set[int]:
        """Versions of the weights that computed the request's KV."""
        [pages] = self.manager.read_pages(self.manager.get_req_blocks(ctx.request_id, replica), replica)
        return {int(v) for v in pages[:, 0, 0, :, 0, 0].flatten()[: ctx.tokens.processed_length]}

    def change(self) -> PrefixCacheReset:
        self.version += 1
        return self.manager.reset_prefix_cache(weights_changed=True)

    def check_fresh(self, replica: int = 0) -> None:
        """A request with the prompt reads what the weights of now have computed."""
        ctx = self.run(f"fresh-{self.version}", [*PROMPT, 1], replica)
        assert self.seen(ctx, replica) == {self.version}
        self.manager.release(ctx.request_id, replica)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_runs_keeps_its_pages_to_itself(kind: str, tmp_path: Path) -> None:
    world = Weights(kind, tmp_path)
    manager = world.manager
    a = world.run("a")
    manager.release(world.run("done", [5] * 13).request_id, 0)
    answer = world.change()
    assert answer == PrefixCacheReset({0: 6}, hits=False) and not answer.complete
    assert manager.get_prefix_cache_hit_counts(TextContext("q", [5] * 13, 99))[0].device_blocks == 0
    world.check_fresh()
    for _ in range(2 * SIZE):  # it fills further pages
        world.turn([a])
    assert world.seen(a) == {0, 1}
    world.check_fresh()
    world.version = 2
    manager.reset_prefix_cache(weights_changed=True)
    manager.release("a", 0)
    manager.drain()
    assert manager.num_free_blocks(0) == 32
    assert (manager.get_num_used_host_pages(0), manager.get_num_used_disk_pages(0)) == (0, 0)
    world.check_fresh()
    manager.check_integrity()


def test_without_changed_weights_held_pages_can_be_hit_and_the_answer_says_so() -> None:
    world = Weights("null")
    world.run("a")
    assert world.manager.reset_prefix_cache() == PrefixCacheReset({0: 6}, hits=True)
    assert world.start("b", [*PROMPT, 1]).cached_prefix_length == 20


def test_the_first_page_that_was_begun_before_is_not_cached() -> None:
    world = Weights("null")
    ctx = world.start("a", PROMPT[: SIZE + 1])
    ctx.tokens.chunk(2)
    world.manager.execute([[ctx]], world.forward)
    ctx.update(1)
    world.manager.step([[ctx]])
    world.change()
    world.turn([ctx])
    world.check_fresh()
    world.manager.check_integrity()


def test_what_a_batch_processed_and_nobody_looked_at_is_old_too() -> None:
    world = Weights("null")
    a = world.run("a")
    batch = ContextBatch([a])
    for _ in range(2 * SIZE + 2):
        assert not world.manager.alloc_many([batch])[0]
        world.manager.execute([batch], world.forward)
        a.update(1)
        world.manager.step([batch])
    tokens = a.tokens.all.tolist()
    world.change()
    b = world.run("b", tokens)
    assert b.cached_prefix_length == 0 and world.seen(b) == {1}
    world.manager.check_integrity()


def test_running_requests_go_on_sharing_what_they_hold() -> None:
    world = Weights("null")
    a, b = world.run("a"), world.run("b")
    assert b.cached_prefix_length == 20
    world.change()
    for _ in range(SIZE):
        world.turn([a])
        world.turn([b])
    blocks = [world.manager.get_req_blocks(ctx.request_id, 0) for ctx in (a, b)]
    assert blocks[0][:6] == blocks[1][:6]
    world.manager.release("a", 0)
    assert world.manager.num_free_blocks(0) == 32 - len(blocks[1])
    world.manager.release("b", 0)
    assert world.manager.num_free_blocks(0) == 32
    world.manager.check_integrity()


def test_pages_that_were_pinned_for_another_replica_come_too_late() -> None:
    world = Weights("null", replicas=2)
    world.manager.release(world.run("a").request_id, 0)
    source, target = (world.manager._calls.core(r) for r in (0, 1))  # type: ignore[attr-defined]  # the inline one's
    export = source.exports.export(TextContext("x", PROMPT, 99), 0, 5)
    assert world.change().held == {0: 5, 1: 0}
    ctx = TextContext("b", PROMPT, 99)
    target.claim("b")
    reused = target.alloc(ctx, [direct(source, export, target)])
    assert reused.total == 0
    source.exports.acknowledge(export.export_id)
    assert source.free == 32
    world.manager.check_integrity()


def test_a_replica_that_was_not_reset_yet_shares_nothing_with_one_that_was(tmp_path: Path) -> None:
    world = Weights("tiered", tmp_path, replicas=2)
    cores = [world.manager._calls.core(r) for r in (0, 1)]  # type: ignore[attr-defined]  # the inline one's
    token = Mask.new()
    cores[0].reset_prefix_cache(token)
    world.run("old", replica=1)  # goes to the tiers that both have
    world.manager.drain()
    world.version = 1
    ctx = TextContext("new", PROMPT, 99)
    assert cores[0].tier_hits(ctx) == (0, 0, 0)
    world.check_fresh()
    cores[1].reset_prefix_cache(token)
    world.check_fresh(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_that_joins_later_shares_what_came_after_the_reset(kind: str, tmp_path: Path) -> None:
    world = Weights(kind, tmp_path, replicas=2)
    world.run("a")
    world.change()
    world.manager.release(world.run("b").request_id, 0)
    world.manager.drain()
    there = world.manager.get_num_used_host_pages(0)
    [joined] = world.manager.add_replicas(1)
    world.replicas = 3
    assert world.manager.get_num_used_host_pages(0) == there, "nothing is emptied for it"
    ctx = world.start("c", replica=joined)
    assert ctx.cached_prefix_length == 20 and world.seen(ctx, joined) == {1}


def test_a_load_that_was_under_way_lands_with_its_request_alone(tmp_path: Path) -> None:
    world = Weights("tiered", tmp_path)
    manager = world.manager
    manager.release(world.run("a").request_id, 0)
    manager.drain()
    for n in range(6):  # others take the device pages and the host rows
        manager.release(world.run(f"o{n}", [50 + n] * len(PROMPT)).request_id, 0)
        manager.drain()
    b = world.start("b")
    assert b.cached_prefix_length == 20
    world.change()
    world.turn([b])
    assert 0 in world.seen(b)
    world.check_fresh()
    manager.release("b", 0)
    world.check_fresh()
    manager.check_integrity()


@pytest.mark.parametrize("width", [16, 32])
def test_a_mask_keeps_lengths_and_tells_apart(width: int) -> None:
    mask, other = Mask(Mask.new()), Mask(Mask.new())
    hashes = [bytes([n]) * width for n in range(3)]
    assert len(mask.token) == TOKEN_BYTES
    assert {len(each) for each in mask.all(hashes)} == {width}
    assert not {*mask.all(hashes)} & {*other.all(hashes), *hashes}
    assert [mask.one(each) for each in mask.all(hashes)] == hashes
    assert Mask().all(hashes) == hashes
