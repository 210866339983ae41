"""Pages on their way to another replica: hashes, pins, and what a receiver refuses."""

from dataclasses import replace

import pytest
import torch

from rayk import InsufficientBlocksError, MHAKVCacheParams, TextContext
from rayk.hashing import PageHasher
from rayk.inputs import LeafInputs
from rayk.replica import ReplicaCore

from .conftest import values, write_window


def core(pages: int = 8, replica: int = 0, **kwargs) -> ReplicaCore:
    given = {"dtype": "float32", "n_kv_heads": 1, "head_dim": 2, "num_layers": 1, "page_size": 2, **kwargs}
    params = MHAKVCacheParams(devices=["cpu"], enable_prefix_caching=True, **given)
    return ReplicaCore(params, replica, pages, 8, ["cpu"], runtime_checks=True)


def serve(at: ReplicaCore, name: str, tokens, keep: bool = False, **kwargs) -> TextContext:
    ctx = TextContext(name, tokens, 99, **kwargs)
    at.claim(name)
    at.alloc(ctx)
    inputs = at.runtime_inputs([ctx])
    assert isinstance(inputs, LeafInputs)
    write_window(inputs, [ctx])
    ctx.update(99)
    at.step([ctx])
    if not keep:
        at.release(name)
    return ctx


def evict_all(at: ReplicaCore) -> None:
    """Fill every page that is not held with something else."""
    at.claim("flood")
    at.alloc(TextContext("flood", [7] * 2 * at.usage.free, 99))
    at.release("flood")


PROMPT = [1, 2, 3, 4, 5, 6, 7]


def right_content(at: ReplicaCore, name: str) -> bool:
    """Whether the request's first three pages hold what PROMPT says."""
    (pages,) = at.buffers.read(at.blocks(name)[:3])
    return torch.equal(pages.movedim(3, 1).flatten(0, 1)[:, 0, 0, 0, 0], values(PROMPT[:6]))


def test_copied_pages_hold_the_right_content_and_are_counted() -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    export = source.exports.export(ctx, 0, 3, 0)
    assert (export.start, export.stop, len(export.hashes)) == (0, 3, 3)
    target.claim("new")
    target.alloc(ctx, [export])
    source.exports.acknowledge(export.export_id)
    assert ctx.tokens.processed == ctx.cached_prefix_length == 6
    assert right_content(target, "new")
    assert target.metrics.cross_replica_blocks_copied == 3
    assert target.metrics.cross_replica_bytes_copied == 3 * target.params.bytes_per_page
    assert (target.metrics.cache_tokens, target.metrics.device_blocks_served) == (6, 0)
    assert target.resident(ctx) == 3  # cached here now


@pytest.mark.parametrize("start", [0, 1])
def test_copies_go_on_where_local_hits_end(start: int) -> None:
    """Also when more is cached here by now than when the copies were asked for."""
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    serve(target, "part", PROMPT[:3])
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [source.exports.export(ctx, start, 3, 0)])
    assert (target.metrics.device_blocks_served, target.metrics.cross_replica_blocks_copied) == (1, 2)
    assert right_content(target, "new")


def test_copies_that_start_beyond_what_is_here_are_not_used() -> None:
    """The pages between were evicted since the receiver asked."""
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [source.exports.export(ctx, 1, 3, 0)])
    assert (ctx.tokens.processed, target.metrics.cache_tokens) == (0, 0)


def test_copies_from_two_replicas_follow_each_other() -> None:
    one, two, target = core(), core(replica=1), core(replica=2)
    serve(one, "a", PROMPT[:3])
    serve(two, "b", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [one.exports.export(ctx, 0, 1, 0), two.exports.export(ctx, 1, 3, 0)])
    assert target.metrics.cross_replica_blocks_copied == 3
    assert right_content(target, "new")


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_pages_from_a_wrong_hash_on_are_refused(wrong: int) -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    export = source.exports.export(ctx, 0, 3, 0)
    hashes = [b"x" * 32 if i == wrong else h for i, h in enumerate(export.hashes)]
    target.claim("new")
    target.alloc(ctx, [replace(export, hashes=hashes)])
    assert target.metrics.cross_replica_blocks_copied == wrong
    assert target.resident(ctx) == wrong


@pytest.mark.parametrize(
    ("tokens", "apart", "copied"),
    [(PROMPT, {"cache_salt": "s"}, 0), (PROMPT, {"adapter": "a"}, 0), ([1, 2, 3, 9, 5, 6, 7], {}, 1)],
    ids=["salt", "adapter", "tokens"],
)
def test_pages_of_another_prefix_are_refused(tokens, apart, copied: int) -> None:
    source, target = core(), core(replica=1)
    export = source.exports.export(serve(source, "old", PROMPT), 0, 3, 0)
    target.claim("new")
    target.alloc(TextContext("new", tokens, 99, **apart), [export])
    assert target.metrics.cross_replica_blocks_copied == copied


