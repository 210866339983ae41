"""Pages on their way to another replica: hashes, pins, and what a receiver refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash

from rayk import InsufficientBlocksError, MHAKVCacheParams, TextContext
from rayk.errors import LineError
from rayk.kvcache.page_hash import PageHasher, PageKeys
from rayk.kvcache.page_pins import PageExport, PageImport
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.runtime_inputs import LeafInputs
from rayk.transport.choice import Peer
from rayk.transport.line import StoreLine
from rayk.transport.port import EXPORT_SECONDS, PagePort

from ..conftest import values, write_window  # noqa: TID252  # tests/ is no package that has an absolute name


def core(pages: int = 8, replica: int = 0, **kwargs) -> ReplicaCore:
    given = {"dtype": "float32", "n_kv_heads": 1, "head_dim": 2, "num_layers": 1, "page_size": 2, **kwargs}
    params = MHAKVCacheParams(devices=["cpu"], enable_prefix_caching=True, **given)
    return ReplicaCore(params, replica, pages, 8, ["cpu"], runtime_checks=True)


def serve(at: ReplicaCore, name: str, tokens, keep: bool = False, **kwargs) -> TextContext:
    ctx = TextContext(name, tokens, 999, **kwargs)
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


def direct(source: ReplicaCore, export: PageExport, target: ReplicaCore) -> PageImport:
    """An export as another replica of this process imports it."""

    def fill(first: int, pages: Pages) -> None:
        sent = export.pages[first : first + len(pages)]
        problem = target.buffers.copy_pages(pages, source.buffers.all_bytes, sent)
        if problem is not None:
            raise LineError("direct", -1, problem)

    return PageImport(export.start, export.hashes, fill)


def fetched(source: ReplicaCore, target: ReplicaCore, ctx: TextContext, start: int, stop: int) -> PageImport:
    """Those pages, as `target` may import them."""
    return direct(source, source.exports.export(ctx, start, stop), target)


def right_content(at: ReplicaCore, name: str) -> bool:
    """Whether the request's first three pages hold what PROMPT says."""
    (pages,) = at.buffers.read(at.blocks(name)[:3])
    return torch.equal(pages.movedim(3, 1).flatten(0, 1)[:, 0, 0, 0, 0], values(PROMPT[:6]))


def test_copied_pages_hold_the_right_content_and_are_counted() -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    export = source.exports.export(ctx, 0, 3)
    assert (export.start, len(export.hashes)) == (0, 3)
    target.claim("new")
    target.alloc(ctx, [direct(source, export, target)])
    source.exports.acknowledge(export.export_id)
    assert ctx.tokens.processed == ctx.cached_prefix_length == 6
    assert right_content(target, "new")
    assert target.metrics.cross_replica_blocks_copied == 3
    assert target.metrics.cross_replica_bytes_copied == 3 * target.params.bytes_per_page
    assert (target.metrics.cache_tokens, target.metrics.device_blocks_served) == (6, 0)
    assert target.cached_pages(ctx) == 3  # cached here now


@pytest.mark.parametrize("start", [0, 1])
def test_copies_go_on_where_local_hits_end(start: int) -> None:
    """Also when more is cached here by now than when the copies were asked for."""
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    serve(target, "part", PROMPT[:3])
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [fetched(source, target, ctx, start, 3)])
    assert (target.metrics.device_blocks_served, target.metrics.cross_replica_blocks_copied) == (1, 2)
    assert right_content(target, "new")


def test_copies_that_start_beyond_what_is_here_are_not_used() -> None:
    """The pages between were evicted since the receiver asked."""
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [fetched(source, target, ctx, 1, 3)])
    assert (ctx.tokens.processed, target.metrics.cache_tokens) == (0, 0)


def test_copies_from_two_replicas_follow_each_other() -> None:
    one, two, target = core(), core(replica=1), core(replica=2)
    serve(one, "a", PROMPT[:3])
    serve(two, "b", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [fetched(one, target, ctx, 0, 1), fetched(two, target, ctx, 1, 3)])
    assert target.metrics.cross_replica_blocks_copied == 3
    assert right_content(target, "new")


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_pages_from_a_wrong_hash_on_are_refused(wrong: int) -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    export = fetched(source, target, ctx, 0, 3)
    hashes = [b"x" * 32 if i == wrong else h for i, h in enumerate(export.hashes)]
    target.claim("new")
    target.alloc(ctx, [replace(export, hashes=hashes)])
    assert target.metrics.cross_replica_blocks_copied == wrong
    assert target.cached_pages(ctx) == wrong


