"""alloc as a transaction on a replica: hold what matches, count what is missing, then take it all or undo the hold."""

from __future__ import annotations

from collections.abc import Sequence

from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.request import NOTHING_REUSED, Request, Reused
from rayk.kvcache.segment import Segment
from rayk.kvcache.state import CacheState


def allocate(state: CacheState, request: Request, ctx: TextContext, imports: Sequence[PageImport]) -> Reused:
    """ReplicaCore.alloc() for what is more than a decode step within the pages at hand."""
    window = ctx.tokens
    if state.unpublished:
        state.publish()
    loads = state.loads
    if loads is not None and loads.under_way:
        state.wait_for_loads([ctx])
    if request.ctx is not ctx or not request.pages:
        state.rebind_context(request, ctx)
    size, pool, tree = state.page_size, state.pool, state.tree
    length = window.length
    if ctx.plain:
        slots, reusable = length + state.extra_slots, (length - 1) // size
    else:
        slots, reusable = state.slots_needed(ctx), state.reusable_pages(ctx)
        length += len(ctx.draft_tokens_to_verify) + len(ctx.maybe_accepted_draft_tokens)
    if length > state.num_pages * size:  # not even all pages would do
        needed = -(-max(length, slots) // size)
        raise InsufficientBlocksError(ctx.request_id, state.replica, needed, state.free, state.num_pages)
    processed, end, held = window.processed, window.end, request.pages
    active = end - processed
    if not held:  # what was computed for it is gone: what is not reused is computed again
        window.processed = 0
    elif request.handed_over:
        window.processed = min(processed, request.committed * size)
    first, looks = window.processed == 0, state.caching and end - window.processed != 1
    tip, hits, copied = _reuse(state, ctx, request, reusable, imports) if looks else (request.tip, 0, 0)
    keep, free = held, pool.empty + tree.evictable - copied
    if hits or copied:  # the request's own pages make way for the hits
        keep = request.committed + hits + copied
        free += held - request.committed
    need = -(-slots // size) - keep
    if need > free:
        window.processed = processed
        if tip is not request.tip:
            assert tip is not None
            tree.undo(tip, request.tip)
        if state.exports.give_up(need - free):
            return allocate(state, request, ctx, imports)
        raise InsufficientBlocksError(ctx.request_id, state.replica, need + copied, free + copied, state.num_pages)
    # From here on nothing fails, but copies on their way: their pages are the request's all the same, to be computed.
    reused = NOTHING_REUSED
    if hits or copied:
        assert tip is not None
        landed = _attach(state, ctx, request, tip, hits, copied, imports)
        window.processed = request.committed * size
        lost = landed < copied and window.processed < processed and end < window.length
        if window.processed >= end or lost:  # the hit covers the chunk, or copies in its place failed: keep its size
            window.end = min(window.length, window.processed + active)
        reused = Reused(hits * size, landed * size)
    elif tip is not request.tip:
        state.advance(request, tip, request.committed)
    if need > 0:
        if need > pool.empty:
            tree.make_room(need)
        wanted = keep + need
        if wanted > state.table.width:
            state.table.widen(wanted)
        state.table.rows[request.row][keep:wanted] = pool.take(need) if loads is None else state.take(need)
        keep = wanted
    state.set_pages(request, keep)
    if loads is not None and looks:
        if reusable > request.committed:
            host, disk = loads.start(ctx, request, state.table.rows[request.row][:reusable])
            if host or disk:
                reused = Reused(reused.device_tokens, reused.peer_tokens, host * size, disk * size)
                if ctx.request_id in loads.under_way:
                    state.suspend(request)
        if copied:
            loads.flush()
    if first and looks:
        ctx.cached_prefix_length = window.processed
    return reused


def _reuse(
    state: CacheState, ctx: TextContext, request: Request, stop: int, imports: Sequence[PageImport]
) -> tuple[Segment | None, int, int]:
    """Hold the cached pages that continue the request's committed ones, up to page `stop`.

    The new tip, how many pages it adds, and how many pages to take from `imports` after them.
    """
    start, size, tree = request.committed, state.page_size, state.tree
    if stop <= start:
        return request.tip, 0, 0
    base = request.tip
    if base is None:
        base = tree.hold_root(ctx.root_key) if imports else tree.find_root(ctx.root_key)
    if base is None:
        return None, 0, 0
    tip, hits = tree.extend(base, ctx.tokens.data[start * size : stop * size])
    if not imports:
        if not hits:
            return request.tip, 0, 0
        if request.tip is None:
            tree.hold_root(ctx.root_key)
        return tip, hits, 0
    return tip, hits, min(state.exports.usable(ctx, start + hits, stop, imports), state.free)


def _attach(
    state: CacheState,
    ctx: TextContext,
    request: Request,
    tip: Segment,
    hits: int,
    copied: int,
    imports: Sequence[PageImport],
) -> int:
    """Put the held hits into the request's row, then copies; its own pages from there on go back.

    How many copies have landed. Those are committed; the pages of the others are the request's own.
    """
    size, start = state.page_size, request.committed
    if start + hits + copied > state.table.width:
        state.table.widen(start + hits + copied)
    row = state.table.rows[request.row]
    own = row[start : request.pages].copy() if request.pages > start else None
    if hits:
        row[start : start + hits] = tip.path_pages(request.tip)
    landed, pages = 0, row[start + hits : start + hits + copied]
    if copied:
        state.tree.make_room(copied)
        pages[:] = state.take(copied)
        landed = state.exports.land(pages, start + hits, imports)
    if landed:
        tokens = ctx.tokens.data[(start + hits) * size : (start + hits + landed) * size]
        tip, _ = state.tree.commit(tip, tokens, pages[:landed])
    if own is not None:
        state.pool.give(own)
        row[start + hits + copied : request.pages] = state.num_pages
    state.advance(request, tip, start + hits + landed)
    return landed
