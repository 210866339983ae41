"""The state of one replica's cache: its requests, their pages, the prefix tree over them, and what is counted.

Allocation, decode steps and lookup tables share it; `rayk.kvcache.replica` makes the calls of a replica out of them.
Only methods here write a request, the columns of the block table and the counters.

A request's pages are, in sequence order, first *committed* ones (in the prefix tree, maybe shared) and then its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from rayk.context import TextContext
from rayk.errors import BatchError, LeaseLostError, NotClaimedError
from rayk.kvcache.block_table import BlockTable
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_pins import PagePins
from rayk.kvcache.page_pool import PagePool, Pages
from rayk.kvcache.prefix_tree import PrefixTree
from rayk.kvcache.request import FEW, NEVER, Request, refuse_twice
from rayk.kvcache.runtime_inputs import InputStage
from rayk.kvcache.segment import Segment
from rayk.kvcache.tier_loads import TierLoads
from rayk.params import KVCacheParams


class CacheState:
    """`replica` is its index and `holder_of` finds the replica of a request (-1: none): both are for messages.

    `shared_memory`: pages in host memory are where other processes of the machine can read them.
    """

    def __init__(
        self,
        params: KVCacheParams,
        replica: int,
        num_pages: int,
        max_batch_size: int,
        devices: Sequence[str] | None = None,
        runtime_checks: bool = False,
        holder_of: Callable[[str], int] = lambda _: -1,
        shared_memory: bool = False,
    ) -> None:
        devices = tuple(devices or params.replica_devices(replica))
        self.replica = replica
        self.holder_of = holder_of
        self.params = params
        self.num_pages = num_pages
        self.max_batch_size = max_batch_size
        self.runtime_checks = runtime_checks
        self.buffers = PageBuffers(params, num_pages, devices, shared_memory)
        self.stage = InputStage(self.buffers, devices, max_batch_size)
        self.requests: dict[str, Request] = {}
        self.table = BlockTable(num_pages, min(max_batch_size, 256))
        self.page_size = params.page_size
        # S = L + accepted drafts + 2 D + 1 + B - max(1, placeholders), as in MAX 26.5; here without the L
        self.extra_slots = 2 * params.num_draft_tokens + params.block_draft_slots
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(params.page_size, self.pool)
        self.caching = params.enable_prefix_caching
        self.exports = PagePins(params, self.tree)
        self.loads: TierLoads | None = None
        self.unpublished: list[ContextBatch] = []  # stepped, and not yet searched for full pages
        self.input_tokens = self.device_hits = self.peer_hits = 0  # hits in pages
        self.pages_adopted = 0  # of replicas that left, see rayk.kvcache.evacuation
        self._listened = False  # pages are hashed and reported: step() publishes at once
        self._at_shutdown: list[Callable[[], None]] = []  # what ends its listeners
        self._counted_before = KVCacheMetrics()  # at the last reset_metrics()
        self._claims = 0  # claims, releases and changes of context so far
        self._batch_memo: tuple[int, list[TextContext], list[Request]] = (0, [], [])  # see requests_of()

    # -- requests ----------------------------------------------------------------------------------

    def not_claimed(self, request_id: str) -> NotClaimedError:
        """The error for a request that is not claimed here."""
        return NotClaimedError(request_id, self.replica, self.holder_of(request_id))

    def lease_lost(self, request_id: str, client: str, generation: int) -> LeaseLostError:
        """The error for a claim of `client` that is not the present one."""
        request = self.requests.get(request_id)
        owner, now = (request.client, request.generation) if request is not None else ("", 0)
        holder = self.replica if request is not None else self.holder_of(request_id)
        return LeaseLostError(request_id, self.replica, holder, client, generation, owner, now)

    def requests_of(self, batch: Sequence[TextContext]) -> list[Request]:
        """The request of each context; KeyError (a request id) unless all are claimed.

        BatchError when a context is not that of its request, or is in the batch twice; see fence(). Nothing is changed
        then.

        The contexts of a running batch are mostly those of the last call, and comparing two lists is the faster way
        to find that out than one lookup for each.
        """
        if len(batch) < FEW:
            return self._look_up(batch)
        claims, contexts, found = self._batch_memo
        if claims != self._claims or batch != contexts:
            found = self._look_up(batch)
            self._batch_memo = (self._claims, list(batch), found)
        return found

    def _look_up(self, batch: Sequence[TextContext]) -> list[Request]:
        requests = self.requests
        found = [requests[ctx.request_id] for ctx in batch]
        if len(set(found)) < len(batch):
            refuse_twice([ctx.request_id for ctx in batch], self.replica)
        others = [(request, ctx) for ctx, request in zip(batch, found, strict=True) if request.ctx is not ctx]
        for request, ctx in others:
            self.fence(request, ctx)
        for request, ctx in others:
            self.rebind_context(request, ctx)
        return found

    def fence(self, request: Request, ctx: TextContext) -> None:
        """BatchError unless the context may stand for the request: it is the one that it was used with last, or says
        the same about the tokens that its pages hold or were being filled with. LeaseLostError for a context that was
        last used under an earlier claim of the id.

        Placeholders of either may have been filled in since. A request without pages may go on with any context.
        """
        old = request.ctx
        if old is ctx or old is None or not request.pages or request.dummy:
            return
        if ctx.generation and ctx.generation != request.generation:
            raise self.lease_lost(ctx.request_id, request.client, ctx.generation)
        was, window = old.tokens, ctx.tokens
        known = min(was.length - old.pending_future_count, window.length - ctx.pending_future_count)
        count = min(known, max(request.committed * self.page_size, was.processed, window.processed))
        if old.root_key != ctx.root_key or not np.array_equal(was.data[:count], window.data[:count]):
            raise BatchError(
                f"request {ctx.request_id!r} on replica {self.replica} has pages for other tokens or another salt "
                "than this context; release it before you use its id for a new request"
            )

    def rebind_context(self, request: Request, ctx: TextContext) -> None:
        """Go on with another context object for a claimed request; see fence()."""
        if request.ctx is not None:
            self.fence(request, ctx)
            self._claims += 1  # what requests_of() remembers does not hold any more
            if request.bound:
                if self.unpublished:
                    self.publish()
                request.bound = 0
                self.table.unbind(request.row)
        request.ctx = ctx
        ctx.generation = request.generation

    def decoding_request(self, ctx: TextContext) -> Request | None:
        """The request of a context in a ContextBatch, bound from now on, see rayk.kvcache.block_table. None when it
        has no pages or another context."""
        request = self.requests.get(ctx.request_id)
        if request is None or request.ctx is not ctx or not request.pages or request.dummy:
            return None
        if not request.bound:
            request.bound = self.table.bind(request.row, request.slot_capacity, request.next_commit_at)
        return request

    # -- what a context needs ------------------------------------------------------------------------

    def slots_needed(self, ctx: TextContext) -> int:
        """Slots that the request's pages must offer: as in MAX 26.5, and never less than the active window."""
        length = ctx.tokens.length
        if ctx.plain:
            return length + self.extra_slots
        slots = length + len(ctx.maybe_accepted_draft_tokens) + self.extra_slots + 1
        placeholders = ctx.pending_future_count
        return slots - 1 if placeholders < 2 else max(slots - placeholders, ctx.tokens.end)

    def reusable_pages(self, ctx: TextContext) -> int:
        """Leading pages of the request that may come from a cache: all full ones before its last token."""
        placeholders = 1 if ctx.plain else max(ctx.pending_future_count, 1)
        return (ctx.tokens.length - placeholders) // self.page_size

    # -- pages ---------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Pages that an alloc can take."""
        if self.unpublished:
            self.publish()
        return self.pool.empty + self.tree.evictable

    def take(self, pages: int) -> Pages:
        """Empty pages, a view as in PagePool.take()."""
        taken = self.pool.take(pages)
        if self.loads is not None:
            self.loads.connector.reuse(taken)
        return taken

    def set_pages(self, request: Request, pages: int) -> None:
        """The request's row shows so many pages, and all of their slots can be used."""
        request.pages = pages
        request.slot_capacity = pages * self.page_size
        if request.handed_over:
            request.handed_over = False
            request.next_commit_at = (request.committed + 1) * self.page_size if self.caching else NEVER
        if request.bound:
            self.table.slot_capacity[request.row] = request.slot_capacity
            self.table.next_commit_at[request.row] = request.next_commit_at
            self.table.changed()

    def add_pages(self, requests: Sequence[Request], rows: npt.NDArray[np.int64], have: npt.NDArray[np.int64]) -> Pages:
        """A page more for each of these bound requests, in `rows` with `have` pages; the pages, empty before."""
        table, size, pages = self.table, self.page_size, self.take(len(rows))
        table.cells[rows, have] = pages
        table.slot_capacity[rows] += size
        for request in requests:
            request.pages += 1
            request.slot_capacity += size
        return pages

    def suspend(self, request: Request) -> None:
        """Send the request's next alloc the long way: its pages may not be computed into as they are."""
        request.slot_capacity = 0
        if request.bound:
            self.table.slot_capacity[request.row] = 0

    def advance(self, request: Request, tip: Segment | None, committed: int) -> None:
        """The request holds the tree's path to `tip`, whose `committed` pages lead its row."""
        request.tip = tip
        if committed != request.committed:
            request.committed = committed
            request.next_commit_at = (committed + 1) * self.page_size
            if request.bound:
                self.table.next_commit_at[request.row] = request.next_commit_at

    def count(self, input_tokens: int = 0, adopted: int = 0) -> None:
        """Add tokens that are left to compute, and pages of a replica that left."""
        self.input_tokens += input_tokens
        self.pages_adopted += adopted

    # -- commit --------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Commit what stepped batches have processed. Everything that could tell the difference calls this first."""
        batches, self.unpublished = self.unpublished, []
        for batch in batches:
            batch.published()
            for at in np.flatnonzero(batch.stepped >= self.table.next_commit_at[batch.row]).tolist():
                request = batch.requests[at]
                if request is not None and request.bound and request.bound == batch.serial[at]:
                    self.commit(batch[at], request, int(batch.stepped[at]) // self.page_size)
        if self.loads is not None:
            self.loads.flush()

    def commit(self, ctx: TextContext, request: Request, full: int) -> None:
        """Put the request's pages up to `full` into the tree; for step() and landed loads."""
        start, size, tree = request.committed, self.page_size, self.tree
        tip = request.tip
        if tip is None:
            tip = tree.hold_root(ctx.root_key)
        row = self.table.rows[request.row]
        tip, instead = tree.commit(tip, ctx.tokens.data[start * size : full * size], row[start:full])
        if instead is not None:
            row[start : start + len(instead)] = instead
            self.table.changed()
        self.advance(request, tip, full)

    def wait_for_loads(self, batch: Sequence[TextContext]) -> list[TextContext]:
        """Wait for the loads that these requests need; the contexts whose window moved back, because a load failed."""
        moved: list[TextContext] = []
        loads = self.loads
        if loads is None or not loads.under_way:
            return moved
        requests = [self.requests.get(ctx.request_id) for ctx in batch]
        for ctx, request in zip(batch, requests, strict=True):
            if request is not None:
                self.fence(request, ctx)
        for ctx, request in zip(batch, requests, strict=True):
            if request is None or ctx.request_id not in loads.under_way:
                continue
            if request.ctx is not ctx:
                self.rebind_context(request, ctx)
            failed, back = loads.end(ctx)
            self.set_pages(request, request.pages)
            self.count(failed * self.page_size)
            if back:
                moved.append(ctx)
        return moved