@pytest.mark.parametrize(
    ("tokens", "apart", "copied"),
    [(PROMPT, {"cache_salt": "s"}, 0), (PROMPT, {"adapter": "a"}, 0), ([1, 2, 3, 9, 5, 6, 7], {}, 1)],
    ids=["salt", "adapter", "tokens"],
)
def test_pages_of_another_prefix_are_refused(tokens, apart, copied: int) -> None:
    source, target = core(), core(replica=1)
    export = fetched(source, target, serve(source, "old", PROMPT), 0, 3)
    target.claim("new")
    target.alloc(TextContext("new", tokens, 99, **apart), [export])
    assert target.metrics.cross_replica_blocks_copied == copied


def test_pages_of_another_layout_or_seed_are_refused() -> None:
    target = core(replica=2)
    for source in (
        core(head_dim=4),
        core(dtype="float16"),
        core(kv_hash_seed=b"s" * 32),
    ):
        old = serve(source, "old", PROMPT)
        export = fetched(source, target, old, 0, 3)
        ctx = TextContext("new", PROMPT, 99)
        target.claim("new")
        target.alloc(ctx, [export])
        assert (ctx.tokens.processed, target.usage.cached) == (0, 0)
        target.release("new")


COLLIDING = bytes.fromhex(  # of xxh3's default secret: at these places it cancels what is multiplied with
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee035"
    "90e6813a264c3c2852bb91c300cb88d0658b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcd"
    "b45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031"
    "ce45cb3a8f95160428afd7fbcabb4b407e"
)


def colliding(a: int, b: int) -> list[int]:
    """128 tokens whose xxh3_128 is the same for (a, b) and (b, a), whatever 16 bytes come before them."""
    tokens = [7] * 128
    for n, high in ((2, a), (4, b)):
        at = (64 * n + 8) // 4
        tokens[at : at + 2] = int.from_bytes(COLLIDING[8 * n + 24 : 8 * n + 28], "little", signed=True), high
    return tokens


def test_pages_that_were_made_to_collide_are_told_apart() -> None:
    one, other = ([*colliding(*each), 1] for each in ((1, 2), (2, 1)))
    data = [np.array(tokens[:128], np.int32).tobytes() for tokens in (one, other)]
    assert len({xxhash.xxh3_128_digest(bytes(16) + each) for each in data}) == 1, "the hash can be made to collide"
    source, target = (core(pages=4, replica=r, page_size=128, kv_hash_algo="xxh3_128") for r in (0, 1))
    export = fetched(source, target, serve(source, "old", one), 0, 1)
    target.claim("new")
    ctx = TextContext("new", other, 999)
    assert target.alloc(ctx, [export]).total == 0


@pytest.mark.parametrize("kind", ["null", "local", "tiered"])
def test_where_a_tier_goes_by_names_nobody_can_forge_them(kind: str) -> None:
    params = replace(core(kv_hash_algo="xxh3_128").params, kv_connector=kind)
    assert params.page_hash_algo == ("xxh3_128" if kind == "null" else "sha256")
    assert replace(params, kv_hash_algo="sha256").page_hash_algo == "sha256"


def test_a_refused_alloc_with_copies_leaves_no_trace() -> None:
    source, target = core(), core(pages=4, replica=1)
    serve(source, "old", PROMPT)
    serve(target, "hold", [9] * 6, keep=True)  # 3 of 4 pages
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    before = (target.usage, target.metrics, target.blocks("new"))
    with pytest.raises(InsufficientBlocksError, match=r"needs 4 more page.*1 of 4 are free"):
        target.alloc(ctx, [fetched(source, target, ctx, 0, 3)])
    assert (target.usage, target.metrics, target.blocks("new")) == before
    assert (ctx.tokens.processed, ctx.cached_prefix_length) == (0, None)


def test_pins_survive_pressure_and_are_not_free() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    export = source.exports.export(old, 0, 2)
    assert source.usage.free == 6
    evict_all(source)
    assert source.cached_pages(old) == 2
    source.exports.acknowledge(export.export_id)
    assert source.usage.free == 8
    evict_all(source)
    assert source.cached_pages(old) == 0


