"""Filling one replica's lookup table for a batch, and the bounds that it has to keep to."""

from __future__ import annotations

from collections.abc import Sequence

from rayk.context import TextContext
from rayk.errors import RuntimeInputsError
from rayk.kvcache.runtime_inputs import BatchCharacteristics, BatchShape
from rayk.kvcache.state import CacheState


def table_width(pages: int) -> int:
    """Columns of a lookup table whose longest row shows `pages` pages. The rule of MAX 26.5."""
    return 8 * -(-pages // 8) + 16


def fill_batch(
    state: CacheState,
    batch: Sequence[TextContext],
    max_cache_length: int | None,
    characteristics: BatchCharacteristics | None,
) -> tuple[int, int, BatchShape]:
    """Fill the replica's host arrays; rows, table width and scalars. RuntimeInputsError and BatchError change
    nothing."""
    size, extra = state.page_size, state.extra_slots
    rows: list[int] = []
    lengths: list[int] = []
    trims: list[tuple[int, int]] = []
    most = prompt = cache = 0
    try:
        requests = state.requests_of(batch)
    except KeyError as missing:
        raise RuntimeInputsError(
            state.replica, f"request {missing.args[0]!r} is not claimed here; call claim() and alloc() first"
        ) from None
    for ctx, request in zip(batch, requests, strict=True):
        window = ctx.tokens
        processed, end = window.processed, window.end
        slots, active = window.length + extra, end - processed
        if not ctx.plain:
            slots = state.slots_needed(ctx)
            accepted, verify = len(ctx.maybe_accepted_draft_tokens), len(ctx.draft_tokens_to_verify)
            processed, end, active = processed + accepted, end + accepted + verify, active + verify
        capacity = request.slot_capacity
        if not capacity - size < slots <= capacity:  # the table does not show just the request's pages
            if slots > capacity and not request.dummy:
                raise _too_few_pages(state, ctx, slots, request.pages)
            trims.append((len(rows), 0 if request.dummy else -(-slots // size)))
        rows.append(request.row)
        lengths.append(processed)
        if slots > most:
            most = slots
        if active > prompt:
            prompt = active
        if end > cache:
            cache = end
    longest, cache = -(-most // size), cache + state.params.num_draft_tokens if rows else 0
    shape = BatchShape(len(rows), prompt, cache)
    longest, shape = bounded(state, longest, shape, max_cache_length, characteristics)
    width = table_width(longest)
    table, cache_lengths = state.stage.host_views(len(rows), width)
    if rows:
        filled = min(width, state.table.width)
        table[:, :filled] = state.table.cells[rows, :filled]  # np.take would copy the whole of a slice first
        table[:, filled:] = state.num_pages
        for at, count in trims:
            table[at, count:] = state.num_pages
        cache_lengths[:] = lengths
    return len(rows), width, shape


def _too_few_pages(state: CacheState, ctx: TextContext, slots: int, pages: int) -> RuntimeInputsError:
    return RuntimeInputsError(
        state.replica,
        f"request {ctx.request_id!r} needs {-(-slots // state.page_size)} page(s) for {slots} slots and has {pages}; "
        "call alloc() first",
    )


def bounded(
    state: CacheState,
    longest: int,
    shape: BatchShape,
    max_cache_length: int | None,
    characteristics: BatchCharacteristics | None,
) -> tuple[int, BatchShape]:
    """Pages of the longest row and scalars after the caller's bounds, or RuntimeInputsError."""
    size = state.params.page_size

    def refuse(message: str) -> RuntimeInputsError:
        return RuntimeInputsError(state.replica, message)

    if max_cache_length is not None:
        if max_cache_length < 1:
            raise refuse(f"max_cache_length must be at least 1, got {max_cache_length}")
        if -(-max_cache_length // size) < longest:
            raise refuse(f"max_cache_length {max_cache_length} is less than the {longest} page(s) of {size} in use")
        longest = -(-max_cache_length // size)
    if shape.rows > state.max_batch_size:
        raise refuse(f"{shape.rows} requests in a batch, max_batch_size is {state.max_batch_size}; send fewer")
    if longest > state.num_pages:
        raise refuse(f"{longest} pages in a row, the replica has {state.num_pages}; lower max_cache_length")
    if characteristics is not None:
        if any(real > bound for real, bound in zip(shape, characteristics, strict=True)):
            raise refuse(f"the batch is {tuple(shape)} (rows, prompt, cache), its bounds are {tuple(characteristics)}")
        shape = BatchShape(*characteristics)
    return longest, shape
