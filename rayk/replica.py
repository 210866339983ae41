"""One replica's cache: requests, their pages, the prefix tree over them, and the tensors behind them.

No Ray, no threads, no clock: a plain object that changes only through its methods. `alloc` is a
transaction. A request is claimed -> allocated -> .. -> released; its pages are, in sequence order, first
*committed* ones (in the prefix tree, maybe shared) and then its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from rayk import decode
from rayk.batch import ContextBatch
from rayk.buffers import PageBuffers
from rayk.context import TextContext, TokenWindow
from rayk.errors import AlreadyClaimedError, BatchError, InsufficientBlocksError, IntegrityError, NotClaimedError
from rayk.exports import Exports, PageExport
from rayk.hashing import PageHash
from rayk.inputs import BatchCharacteristics, BatchShape, InputStage, ReplicaInputs
from rayk.loads import Loads
from rayk.lookup import fill_batch
from rayk.metrics import KVCacheMetrics
from rayk.pages import PagePool, Pages
from rayk.params import KVCacheParams
from rayk.prefix import Match, PageListener, PrefixTree, Segment
from rayk.tables import BlockTable
from rayk.tiers.connector import Connector, Tier


class Request:
    """A claimed request. Its row holds `pages` page ids, of which the first `committed` are in the prefix tree."""

    __slots__ = ("bound", "committed", "ctx", "due", "dummy", "pages", "room", "row", "tip")

    def __init__(self, row: int, dummy: bool, due: int) -> None:
        self.row = row
        self.due = due  # processed tokens at which its next page is full, and so to be committed; NEVER for a dummy
        self.bound = 0  # its number in the table's columns once it was in a ContextBatch, see rayk.tables
        self.dummy = dummy
        self.pages = 1 if dummy else 0
        self.room = 0  # slots that its own and shared pages offer: pages x page size, none for a dummy
        self.committed = 0
        self.ctx: TextContext | None = None  # the context it was used with last
        self.tip: Segment | None = None  # end of the held path in the prefix tree, None before the first hit or commit


class Usage(NamedTuple):
    """Pages of one replica, the null page left out: free + used == total; cached pages nobody holds are free."""

    total: int
    free: int
    cached: int

    @property
    def used(self) -> int:
        return self.total - self.free


class Reused(NamedTuple):
    """Tokens that an alloc found cached: on the replica itself, copied in from other replicas, or in a tier.

    Those from a tier may still be on their way; what fails to arrive is computed.
    """

    device_tokens: int
    peer_tokens: int
    host_tokens: int = 0
    disk_tokens: int = 0


NOTHING_REUSED = Reused(0, 0)
NEVER = 1 << 62
FEW = 8  # contexts that are looked up one by one


class ReplicaCore:
    """`replica` is its index and `holder_of` finds the replica of a request (-1: none): both are for messages."""

    def __init__(
        self,
        params: KVCacheParams,
        replica: int,
        num_pages: int,
        max_batch_size: int,
        devices: Sequence[str] | None = None,
        runtime_checks: bool = False,
        holder_of: Callable[[str], int] = lambda _: -1,
    ) -> None:
        devices = tuple(devices or params.replica_devices(replica))
        self.replica = replica
        self.holder_of = holder_of
        self.params = params
        self.num_pages = num_pages
        self.max_batch_size = max_batch_size
        self.runtime_checks = runtime_checks
        self.buffers = PageBuffers(params, num_pages, devices)
        self.stage = InputStage(self.buffers, devices, max_batch_size)
        self.requests: dict[str, Request] = {}
        self.table = BlockTable(num_pages, min(max_batch_size, 256))
        self.page_size = params.page_size
        # S = L + accepted drafts + 2 D + 1 + B - max(1, placeholders), as in MAX 26.5; here without the L
        self.extra_slots = 2 * params.num_draft_tokens + params.block_draft_slots
        self._pool = PagePool(num_pages)
        self._tree = PrefixTree(params.page_size, self._pool)
        self._caching = params.enable_prefix_caching
        self.exports = Exports(params, self._tree, self.buffers)
        self._bytes_per_page = params.bytes_per_page
        self._claims = 0  # claims and releases so far
        self._last: tuple[int, list[TextContext], list[Request]] = (0, [], [])  # see requests_of()
        self._unpublished: list[ContextBatch] = []  # stepped, and not yet looked at for full pages
        self._eager = False  # somebody listens: publish at once
        self._input_tokens = self._device_hits = self._peer_hits = self._evicted_before = 0
        self._loads: Loads | None = None
        self._loads_before = KVCacheMetrics()

    def connect(self, connector: Connector) -> None:
        """Offload what is cached from now on to `connector`, and load from it. Before any request; once.

        The core owns it: shutdown() shuts it down.
        """
        self._loads = Loads(self, connector)
        self.listen(self._loads)

    def listen(self, listener: PageListener) -> None:
        """Hash every page that is cached from now on and tell `listener`, and what is dropped. Before any request."""
        self._tree.listen(listener, self.exports.hasher)
        self._eager = True

    def page_hashes(self) -> Iterator[bytes]:
        """The hash of every cached page, once somebody listens."""
        return self._tree.hashes()

    # -- claims ----------------------------------------------------------------------------------

    def claim(self, request_id: str, dummy: bool = False) -> None:
        """Reserve a place for the request; takes no page. A dummy has the null page for its only page."""
        if request_id in self.requests:
            raise AlreadyClaimedError(request_id, self.replica)
        due = NEVER if dummy or not self._caching else self.page_size
        self.requests[request_id] = Request(self.table.acquire(), dummy, due)
        self._claims += 1

    def bind(self, request: Request) -> None:
        """Keep the table's columns for this request from now on, see rayk.tables."""
        table, row = self.table, request.row
        request.bound = table.serial[row] = table.bind()
        table.room[row], table.due[row] = request.room, request.due

    def release(self, request_id: str) -> None:
        """Forget the request. Its committed pages become evictable, deepest first; the others are empty."""
        if self._unpublished:
            self.publish()
        request = self.requests.pop(request_id, None)
        if request is None:
            raise self.not_claimed(request_id)
        self._claims += 1
        if self._loads is not None:
            self._loads.cancel(request_id)
            if request.tip is not None:
                tree = self._tree
                self._loads.released(tree.path_hashes(request.tip), tree.path_pages(request.tip))
        pages, committed = request.pages, request.committed
        if pages > committed and not request.dummy:
            self._pool.give(self.table.rows[request.row][committed:pages])
        if request.tip is not None:
            self._tree.release(request.tip)
        if request.bound:
            request.bound = 0
            self.table.unbind(request.row)
        self.table.drop(request.row, pages)
        self._check()

    def blocks(self, request_id: str) -> list[int]:
        """Page ids in sequence order; empty for an unknown request."""
        if self._unpublished:
            self.publish()
        request = self.requests.get(request_id)
        return [] if request is None else self.table.rows[request.row][: request.pages].tolist()

    def not_claimed(self, request_id: str) -> NotClaimedError:
        """The error for a request that is not claimed here."""
        return NotClaimedError(request_id, self.replica, self.holder_of(request_id))

    def requests_of(self, batch: Sequence[TextContext]) -> list[Request]:
        """The request of each context; KeyError (a request id) unless all are claimed.

        The contexts of a running batch are mostly those of the last call, and comparing two lists is the faster way
        to find that out than one lookup for each.
        """
        if len(batch) < FEW:
            return [self.requests[ctx.request_id] for ctx in batch]
        claims, contexts, found = self._last
        if claims != self._claims or batch != contexts:
            requests = self.requests
            found = [requests[ctx.request_id] for ctx in batch]
            self._last = (self._claims, list(batch), found)
        return found

    def _adopt(self, request: Request, ctx: TextContext) -> None:
        """Go on with another context object for a claimed request: fine if it says the same about its pages."""
        old, window = request.ctx, ctx.tokens
        if old is not None and request.pages:
            count = min(old.tokens.length, max(request.committed * self.page_size, window.processed))
            same = np.array_equal(old.tokens.data[:count], window.data[: min(count, window.length)])
            if not same or old.root_key != ctx.root_key:
                raise BatchError(
                    f"request {ctx.request_id!r} on replica {self.replica} has pages for other tokens or another salt "
                    "than this context; release it before you use its id for a new request"
                )
        request.ctx = ctx
        if request.bound:
            request.bound = 0
            self.table.unbind(request.row)

    # -- allocation ------------------------------------------------------------------------------

    def slots_needed(self, ctx: TextContext) -> int:
        """Slots that the request's pages must offer: as in MAX 26.5, and never less than the active window."""
        length = ctx.tokens.length
        if ctx.plain:
            return length + self.extra_slots
        slots = length + len(ctx.maybe_accepted_draft_tokens) + self.extra_slots + 1
        placeholders = ctx.pending_future_count
        return slots - 1 if placeholders < 2 else max(slots - placeholders, ctx.tokens.end)

    def _reusable(self, ctx: TextContext) -> int:
        """Leading pages of the request that may come from a cache: all full ones before its last token."""
        placeholders = ctx.pending_future_count
        return (ctx.tokens.length - (placeholders if placeholders > 1 else 1)) // self.page_size

    def alloc(self, ctx: TextContext, imports: Sequence[PageExport] = ()) -> Reused:
        """Give the request the pages that its tokens need, reusing cached ones and moving its window past them.

        `imports` are copies of further prefix pages from other replicas, in order. InsufficientBlocksError leaves
        no trace: window, pages, metrics, cache and eviction order stay as they were. Returns what was found cached.
        """
        try:
            request = self.requests[ctx.request_id]
        except KeyError:
            raise self.not_claimed(ctx.request_id) from None
        window = ctx.tokens
        if (  # a decode step within the pages that it has, which is what nearly every alloc is
            window.length + self.extra_slots <= request.room
            and window.end - window.processed == 1
            and ctx.plain
            and request.ctx is ctx
        ):
            self._input_tokens += 1
            return NOTHING_REUSED
        if request.dummy:
            return NOTHING_REUSED
        return self._alloc(request, ctx, window, imports)

    def _alloc(self, request: Request, ctx: TextContext, window: TokenWindow, imports: Sequence[PageExport]) -> Reused:
        if self._unpublished:
            self.publish()
        loads = self._loads
        if loads is not None and loads.under_way:
            self.settle([ctx])
        if request.ctx is None or not request.pages:
            request.ctx = ctx
        elif request.ctx is not ctx:
            self._adopt(request, ctx)
        size, pool, tree, row = self.page_size, self._pool, self._tree, request.row
        slots, reusable = self._needs(ctx, window.length)
        processed, end, held = window.processed, window.end, request.pages
        active = end - processed
        if not held:  # whatever was computed for it is not here any more: what is not reused is computed again
            window.processed = 0
        first, looks = window.processed == 0, self._caching and end - window.processed != 1
        tip, hits, copied = self._reuse(ctx, request, reusable, imports) if looks else (request.tip, 0, 0)
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
            raise InsufficientBlocksError(ctx.request_id, self.replica, need + copied, free + copied, self.num_pages)
        # From here on nothing fails.
        reused = NOTHING_REUSED
        if hits or copied:
            assert tip is not None
            self._attach(ctx, request, tip, hits, copied, imports)
            window.processed = keep * size
            if window.processed >= end:  # the hit covers the chunk: keep its size, move it on
                window.end = min(window.length, window.processed + active)
            self._device_hits += hits
            self._peer_hits += copied
            reused = Reused(hits * size, copied * size)
        else:
            request.tip = tip
        if need > 0:
            if need > pool.empty:
                tree.make_room(need)
            wanted = keep + need
            if wanted > self.table.width:
                self.table.widen(wanted)
            self.table.rows[row][keep:wanted] = pool.take(need) if loads is None else self.take(need)
            keep = wanted
        request.pages = keep
        request.room = keep * size
        if request.bound:
            self.table.room[row] = request.room
            self.table.version += 1
        if loads is not None and looks:
            if reusable > request.committed:
                host, disk = loads.start(ctx, request, reusable)
                if host or disk:
                    reused = Reused(reused.device_tokens, reused.peer_tokens, host * size, disk * size)
            if copied:
                loads.flush()
        if first and looks:
            ctx.cached_prefix_length = window.processed
        self._input_tokens += window.end - window.processed
        self._check()
        return reused

    def alloc_many(self, batch: Sequence[TextContext]) -> dict[str, InsufficientBlocksError]:
        """alloc() for each context; what was refused, by request id. The refused ones keep what they had."""
        if self._loads is not None and self._loads.under_way:
            self.settle(batch)
        if type(batch) is ContextBatch and decode.ready(self, batch) and decode.alloc(self, batch):
            self._check()
            return {}
        refused = {}
        for ctx in batch:
            try:
                self.alloc(ctx)
            except InsufficientBlocksError as error:
                refused[ctx.request_id] = error
        return refused

    def count_input(self, tokens: int) -> None:
        """For rayk.decode: so many tokens are left to compute."""
        self._input_tokens += tokens

    def make_room(self, pages: int) -> bool:
        """For rayk.decode: have so many empty pages, by evicting if need be. False when there are too few."""
        if pages > self._pool.empty:
            if pages > self._free:
                return False
            self._tree.make_room(pages)
        return True

    def take(self, pages: int) -> Pages:
        """Empty pages, a view as in PagePool.take(); also for rayk.decode."""
        taken = self._pool.take(pages)
        if self._loads is not None:
            self._loads.connector.reuse(taken)
        return taken

    def _needs(self, ctx: TextContext, length: int) -> tuple[int, int]:
        """slots_needed() and _reusable(). InsufficientBlocksError when not even all pages would do."""
        size = self.page_size
        if ctx.plain:
            slots, reusable = length + self.extra_slots, (length - 1) // size
        else:
            slots, reusable = self.slots_needed(ctx), self._reusable(ctx)
            length += len(ctx.draft_tokens_to_verify) + len(ctx.maybe_accepted_draft_tokens)
        if length > self.num_pages * size:
            needed = -(-max(length, slots) // size)
            raise InsufficientBlocksError(ctx.request_id, self.replica, needed, self._free, self.num_pages)
        return slots, reusable

    def _reuse(
        self, ctx: TextContext, request: Request, stop: int, imports: Sequence[PageExport]
    ) -> tuple[Segment | None, int, int]:
        """Hold the cached pages that continue the request's committed ones, up to page `stop`.

        The new tip, how many pages it adds, and how many pages to take from `imports` after them.
        """
        start, size, tree = request.committed, self.page_size, self._tree
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
        return tip, hits, min(self.exports.usable(ctx, start + hits, stop, imports), self._free)

    def _attach(
        self,
        ctx: TextContext,
        request: Request,
        tip: Segment,
        hits: int,
        copied: int,
        imports: Sequence[PageExport],
    ) -> None:
        """Put the held hits into the request's row, then copies; its own pages from there on go back."""
        size, start = self.page_size, request.committed
        if start + hits + copied > self.table.width:
            self.table.widen(start + hits + copied)
        row = self.table.rows[request.row]
        own = row[start : request.pages].copy() if request.pages > start else None
        if hits:
            row[start : start + hits] = self._tree.path_pages(tip, request.tip)
        if copied:
            self._tree.make_room(copied)
            pages = row[start + hits : start + hits + copied]
            pages[:] = self.take(copied)
            self.exports.land(pages, start + hits, imports)
            tokens = ctx.tokens.data[(start + hits) * size : (start + hits + copied) * size]
            tip, _ = self._tree.commit(tip, tokens, pages)
        if own is not None:
            self._pool.give(own)
            row[start + hits + copied : request.pages] = self.num_pages
        request.tip = tip
        request.committed = start + hits + copied
        request.due = (request.committed + 1) * size
        if request.bound:
            self.table.due[request.row] = request.due

    # -- commit --------------------------------------------------------------------------------

    def step(self, batch: Sequence[TextContext]) -> None:
        """Commit the pages of each request that are full and processed; equal pages collapse into one."""
        if self._loads is not None and self._loads.under_way:
            self.settle(batch)
        if type(batch) is ContextBatch and decode.ready(self, batch) and decode.step(self, batch):
            if self._caching and batch.unpublished is None:
                batch.unpublished = self
                self._unpublished.append(batch)
            if self._eager or self.runtime_checks:
                self.publish()
                self._check()
            return
        if self._unpublished:
            self.publish()
        due = []
        try:
            if len(batch) < FEW:
                for ctx in batch:
                    request = self.requests[ctx.request_id]
                    if ctx.tokens.processed >= request.due:
                        due.append((ctx, request, self._full_pages(ctx, request)))
            else:
                for ctx, request in zip(batch, self.requests_of(batch), strict=True):
                    if ctx.tokens.processed >= request.due:
                        due.append((ctx, request, self._full_pages(ctx, request)))
        except KeyError as missing:
            raise self.not_claimed(missing.args[0]) from None
        for ctx, request, pages in due:
            if pages > request.committed:
                self.commit(ctx, request, pages)
        if self._loads is not None:
            self._loads.flush()
        if self.runtime_checks:
            self.check_integrity()

    def publish(self) -> None:
        """Commit what stepped batches have processed. Everything that could tell the difference calls this first."""
        batches, self._unpublished = self._unpublished, []
        for batch in batches:
            batch.unpublished = None
            for at in np.flatnonzero(batch.stepped >= self.table.due[batch.row]).tolist():
                request = batch.requests[at]
                if request is not None and request.bound and request.bound == batch.serial[at]:
                    self.commit(batch[at], request, int(batch.stepped[at]) // self.page_size)
        if self._loads is not None:
            self._loads.flush()

    def _full_pages(self, ctx: TextContext, request: Request) -> int:
        """Leading pages that are full and processed. BatchError when the request does not have them."""
        window = ctx.tokens
        stable = window.processed if ctx.plain else min(window.processed, window.length - ctx.pending_future_count)
        full = stable // self.page_size
        if request.ctx is not ctx:
            self._adopt(request, ctx)
        if full > request.pages:
            raise BatchError(
                f"request {ctx.request_id!r} on replica {self.replica} has {window.processed} processed tokens but "
                f"only {request.pages} page(s) of {self.page_size}; call alloc() before the forward"
            )
        return full

    def commit(self, ctx: TextContext, request: Request, full: int) -> None:
        """Put the request's pages up to `full` into the tree; for step() and landed loads."""
        start, size, tree = request.committed, self.page_size, self._tree
        tip = request.tip
        if tip is None:
            tip = tree.hold_root(ctx.root_key)
        row = self.table.rows[request.row]
        tokens = ctx.tokens.data[start * size : full * size]
        request.tip, instead = tree.commit(tip, tokens, row[start:full])
        if instead is not None:
            row[start : start + len(instead)] = instead
            self.table.version += 1
        request.committed = full
        request.due = (full + 1) * size
        if request.bound:
            self.table.due[request.row] = request.due

    # -- tiers -----------------------------------------------------------------------------------

    def settle(self, batch: Sequence[TextContext]) -> list[TextContext]:
        """Wait for the loads that these requests need; the contexts whose window moved back, because a load failed."""
        moved: list[TextContext] = []
        loads = self._loads
        if loads is None or not loads.under_way:
            return moved
        for ctx in batch:
            load = loads.under_way.get(ctx.request_id)
            request = self.requests.get(ctx.request_id)
            if load is None or request is None:
                continue
            if request.ctx is not ctx:
                self._adopt(request, ctx)
            loads.land(request, load)
            del loads.under_way[ctx.request_id]
            request.room = request.pages * self.page_size
            if request.bound:
                self.table.room[request.row] = request.room
            self._input_tokens += (load.pages - load.landed) * self.page_size
            if loads.resume(ctx, request, load):
                moved.append(ctx)
        return moved

    @property
    def loads_under_way(self) -> bool:
        """Whether any request has a load that was not settled."""
        return self._loads is not None and bool(self._loads.under_way)

    def loading(self, ctx: TextContext) -> bool:
        """Whether the request waits for a load, so that a batch with it would, too."""
        load = self._loads.under_way.get(ctx.request_id) if self._loads is not None else None
        return load is not None and load.landed < 0 and not load.transfer.poll()

    def poll_transfers(self) -> None:
        """Take note of finished transfers: what has landed can be reused by others."""
        if self._loads is not None:
            for request_id, load in self._loads.under_way.items():
                if load.landed < 0 and load.transfer.poll():
                    self._loads.land(self.requests[request_id], load)
            self._loads.flush()

    def drain(self) -> None:
        """Wait until nothing is on its way to or from a tier."""
        if self._loads is not None:
            for request_id, load in self._loads.under_way.items():
                self._loads.land(self.requests[request_id], load)
            self._loads.flush()
            self._loads.connector.drain()

    def read_pages(self, page_ids: Sequence[int]) -> list[torch.Tensor]:
        """Host copies of those pages, one tensor per buffer; waits for loads."""
        if self._loads is not None:
            for request_id, load in self._loads.under_way.items():
                self._loads.land(self.requests[request_id], load)
        return self.buffers.read(page_ids)

    def tier_hits(self, ctx: TextContext) -> tuple[int, int, int]:
        """Leading pages of the request that are cached here, and after them in the host and the disk tier."""
        match = self._resident(ctx)
        have, stop, loads = match.pages if match is not None else 0, self._reusable(ctx), self._loads
        if loads is None or stop <= have or not self._caching:
            return have, 0, 0
        parent = self._tree.page_hash(match) if match is not None else loads.root(ctx.root_key)
        size = self.page_size
        tiers = loads.find(parent, ctx.tokens.data[have * size : stop * size].tobytes()).tiers
        host = tiers.count(Tier.HOST)
        return have, host, len(tiers) - host

    def path_hash(self, tip: Segment) -> PageHash:
        """The hash of the last page of a held path."""
        return self._tree.page_hash(Match(tip, 0, None, 0))

    @property
    def connector(self) -> Connector | None:
        """What connect() was given."""
        return self._loads.connector if self._loads is not None else None

    def shutdown(self) -> None:
        """Finish transfers and let go of the tiers. The core is of no use afterwards."""
        if self._loads is not None:
            self.drain()
            self._loads.connector.shutdown()
            self._loads = None

    # -- batches -------------------------------------------------------------------------------

    def runtime_inputs(
        self,
        batch: Sequence[TextContext],
        max_cache_length: int | None = None,
        characteristics: BatchCharacteristics | None = None,
    ) -> ReplicaInputs:
        """Inputs with tensors; see rayk.inputs. RuntimeInputsError when a request has too few pages.

        Waits for the loads of the batch; when one failed, its window moves back first.
        """
        if self._loads is not None and self._loads.under_way:
            self.settle(batch)
        filled = None
        if type(batch) is ContextBatch and max_cache_length is None and characteristics is None:
            filled = decode.fill(self, batch) if decode.ready(self, batch) else None
        rows, width, shape = filled or fill_batch(self, batch, max_cache_length, characteristics)
        return self.stage.build(rows, width, shape)

    def batch_tables(
        self,
        batch: Sequence[TextContext],
        max_cache_length: int | None = None,
        characteristics: BatchCharacteristics | None = None,
    ) -> tuple[Pages, Pages, BatchShape]:
        """The same without tensors: lookup table, cache lengths, scalars (views, as in rayk.inputs)."""
        if self._loads is not None and self._loads.under_way:
            self.settle(batch)
        rows, width, shape = fill_batch(self, batch, max_cache_length, characteristics)
        return (*self.stage.host_views(rows, width), shape)

    # -- other replicas ----------------------------------------------------------------------------

    def may_reuse(self, ctx: TextContext) -> int:
        """Leading pages that the next alloc may take from a cache; 0 when it will not look."""
        window = ctx.tokens
        request = self.requests.get(ctx.request_id)
        processed = window.processed if request is not None and request.pages else 0
        return self._reusable(ctx) if self._caching and window.end - processed != 1 else 0

    def resident(self, ctx: TextContext) -> int:
        """Leading pages of the request that are cached here. Changes nothing."""
        match = self._resident(ctx)
        return match.pages if match is not None else 0

    def _resident(self, ctx: TextContext) -> Match | None:
        if self._unpublished:
            self.publish()
        root, stop = self._tree.find_root(ctx.root_key), self._reusable(ctx)
        if root is None or not self._caching or stop < 1:
            return None
        return self._tree.match(root, ctx.tokens.data[: stop * self.page_size])

    # -- queries -----------------------------------------------------------------------------------

    @property
    def _free(self) -> int:
        if self._unpublished:
            self.publish()
        return self._pool.empty + self._tree.evictable

    @property
    def usage(self) -> Usage:
        """Page counts now."""
        return Usage(self.num_pages, self._free, self._tree.cached)

    def used_fraction_after(self, ctx: TextContext) -> float:
        """Used pages over all pages if alloc(ctx) were called now and had enough, at most 1. Changes nothing.

        Exact where the reference estimates: a hit on a cached page that nobody holds uses a free page up.
        """
        request = self.requests.get(ctx.request_id)
        committed, held = (request.committed, request.pages) if request is not None else (0, 0)
        used, wanted = self.num_pages - self._free, -(-self.slots_needed(ctx) // self.page_size)
        match = self._resident(ctx) if self.may_reuse(ctx) > committed else None
        if match is None or match.pages <= committed:
            used += max(0, wanted - held)
        else:
            newly_held = match.partial if match.into is not None and not match.into.refs else 0
            node: Segment | None = match.node
            while node is not None:
                newly_held += 0 if node.refs else len(node.pages)
                node = node.parent
            used += newly_held + max(0, wanted - match.pages) - (held - committed)
        return min(1.0, used / self.num_pages)

    @property
    def metrics(self) -> KVCacheMetrics:
        """Counters since reset_metrics()."""
        tiers = self._tier_metrics()
        before, loaded = self._loads_before, tiers.cache_tokens - self._loads_before.cache_tokens
        return KVCacheMetrics(
            input_tokens=self._input_tokens,
            cache_tokens=(self._device_hits + self._peer_hits) * self.page_size + loaded,
            h2d_blocks_copied=tiers.h2d_blocks_copied - before.h2d_blocks_copied,
            d2h_blocks_copied=tiers.d2h_blocks_copied - before.d2h_blocks_copied,
            disk_blocks_written=tiers.disk_blocks_written - before.disk_blocks_written,
            disk_blocks_read=tiers.disk_blocks_read - before.disk_blocks_read,
            failed_loads=tiers.failed_loads - before.failed_loads,
            rejected_files=tiers.rejected_files - before.rejected_files,
            device_blocks_served=self._device_hits,
            cross_replica_blocks_copied=self._peer_hits,
            cross_replica_bytes_copied=self._peer_hits * self._bytes_per_page,
            evicted_blocks=self._tree.evicted - self._evicted_before,
        )

    def reset_metrics(self) -> None:
        """Counters to zero."""
        self._input_tokens = self._device_hits = self._peer_hits = 0
        self._evicted_before = self._tree.evicted
        self._loads_before = self._tier_metrics()

    def _tier_metrics(self) -> KVCacheMetrics:
        """What came from tiers and went there since the start."""
        if self._loads is None:
            return KVCacheMetrics()
        self._loads.connector.poll()
        counters = self._loads.connector.counters
        return KVCacheMetrics(
            cache_tokens=self._loads.pages * self.page_size,
            h2d_blocks_copied=counters.h2d,
            d2h_blocks_copied=counters.d2h,
            disk_blocks_written=counters.disk_written,
            disk_blocks_read=counters.disk_read,
            failed_loads=counters.loads_failed,
            rejected_files=counters.damaged + counters.foreign + counters.outdated,
        )

    def reset_prefix_cache(self) -> None:
        """Forget cached pages that nobody holds, here and in the tiers."""
        if self._unpublished:
            self.publish()
        self._tree.reset()
        if self._loads is not None:
            self._loads.connector.reset()
        self._check()

    def _check(self) -> None:
        if self.runtime_checks:
            self.check_integrity()

    # -- integrity ---------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """IntegrityError unless every page is in exactly one place and all counts agree with what they count."""
        if self._unpublished:
            self.publish()
        seen = np.zeros(self.num_pages, np.int64)
        self._pool.count_into(seen)
        tips = [r.tip for r in self.requests.values() if r.tip is not None]
        self._tree.check_integrity(tips + self.exports.tips, seen)
        where = f"replica {self.replica}"
        for request_id, request in self.requests.items():
            row = self.table.rows[request.row]
            if (row[request.pages :] != self.num_pages).any():
                raise IntegrityError(where, f"request {request_id!r} has pages beyond its {request.pages}")
            if request.dummy:
                continue
            np.add.at(seen, row[request.committed : request.pages], 1)
            path = self._tree.path_pages(request.tip) if request.tip is not None else row[:0]
            if path.tolist() != row[: request.committed].tolist():
                raise IntegrityError(where, f"request {request_id!r} does not show the pages it holds")
        wrong = np.flatnonzero(seen != 1)
        if wrong.size:
            raise IntegrityError(where, f"page {wrong[0]} is in {seen[wrong[0]]} places")
