"""alloc as a transaction on a replica: hold what matches, count what is missing, then take it all or undo the hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.prefix_tree import Segment
from rayk.kvcache.request import NOTHING_REUSED, Request, Reused

if TYPE_CHECKING:
    from rayk.kvcache.replica import ReplicaCore


def slots_needed(core: ReplicaCore, ctx: TextContext) -> int:
    """Slots that the request's pages must offer: as in MAX 26.5, and never less than the active window."""
    length = ctx.tokens.length
    if ctx.plain:
        return length + core.extra_slots
    slots = length + len(ctx.maybe_accepted_draft_tokens) + core.extra_slots + 1
    placeholders = ctx.pending_future_count
    return slots - 1 if placeholders < 2 else max(slots - placeholders, ctx.tokens.end)


def reusable_pages(core: ReplicaCore, ctx: TextContext) -> int:
    """Leading pages of the request that may come from a cache: all full ones before its last token."""
    placeholders = ctx.pending_future_count
    return (ctx.tokens.length - (placeholders if placeholders > 1 else 1)) // core.page_size


def allocate(core: ReplicaCore, request: Request, ctx: TextContext, imports: Sequence[PageImport]) -> Reused:
    """ReplicaCore.alloc() for what is more than a decode step within the pages at hand."""
    window = ctx.tokens
    if core.unpublished:
        core.publish()
    loads = core.loads
    if loads is not None and loads.under_way:
        core.settle([ctx])
    if request.ctx is None or not request.pages:
        request.ctx = ctx
        ctx.generation = request.generation
    elif request.ctx is not ctx:
        core.adopt(request, ctx)
    size, pool, tree, row = core.page_size, core.pool, core.tree, request.row
    slots, reusable = _needs(core, ctx, window.length)
    processed, end, held = window.processed, window.end, request.pages
    active = end - processed
    if not held:  # whatever was computed for it is not here any more: what is not reused is computed again
        window.processed = 0
    elif request.handed:
        window.processed = min(processed, request.committed * size)
    first, looks = window.processed == 0, core.caching and end - window.processed != 1
    tip, hits, copied = _reuse(core, ctx, request, reusable, imports) if looks else (request.tip, 0, 0)
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
        if core.exports.give_up(need - free):
            return allocate(core, request, ctx, imports)
        raise InsufficientBlocksError(ctx.request_id, core.replica, need + copied, free + copied, core.num_pages)
    # From here on nothing fails, but copies on their way: their pages are the request's all the same, to be computed.
    reused = NOTHING_REUSED
    if hits or copied:
        assert tip is not None
        landed = _attach(core, ctx, request, tip, hits, copied, imports)
        window.processed = request.committed * size
        if window.processed >= end or (window.processed < processed and end < window.length):
            # the hit covers the chunk, or what it went on from is gone: keep its size, move it
            window.end = min(window.length, window.processed + active)
        core.device_hits += hits
        core.peer_hits += landed
        reused = Reused(hits * size, landed * size)
    else:
        request.tip = tip
    if need > 0:
        if need > pool.empty:
            tree.make_room(need)
        wanted = keep + need
        if wanted > core.table.width:
            core.table.widen(wanted)
        core.table.rows[row][keep:wanted] = pool.take(need) if loads is None else core.take(need)
        keep = wanted
    request.pages = keep
    request.room = keep * size
    if request.bound:
        core.table.room[row] = request.room
        core.table.version += 1
    if loads is not None and looks:
        if reusable > request.committed:
            host, disk = loads.start(ctx, request, reusable)
            if host or disk:
                reused = Reused(reused.device_tokens, reused.peer_tokens, host * size, disk * size)
        if copied:
            loads.flush()
    if first and looks:
        ctx.cached_prefix_length = window.processed
    core.input_tokens += window.end - window.processed
    core.check()
    return reused


def _needs(core: ReplicaCore, ctx: TextContext, length: int) -> tuple[int, int]:
    """slots_needed() and _reusable(). InsufficientBlocksError when not even all pages would do."""
    size = core.page_size
    if ctx.plain:
        slots, reusable = length + core.extra_slots, (length - 1) // size
    else:
        slots, reusable = slots_needed(core, ctx), reusable_pages(core, ctx)
        length += len(ctx.draft_tokens_to_verify) + len(ctx.maybe_accepted_draft_tokens)
    if length > core.num_pages * size:
        needed = -(-max(length, slots) // size)
        raise InsufficientBlocksError(ctx.request_id, core.replica, needed, core.free, core.num_pages)
    return slots, reusable


def _reuse(
    core: ReplicaCore, ctx: TextContext, request: Request, stop: int, imports: Sequence[PageImport]
) -> tuple[Segment | None, int, int]:
    """Hold the cached pages that continue the request's committed ones, up to page `stop`.

    The new tip, how many pages it adds, and how many pages to take from `imports` after them.
    """
    start, size, tree = request.committed, core.page_size, core.tree
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
    return tip, hits, min(core.exports.usable(ctx, start + hits, stop, imports), core.free)


def _attach(
    core: ReplicaCore,
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
    size, start = core.page_size, request.committed
    if start + hits + copied > core.table.width:
        core.table.widen(start + hits + copied)
    row = core.table.rows[request.row]
    own = row[start : request.pages].copy() if request.pages > start else None
    if hits:
        row[start : start + hits] = core.tree.path_pages(tip, request.tip)
    landed, pages = 0, row[start + hits : start + hits + copied]
    if copied:
        core.tree.make_room(copied)
        pages[:] = core.take(copied)
        landed = core.exports.land(pages, start + hits, imports)
    if landed:
        tokens = ctx.tokens.data[(start + hits) * size : (start + hits + landed) * size]
        tip, _ = core.tree.commit(tip, tokens, pages[:landed])
    if own is not None:
        core.pool.give(own)
        row[start + hits + copied : request.pages] = core.num_pages
    request.tip = tip
    request.committed = start + hits + landed
    request.due = (request.committed + 1) * size
    if request.bound:
        core.table.due[request.row] = request.due
    return landed
