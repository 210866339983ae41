"""What a replica that is about to leave has cached, and what another one keeps of it.

A release stamps the segments that it frees with one tick (rayk.kvcache.prefix_tree). The deepest of them, its tip,
stands for the prefix that was in use; list_prefixes() lists them, last released first. Every cached page is a *fresh*
page of exactly one of them: the segments above with a later tick belong to prefixes that were listed before.

adopt_pages() fills empty pages only: it evicts nothing, so no cache pays for what comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayk.context import TextContext
from rayk.kvcache.page_hash import RootKey
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.segment import Root, Segment

SPARE = 32  # one page of so many stays empty, for requests that run here


class CachedPrefix(NamedTuple):
    """`tokens` (raw int32) fill its pages, from the first one of its root on; the last `fresh` of them are its own."""

    root: RootKey
    tokens: bytes
    fresh: int


def list_prefixes(core: ReplicaCore, skip: int, count: int, size: int) -> list[CachedPrefix]:
    """The cached prefixes after the first `skip`, last released first: at most `count`, and as many as have `size`
    bytes of tokens together, but at least one if there is one. Changes nothing."""
    core.publish()
    tips = [node for node in core.tree.segments() if all(c.tick != node.tick for c in node.children.values())]
    tips.sort(key=lambda node: -node.tick)
    found, total = list[CachedPrefix](), 0
    for tip in tips[skip : skip + count]:
        prefix = _path(tip)
        total += len(prefix.tokens)
        if found and total > size:
            break
        found.append(prefix)
    return found


def _path(tip: Segment) -> CachedPrefix:
    parts, fresh, node = list[bytes](), 0, tip
    while node.parent is not None:
        parts.append(node.tokens)
        fresh += len(node.pages) if node.tick == tip.tick else 0
        node = node.parent
    assert isinstance(node, Root)
    return CachedPrefix(node.key, b"".join(reversed(parts)), fresh)


def spare_pages(core: ReplicaCore) -> int:
    """Pages that adopt_pages() may take."""
    if core.unpublished:
        core.publish()
    return max(0, core.pool.empty - core.num_pages // SPARE)


def adopt_pages(core: ReplicaCore, ctx: TextContext, imports: Sequence[PageImport]) -> int:
    """Cache what `imports` add to the prefix of a context, as far as there are spare_pages(); how many pages that is.

    All full pages before its last token count. Only what has landed and bears the right hashes is kept. Afterwards
    the whole prefix, as far as it is cached here, is what was released last.
    """
    size, tree, space = core.page_size, core.tree, spare_pages(core)
    stop = core.may_reuse(ctx)
    tip, have = tree.extend(tree.hold_root(ctx.root_key), ctx.tokens.data[: stop * size])
    landed = 0
    try:
        count = min(core.exports.usable(ctx, have, stop, imports), space)
        if count:
            pages = core.take(count).copy()
            try:
                landed = core.exports.land(pages, have, imports)
            finally:
                core.pool.give(pages[landed:])
            if landed:
                tip, _ = tree.commit(tip, ctx.tokens.data[have * size : (have + landed) * size], pages[:landed])
    finally:
        tree.release(tip)
    core.count(adopted=landed)
    if core.loads is not None:
        core.loads.flush()
    core.check()
    return landed