def test_pins_are_given_up_for_a_request_that_fits_without_them() -> None:
    """Its copies are computed at their target instead; whose line has to know of it is asked."""
    source, told = core(), []
    old = serve(source, "old", PROMPT)
    exports = [source.exports.export(old, 0, stop) for stop in (1, 3)]
    acknowledge = source.exports.take_back
    source.exports.take_back = lambda export_id: (told.append(export_id), acknowledge(export_id))[1]
    source.claim("small")
    source.alloc(TextContext("small", [8] * 10, 99))
    assert source.cached_pages(old) == 3 and not told, "five of eight were free"
    source.release("small")
    source.claim("large")
    source.alloc(TextContext("large", [7] * 16, 99))
    assert sorted(told) == [each.export_id for each in exports] and len(source.blocks("large")) == 8
    source.release("large")
    source.check_integrity()


def test_pins_are_kept_where_giving_them_up_would_not_do() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    serve(source, "held", [9] * 7, keep=True)  # four pages of its own
    export = source.exports.export(old, 0, 3)
    held = source.exports.export(TextContext("h", [9] * 7, 99), 0, 3)  # pages that are not free without the pin
    source.claim("large")
    with pytest.raises(InsufficientBlocksError, match=r"needs 5 more page.*1 of 8 are free"):
        source.alloc(TextContext("large", [7] * 10, 99))
    assert len(source.exports.tips) == 2 and source.cached_pages(old) == 3
    source.alloc(TextContext("large", [7] * 8, 99))
    assert not source.exports.tips
    for export_id in (export.export_id, held.export_id):
        source.exports.acknowledge(export_id)
    source.check_integrity()


def test_a_decode_step_takes_pinned_pages() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    ctx = serve(source, "runs", [9] * 9, keep=True)  # five pages, the last of which is full now
    source.exports.export(old, 0, 3)
    ctx.update(8)
    assert source.alloc_many([ctx]) == {} and not source.exports.tips
    source.check_integrity()


def test_an_export_of_what_was_evicted_meanwhile_is_shorter() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    source.reset_prefix_cache()
    for start in (0, 1):
        export = source.exports.export(old, start, 3)
        assert (export.hashes, len(export.pages)) == ([], 0)
        source.exports.acknowledge(export.export_id)
    source.check_integrity()


def test_acknowledging_twice_or_something_unknown_does_nothing() -> None:
    source = core()
    old = serve(source, "old", PROMPT)
    export = source.exports.export(old, 0, 3)
    for export_id in (export.export_id, export.export_id, 77):
        source.exports.acknowledge(export_id)
    assert source.usage.free == 8
    source.check_integrity()


def test_pins_whose_time_is_up_are_given_back() -> None:
    source, now = core(), [0.0]
    old = serve(source, "old", PROMPT)
    to, line = Peer(1, 1), StoreLine(source.buffers)
    port = PagePort(Peer(0, 1), source.exports, 1, "127.0.0.1", [line], lambda: now[0])
    port.pin(old, 0, 3, to, line.kind)
    now[0] = 10.0
    port.pin(old, 0, 1, to, line.kind)
    now[0] = EXPORT_SECONDS
    assert port.unpin_late() == 0 and source.usage.free == 5
    now[0] += 1
    assert port.unpin_late() == 1 and source.usage.free == 7
    now[0] += 10
    assert port.unpin_late() == 1 and source.usage.free == 8 and not port.pinned
    source.check_integrity()


def test_an_export_does_not_change_the_eviction_order() -> None:
    plain, pinned = core(pages=6), core(pages=6)
    orders = []
    for at in (plain, pinned):
        old = serve(at, "old", PROMPT)
        new = serve(at, "new", [9] * 5)
        if at is pinned:
            at.exports.acknowledge(at.exports.export(old, 0, 2).export_id)
        order = []
        for pages in range(1, 7):
            at.claim("eater")
            at.alloc(TextContext("eater", [8] * 2 * pages, 99))
            order.append((at.cached_pages(old), at.cached_pages(new)))
            at.release("eater")
        orders.append(order)
    assert orders[0] == orders[1]
    assert orders[0][-1] == (0, 0)