def test_pages_of_another_layout_or_seed_are_refused() -> None:
    target = core(replica=2)
    for source in (
        core(head_dim=4),
        core(dtype="float16"),
        core(kv_hash_seed=b"s" * 32),
        core(kv_hash_algo="xxh3_128"),
    ):
        old = serve(source, "old", PROMPT)
        export = source.exports.export(old, 0, 3, 0)
        ctx = TextContext("new", PROMPT, 99)
        target.claim("new")
        target.alloc(ctx, [export])
        assert (ctx.tokens.processed, target.usage.cached) == (0, 0)
        target.release("new")


def test_a_refused_alloc_with_copies_leaves_no_trace() -> None:
    source, target = core(), core(pages=4, replica=1)
    serve(source, "old", PROMPT)
    serve(target, "hold", [9] * 6, keep=True)  # 3 of 4 pages
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    before = (target.usage, target.metrics, target.blocks("new"))
    with pytest.raises(InsufficientBlocksError, match=r"needs 4 more page.*1 of 4 are free"):
        target.alloc(ctx, [source.exports.export(ctx, 0, 3, 0)])
    assert (target.usage, target.metrics, target.blocks("new")) == before
    assert (ctx.tokens.processed, ctx.cached_prefix_length) == (0, None)


def test_pins_survive_pressure_and_are_not_free() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    export = source.exports.export(old, 0, 2, 0)
    assert source.usage.free == 6
    evict_all(source)
    assert source.resident(old) == 2
    source.exports.acknowledge(export.export_id)
    assert source.usage.free == 8
    evict_all(source)
    assert source.resident(old) == 0


def test_an_export_of_what_was_evicted_meanwhile_is_shorter() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    source.reset_prefix_cache()
    for start in (0, 1):
        export = source.exports.export(old, start, 3, 0)
        assert (export.hashes, [len(part) for part in export.data]) == ([], [0])
        source.exports.acknowledge(export.export_id)
    source.check_integrity()


def test_acknowledging_twice_or_something_unknown_does_nothing() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    export = source.exports.export(old, 0, 3, 0)
    for export_id in (export.export_id, export.export_id, 77):
        source.exports.acknowledge(export_id)
    assert source.usage.free == 8
    source.check_integrity()


def test_expired_pins_are_given_back() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    early, late = source.exports.export(old, 0, 3, deadline=10), source.exports.export(old, 0, 1, deadline=20)
    assert source.exports.expire(10) == 0
    assert (source.exports.expire(11), source.usage.free) == (1, 7)
    source.exports.acknowledge(early.export_id)  # too late, and harmless
    assert source.exports.expire(99) == 1
    source.exports.acknowledge(late.export_id)
    assert source.usage.free == 8
    source.check_integrity()


def test_an_export_does_not_change_the_eviction_order() -> None:
    plain, pinned = core(pages=6), core(pages=6)
    orders = []
    for at in (plain, pinned):
        old = serve(at, "old", PROMPT)
        new = serve(at, "new", [9] * 5)
        if at is pinned:
            at.exports.acknowledge(at.exports.export(old, 0, 2, 0).export_id)
        order = []
        for pages in range(1, 7):
            at.claim("eater")
            at.alloc(TextContext("eater", [8] * 2 * pages, 99))
            order.append((at.resident(old), at.resident(new)))
            at.release("eater")
        orders.append(order)
    assert orders[0] == orders[1]
    assert orders[0][-1] == (0, 0)


def test_a_request_that_ends_while_its_prefix_is_being_copied() -> None:
    """Export, release, acknowledge, evict: never a hit with another prefix's content."""
    source = core(pages=4)
    old = serve(source, "old", PROMPT, keep=True)
    export = source.exports.export(old, 0, 2, 0)
    source.release("old")
    source.exports.acknowledge(export.export_id)
    source.claim("one page")
    source.alloc(TextContext("one page", [8, 8], 99))  # takes the empty page
    source.claim("another")
    source.alloc(TextContext("another", [8, 8], 99))  # evicts the deepest
    assert source.resident(TextContext("q", PROMPT, 99)) == 2
    assert source.resident(TextContext("q", [1, 2, 5, 6, 0], 99)) == 1
    source.check_integrity()


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3_128"])
def test_hashes_chain(algorithm: str) -> None:
    hasher = PageHasher(algorithm, b"", 2)
    root = hasher.root((None, None))
    tokens = TextContext("r", range(6), 9).tokens.all.tobytes()
    whole = hasher.chain(root, tokens)
    assert len(set(whole)) == 3
    assert {len(root), *map(len, whole)} == {hasher.width}
    assert hasher.chain(whole[0], tokens[8:]) == whole[1:]
    assert hasher.chain(root, tokens[:23]) == whole[:2]  # only full pages
    many = tokens * 5
    for pages in (0, 1, 7, 8, 15):  # as numbers, few and many
        keys = hasher.keys(root, many[: 8 * pages])
        assert keys == [int.from_bytes(each[:8], "little") for each in hasher.chain(root, many[: 8 * pages])]
        assert len(keys) == pages


def test_roots_differ_by_seed_salt_and_adapter() -> None:
    keys = [(None, None), ("", None), (None, ""), ("a", "b"), ("a:b", None), ("ab", None), (None, "ab"), ("a", None)]
    roots = [PageHasher("sha256", seed, 1).root(key) for seed in (b"", b"s" * 32) for key in keys]
    assert len(set(roots)) == len(roots)
