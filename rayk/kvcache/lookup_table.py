"""Filling one replica's lookup table for a batch, and the checks that refuse a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayk.context import TextContext
from rayk.errors import BatchError, RuntimeInputsError
from rayk.kvcache.allocation import slots_needed
from rayk.kvcache.runtime_inputs import BatchCharacteristics, BatchShape

if TYPE_CHECKING:
    from rayk.kvcache.replica import ReplicaCore


def table_width(pages: int) -> int:
    """Columns of a lookup table whose longest row shows `pages` pages. The rule of MAX 26.5."""
    return 8 * -(-pages // 8) + 16


def refuse_twice(request_ids: Sequence[str], replica: int) -> None:
    """BatchError that names the first request that is there twice."""
    seen: set[str] = set()
    for request_id in request_ids:
        if request_id in seen:
            raise BatchError(f"request {request_id!r} is twice in one batch for replica {replica}; name it once")
        seen.add(request_id)


def fill_batch(
    core: ReplicaCore,
    batch: Sequence[TextContext],
    max_cache_length: int | None,
    characteristics: BatchCharacteristics | None,
) -> tuple[int, int, BatchShape]:
    """Fill the core's host arrays; rows, table width and scalars. RuntimeInputsError and BatchError change
    nothing."""
    size, extra = core.page_size, core.extra_slots
    rows: list[int] = []
    lengths: list[int] = []
    trims: list[tuple[int, int]] = []
    most = prompt = cache = 0
    try:
        requests = core.requests_of(batch)
    except KeyError as missing:
        raise RuntimeInputsError(
            core.replica, f"request {missing.args[0]!r} is not claimed here; call claim() and alloc() first"
        ) from None
    for ctx, request in zip(batch, requests, strict=True):
        window = ctx.tokens
        processed, end = window.processed, window.end
        slots, active = window.length + extra, end - processed
        if not ctx.plain:
            slots = slots_needed(core, ctx)
            accepted, verify = len(ctx.maybe_accepted_draft_tokens), len(ctx.draft_tokens_to_verify)
            processed, end, active = processed + accepted, end + accepted + verify, active + verify
        room = request.room
        if not room - size < slots <= room:  # the table does not show just the request's pages
            if slots > room and not request.dummy:
                raise _too_few_pages(core, ctx, slots, request.pages)
            trims.append((len(rows), 0 if request.dummy else -(-slots // size)))
        rows.append(request.row)
        lengths.append(processed)
        if slots > most:
            most = slots
        if active > prompt:
            prompt = active
        if end > cache:
            cache = end
    longest, cache = -(-most // size), cache + core.params.num_draft_tokens if rows else 0
    shape = BatchShape(len(rows), prompt, cache)
    longest, shape = bounded(core, longest, shape, max_cache_length, characteristics)
    width = table_width(longest)
    table, cache_lengths = core.stage.host_views(len(rows), width)
    core.stage.shown = None
    if rows:
        filled = min(width, core.table.width)
        table[:, :filled] = core.table.cells[rows, :filled]  # np.take would copy the whole of a slice first
        table[:, filled:] = core.num_pages
        for at, count in trims:
            table[at, count:] = core.num_pages
        cache_lengths[:] = lengths
    return len(rows), width, shape


def _too_few_pages(core: ReplicaCore, ctx: TextContext, slots: int, pages: int) -> RuntimeInputsError:
    return RuntimeInputsError(
        core.replica,
        f"request {ctx.request_id!r} needs {-(-slots // core.page_size)} page(s) for {slots} slots and has {pages}; "
        "call alloc() first",
    )


def bounded(
    core: ReplicaCore,
    longest: int,
    shape: BatchShape,
    max_cache_length: int | None,
    characteristics: BatchCharacteristics | None,
) -> tuple[int, BatchShape]:
    """Pages of the longest row and scalars after the caller's bounds, or RuntimeInputsError."""
    size = core.params.page_size

    def refuse(message: str) -> RuntimeInputsError:
        return RuntimeInputsError(core.replica, message)

    if max_cache_length is not None:
        if max_cache_length < 1:
            raise refuse(f"max_cache_length must be at least 1, got {max_cache_length}")
        if -(-max_cache_length // size) < longest:
            raise refuse(f"max_cache_length {max_cache_length} is less than the {longest} page(s) of {size} in use")
        longest = -(-max_cache_length // size)
    if shape.rows > core.max_batch_size:
        raise refuse(f"{shape.rows} requests in a batch, max_batch_size is {core.max_batch_size}; send fewer")
    if longest > core.num_pages:
        raise refuse(f"{longest} pages in a row, the replica has {core.num_pages}; lower max_cache_length")
    if characteristics is not None:
        if any(real > bound for real, bound in zip(shape, characteristics, strict=True)):
            raise refuse(f"the batch is {tuple(shape)} (rows, prompt, cache), its bounds are {tuple(characteristics)}")
        shape = BatchShape(*characteristics)
    return longest, shape