def test_a_request_that_ends_while_its_prefix_is_being_copied() -> None:
    """Export, release, acknowledge, evict: never a hit with another prefix's content."""
    source = core(pages=4)
    old = serve(source, "old", PROMPT, keep=True)
    export = source.exports.export(old, 0, 2)
    source.release("old")
    source.exports.acknowledge(export.export_id)
    source.claim("one page")
    source.alloc(TextContext("one page", [8, 8], 99))  # takes the empty page
    source.claim("another")
    source.alloc(TextContext("another", [8, 8], 99))  # evicts the deepest
    assert source.cached_pages(TextContext("q", PROMPT, 99)) == 2
    assert source.cached_pages(TextContext("q", [1, 2, 5, 6, 0], 99)) == 1
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
    many = tokens * 6
    for tokens_, pending, pages in ((0, 0, 0), (2, 0, 0), (3, 0, 1), (15, 0, 7), (16, 1, 7), (17, 2, 7), (31, 0, 15)):
        keys = PageKeys(hasher, 2).of(many[: 4 * tokens_], (None, None), pending)
        assert keys == [int.from_bytes(each[:8], "little") for each in hasher.chain(root, many)[:pages]]


def test_roots_differ_by_seed_salt_and_adapter() -> None:
    keys = [(None, None), ("", None), (None, ""), ("a", "b"), ("a:b", None), ("ab", None), (None, "ab"), ("a", None)]
    roots = [PageHasher("sha256", seed, 1).root(key) for seed in (b"", b"s" * 32) for key in keys]
    assert len(set(roots)) == len(roots)


# -- copies that do not come -------------------------------------------------------------------------


def broken(imported: PageImport, good: int = 0) -> PageImport:
    """Its line breaks after `good` pages; the others are garbage by then."""

    def fill(first, pages) -> None:
        if good:
            imported.fill(first, pages[:good])
        raise LineError("test", 0, "cut")

    return replace(imported, fill=fill)


@pytest.mark.parametrize("local", [0, 1])
def test_pages_of_a_broken_line_are_the_requests_own_and_computed(local: int) -> None:
    source, target = core(), core(replica=1)
    serve(source, "old", PROMPT)
    if local:
        serve(target, "part", PROMPT[:3])
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [broken(fetched(source, target, ctx, local, 3), 1)])
    assert (ctx.tokens.processed, ctx.tokens.end, target.cached_pages(ctx)) == (2 * local, 7, local)
    assert target.metrics.cross_replica_blocks_copied == 0
    assert len(target.blocks("new")) == 4
    inputs = target.runtime_inputs([ctx])
    write_window(inputs, [ctx])
    ctx.update(99)
    target.step([ctx])
    assert right_content(target, "new")
    target.release("new")
    assert target.usage.free == 8
    target.check_integrity()


def test_what_came_before_a_line_broke_is_kept() -> None:
    one, two, target = core(), core(replica=1), core(replica=2)
    serve(one, "a", PROMPT[:3])
    serve(two, "b", PROMPT)
    ctx = TextContext("new", PROMPT, 99)
    target.claim("new")
    target.alloc(ctx, [fetched(one, target, ctx, 0, 1), broken(fetched(two, target, ctx, 1, 3))])
    assert (ctx.tokens.processed, target.metrics.cross_replica_blocks_copied) == (2, 1)
    target.check_integrity()


@pytest.mark.parametrize("landed", [False, True])
def test_a_chunk_whose_pages_made_way_for_copies_starts_where_they_end(landed: bool) -> None:
    """The request has computed part of a page, which it gives up for the copied one."""
    source, target = core(page_size=4), core(page_size=4, replica=1)
    prompt = list(range(1, 14))
    serve(source, "old", prompt)
    ctx = TextContext("new", prompt, 99)
    ctx.tokens.end = 2
    target.claim("new")
    target.alloc(ctx)
    write_window(target.runtime_inputs([ctx]), [ctx])
    ctx.tokens.processed, ctx.tokens.end = 2, 5
    imported = fetched(source, target, ctx, 0, 3)
    target.alloc(ctx, [imported if landed else broken(imported)])
    assert (ctx.tokens.processed, ctx.tokens.end) == ((12, 13) if landed else (0, 3))
    target.check_integrity()
    target.release("new")
    assert target.usage.free == 8


def test_a_request_that_was_handed_over_moves_back_once_and_commits() -> None:
    """Its first alloc with its own context computes what was not cached here; later ones go on, page by page."""
    target = core(pages=16)
    ctx = TextContext("moved", PROMPT, 99)
    ctx.tokens.processed = 6
    target.claim("moved")
    target.accept_handover(TextContext("moved", PROMPT, 99))
    windows = []
    for step in range(5):
        target.alloc(ctx)
        windows.append((ctx.tokens.processed, ctx.tokens.end))
        ctx.update(50 + step)
        target.step([ctx])
    assert windows == [(0, 7), (7, 8), (8, 9), (9, 10), (10, 11)]
    assert target.requests["moved"].committed == 5 == target.usage.cached
