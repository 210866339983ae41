"""One replica's cache: requests, their pages, the prefix tree over them, and the tensors behind them.

No Ray, no threads, no clock: a plain object that changes only through its methods. `alloc` is a
transaction. A request is claimed -> allocated -> .. -> released; its pages are, in sequence order, first
*committed* ones (in the prefix tree, maybe shared) and then its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from rayk.context import TextContext
from rayk.errors import (
    AlreadyClaimedError,
    BatchError,
    InsufficientBlocksError,
    LeaseLostError,
    NotClaimedError,
)
from rayk.kvcache import decode, integrity
from rayk.kvcache.allocation import allocate, reusable_pages, slots_needed
from rayk.kvcache.block_table import BlockTable
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.connector import Connector, Tier
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.lookup_table import fill_batch, refuse_twice
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_hash import Mask, PageHash
from rayk.kvcache.page_pins import PageImport, PagePins
from rayk.kvcache.page_pool import PagePool, Pages
from rayk.kvcache.prefix_tree import Match, PageListener, PrefixTree, Segment
from rayk.kvcache.request import FEW, NEVER, NOTHING_REUSED, Request, Reused, Usage
from rayk.kvcache.runtime_inputs import BatchCharacteristics, BatchShape, InputStage, ReplicaInputs
from rayk.kvcache.tier_loads import TierLoads
from rayk.params import KVCacheParams


class ReplicaCore:
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
        self.exports = PagePins(params, self.tree, self.buffers)
        self._bytes_per_page = params.bytes_per_page
        self._claims = 0  # claims and releases so far
        self._last: tuple[int, list[TextContext], list[Request]] = (0, [], [])  # see requests_of()
        self.unpublished: list[ContextBatch] = []  # stepped, and not yet looked at for full pages
        self._eager = False  # somebody listens: publish at once
        self.input_tokens = self.device_hits = self.peer_hits = self._evicted_before = 0
        self.kept = 0  # pages of replicas that went, see rayk.kvcache.evacuation
        self.loads: TierLoads | None = None
        self._loads_before = KVCacheMetrics()

    def connect(self, connector: Connector) -> None:
        """Offload what is cached from now on to `connector`, and load from it. Before any request; once.

        The core owns it: shutdown() shuts it down.
        """
        self.loads = TierLoads(self, connector)
        self.listen(self.loads)

    def listen(self, listener: PageListener) -> None:
        """Hash every page that is cached, now and from now on, and tell `listener`, and what is dropped."""
        if self.unpublished:
            self.publish()
        self.tree.listen(listener, self.exports.hasher)
        self._eager = True

    def page_hashes(self) -> Iterator[bytes]:
        """The hash of every cached page, once somebody listens."""
        return self.tree.hashes()

    # -- claims ----------------------------------------------------------------------------------

    def claim(self, request_id: str, dummy: bool = False, client: str = "", generation: int = 0) -> None:
        """Reserve a place for the request; takes no page. A dummy has the null page for its only page.

        `generation` is the number of this claim, which no other claim of the id has; 0 where nobody asks for it.
        """
        if request_id in self.requests:
            raise AlreadyClaimedError(request_id, self.replica)
        due = NEVER if dummy or not self.caching else self.page_size
        self.requests[request_id] = Request(self.table.acquire(), dummy, due, client, generation)
        self._claims += 1

    def bind(self, request: Request) -> None:
        """Keep the table's columns for this request from now on, see rayk.kvcache.block_table."""
        table, row = self.table, request.row
        request.bound = table.serial[row] = table.bind()
        table.room[row], table.due[row] = request.room, request.due

    def release(self, request_id: str) -> None:
        """Forget the request. Its committed pages become evictable, deepest first; the others are empty."""
        if self.unpublished:
            self.publish()
        request = self.requests.pop(request_id, None)
        if request is None:
            raise self.not_claimed(request_id)
        self._claims += 1
        if self.loads is not None:
            self.loads.cancel(request_id)
            if request.tip is not None and not request.tip.retired:
                self.loads.released(self.tree.path_hashes(request.tip), self.tree.path_pages(request.tip))
        pages, committed = request.pages, request.committed
        if pages > committed and not request.dummy:
            self.pool.give(self.table.rows[request.row][committed:pages])
        if request.tip is not None:
            self.tree.release(request.tip)
        if request.bound:
            request.bound = 0
            self.table.unbind(request.row)
        self.table.drop(request.row, pages)
        self.check()

    def blocks(self, request_id: str) -> list[int]:
        """Page ids in sequence order; empty for an unknown request."""
        if self.unpublished:
            self.publish()
        request = self.requests.get(request_id)
        return [] if request is None else self.table.rows[request.row][: request.pages].tolist()

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

        BatchError when a context is not that of its request, or is there twice; see fence(). Nothing is changed then.

        The contexts of a running batch are mostly those of the last call, and comparing two lists is the faster way
        to find that out than one lookup for each.
        """
        if len(batch) < FEW:
            requests = self.requests
            found = [requests[ctx.request_id] for ctx in batch]
            if len(set(found)) < len(batch):
                refuse_twice([ctx.request_id for ctx in batch], self.replica)
            for ctx, request in zip(batch, found, strict=True):
                if request.ctx is not ctx:
                    self._fence(batch, found)
                    break
            return found
        claims, contexts, found = self._last
        if claims != self._claims or batch != contexts:
            requests = self.requests
            found = [requests[ctx.request_id] for ctx in batch]
            if len(set(found)) < len(batch):
                refuse_twice([ctx.request_id for ctx in batch], self.replica)
            self._fence(batch, found)
            self._last = (self._claims, list(batch), found)
        return found

    def _fence(self, batch: Sequence[TextContext], found: Sequence[Request]) -> None:
        """Go on with these contexts, or with none of them."""
        for ctx, request in zip(batch, found, strict=True):
            self.fence(request, ctx)
        for ctx, request in zip(batch, found, strict=True):
            if request.ctx is not ctx:
                self.adopt(request, ctx)

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

    def adopt(self, request: Request, ctx: TextContext) -> None:
        """Go on with another context object for a claimed request; see fence()."""
        self.fence(request, ctx)
        self._claims += 1  # what requests_of() remembers is not looked at again
        if request.bound:
            if self.unpublished:
                self.publish()
            request.bound = 0
            self.table.unbind(request.row)
        request.ctx = ctx
        ctx.generation = request.generation

    # -- allocation ------------------------------------------------------------------------------

    def alloc(self, ctx: TextContext, imports: Sequence[PageImport] = ()) -> Reused:
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
            self.input_tokens += 1
            return NOTHING_REUSED
        if request.dummy:
            return NOTHING_REUSED
        return allocate(self, request, ctx, imports)

    def receive(self, ctx: TextContext, imports: Sequence[PageImport] = ()) -> Reused:
        """alloc() of a claimed request that runs on another replica: it gets its pages here, with what is cached of it.

        Nobody computes into them before the next alloc() with the request's own context, which moves its window back to
        what is cached; step() passes it over until then. `ctx` says how it was last, and is not kept in step.
        """
        computed = self.input_tokens
        reused = self.alloc(ctx, imports)
        self.settle([ctx])
        self.input_tokens = computed  # counted by the next alloc
        request = self.requests[ctx.request_id]
        request.handed, request.room, request.due = True, 0, NEVER
        self.check()
        return reused

    def alloc_many(self, batch: Sequence[TextContext]) -> dict[str, InsufficientBlocksError]:
        """alloc() for each context; what was refused, by request id. The refused ones keep what they had."""
        if self.loads is not None and self.loads.under_way:
            self.settle(batch)
        if type(batch) is ContextBatch and decode.ready(self, batch) and decode.alloc(self, batch):
            self.check()
            return {}
        refused = {}
        self.claimed(batch)
        for ctx in batch:
            try:
                self.alloc(ctx)
            except InsufficientBlocksError as error:
                refused[ctx.request_id] = error
        return refused

    def claimed(self, batch: Sequence[TextContext]) -> list[Request]:
        """requests_of() for calls that do nothing at all unless all are claimed: NotClaimedError."""
        try:
            return self.requests_of(batch)
        except KeyError as missing:
            raise self.not_claimed(missing.args[0]) from None

    def make_room(self, pages: int) -> bool:
        """For rayk.kvcache.decode: have so many empty pages, by evicting if need be. False when there are too few."""
        if pages > self.pool.empty:
            if pages > self.free:
                return False
            self.tree.make_room(pages)
        return True

    def take(self, pages: int) -> Pages:
        """Empty pages, a view as in PagePool.take(); also for rayk.kvcache.decode."""
        taken = self.pool.take(pages)
        if self.loads is not None:
            self.loads.connector.reuse(taken)
        return taken

    # -- commit --------------------------------------------------------------------------------

    def step(self, batch: Sequence[TextContext]) -> None:
        """Commit the pages of each request that are full and processed; equal pages collapse into one."""
        if self.loads is not None and self.loads.under_way:
            self.settle(batch)
        if type(batch) is ContextBatch and decode.ready(self, batch) and decode.step(self, batch):
            if self.caching and batch.unpublished is None:
                batch.unpublished = self
                self.unpublished.append(batch)
            if self._eager or self.runtime_checks:
                self.publish()
                self.check()
            return
        if self.unpublished:
            self.publish()
        due = []
        if len(batch) == 1:
            ctx = batch[0]
            alone = self.requests.get(ctx.request_id)
            if alone is None or alone.ctx is not ctx:
                [alone] = self.claimed(batch)
            if ctx.tokens.processed >= alone.due:
                due.append((ctx, alone, self._full_pages(ctx, alone)))
        else:
            for ctx, request in zip(batch, self.claimed(batch), strict=True):
                if ctx.tokens.processed >= request.due:
                    due.append((ctx, request, self._full_pages(ctx, request)))
        for ctx, request, pages in due:
            if pages > request.committed:
                self.commit(ctx, request, pages)
        if self.loads is not None:
            self.loads.flush()
        if self.runtime_checks:
            self.check_integrity()

    def publish(self) -> None:
        """Commit what stepped batches have processed. Everything that could tell the difference calls this first."""
        batches, self.unpublished = self.unpublished, []
        for batch in batches:
            batch.unpublished = None
            for at in np.flatnonzero(batch.stepped >= self.table.due[batch.row]).tolist():
                request = batch.requests[at]
                if request is not None and request.bound and request.bound == batch.serial[at]:
                    self.commit(batch[at], request, int(batch.stepped[at]) // self.page_size)
        if self.loads is not None:
            self.loads.flush()

    def _full_pages(self, ctx: TextContext, request: Request) -> int:
        """Leading pages that are full and processed. BatchError when the request does not have them."""
        window = ctx.tokens
        stable = window.processed if ctx.plain else min(window.processed, window.length - ctx.pending_future_count)
        full = stable // self.page_size
        if full > request.pages:
            raise BatchError(
                f"request {ctx.request_id!r} on replica {self.replica} has {window.processed} processed tokens but "
                f"only {request.pages} page(s) of {self.page_size}; call alloc() before the forward"
            )
        return full

    def commit(self, ctx: TextContext, request: Request, full: int) -> None:
        """Put the request's pages up to `full` into the tree; for step() and landed loads."""
        start, size, tree = request.committed, self.page_size, self.tree
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
        loads = self.loads
        if loads is None or not loads.under_way:
            return moved
        requests = [self.requests.get(ctx.request_id) for ctx in batch]
        for ctx, request in zip(batch, requests, strict=True):
            if request is not None:
                self.fence(request, ctx)
        for ctx, request in zip(batch, requests, strict=True):
            load = loads.under_way.get(ctx.request_id)
            if load is None or request is None:
                continue
            if request.ctx is not ctx:
                self.adopt(request, ctx)
            loads.land(request, load)
            del loads.under_way[ctx.request_id]
            request.room = request.pages * self.page_size
            if request.bound:
                self.table.room[request.row] = request.room
            self.input_tokens += (load.pages - load.landed) * self.page_size
            if loads.resume(ctx, request, load):
                moved.append(ctx)
        return moved

    @property
    def loads_under_way(self) -> bool:
        """Whether any request has a load that was not settled."""
        return self.loads is not None and bool(self.loads.under_way)

    def loading(self, ctx: TextContext) -> bool:
        """Whether the request waits for a load, so that a batch with it would, too."""
        load = self.loads.under_way.get(ctx.request_id) if self.loads is not None else None
        return load is not None and load.landed < 0 and not load.transfer.poll()

    def poll_transfers(self) -> None:
        """Take note of finished transfers: what has landed can be reused by others."""
        if self.loads is not None:
            for request_id, load in self.loads.under_way.items():
                if load.landed < 0 and load.transfer.poll():
                    self.loads.land(self.requests[request_id], load)
            self.loads.flush()

    def drain(self) -> None:
        """Wait until nothing is on its way to or from a tier."""
        if self.loads is not None:
            for request_id, load in self.loads.under_way.items():
                self.loads.land(self.requests[request_id], load)
            self.loads.flush()
            self.loads.connector.drain()

    def read_pages(self, page_ids: Sequence[int]) -> list[torch.Tensor]:
        """Host copies of those pages, one tensor per buffer; waits for loads."""
        if self.loads is not None:
            for request_id, load in self.loads.under_way.items():
                self.loads.land(self.requests[request_id], load)
        return self.buffers.read(page_ids)

    def tier_hits(self, ctx: TextContext) -> tuple[int, int, int]:
        """Leading pages of the request that are cached here, and after them in the host and the disk tier."""
        match = self._resident(ctx)
        have, stop, loads = match.pages if match is not None else 0, reusable_pages(self, ctx), self.loads
        if loads is None or stop <= have or not self.caching:
            return have, 0, 0
        parent = self.tree.page_hash(match) if match is not None else loads.root(ctx.root_key)
        size = self.page_size
        tiers = loads.find(parent, ctx.tokens.data[have * size : stop * size].tobytes()).tiers
        host = tiers.count(Tier.HOST)
        return have, host, len(tiers) - host

    def path_hash(self, tip: Segment) -> PageHash:
        """The hash of the last page of a held path."""
        return self.tree.page_hash(Match(tip, 0, None, 0))

    @property
    def connector(self) -> Connector | None:
        """What connect() was given."""
        return self.loads.connector if self.loads is not None else None

    def shutdown(self) -> None:
        """Finish transfers and let go of the tiers. The core is of no use afterwards."""
        if self.loads is not None:
            for request_id, load in self.loads.under_way.items():
                self.loads.land(self.requests[request_id], load)
            self.loads.flush()
            self.loads.connector.shutdown()
            self.loads = None

    # -- batches -------------------------------------------------------------------------------

    def runtime_inputs(
        self,
        batch: Sequence[TextContext],
        max_cache_length: int | None = None,
        characteristics: BatchCharacteristics | None = None,
    ) -> ReplicaInputs:
        """Inputs with tensors; see rayk.kvcache.runtime_inputs. RuntimeInputsError when a request has too few pages.

        Waits for the loads of the batch; when one failed, its window moves back first.
        """
        if self.loads is not None and self.loads.under_way:
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
        """The same without tensors: lookup table, cache lengths, scalars (views, as in rayk.kvcache.runtime_inputs)."""
        if self.loads is not None and self.loads.under_way:
            self.settle(batch)
        rows, width, shape = fill_batch(self, batch, max_cache_length, characteristics)
        return (*self.stage.host_views(rows, width), shape)

    # -- other replicas ----------------------------------------------------------------------------

    def may_reuse(self, ctx: TextContext) -> int:
        """Leading pages that the next alloc may take from a cache; 0 when it will not look."""
        window = ctx.tokens
        request = self.requests.get(ctx.request_id)
        processed = window.processed if request is not None and request.pages else 0
        return reusable_pages(self, ctx) if self.caching and window.end - processed != 1 else 0

    def resident(self, ctx: TextContext) -> int:
        """Leading pages of the request that are cached here. Changes nothing."""
        match = self._resident(ctx)
        return match.pages if match is not None else 0

    def _resident(self, ctx: TextContext) -> Match | None:
        if self.unpublished:
            self.publish()
        root, stop = self.tree.find_root(ctx.root_key), reusable_pages(self, ctx)
        if root is None or not self.caching or stop < 1:
            return None
        return self.tree.match(root, ctx.tokens.data[: stop * self.page_size])

    # -- queries -----------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Pages that can be handed out."""
        if self.unpublished:
            self.publish()
        return self.pool.empty + self.tree.evictable

    @property
    def usage(self) -> Usage:
        """Page counts now."""
        return Usage(self.num_pages, self.free, self.tree.cached)

    def used_fraction_after(self, ctx: TextContext) -> float:
        """Used pages over all pages if alloc(ctx) were called now and had enough, at most 1. Changes nothing.

        Exact where the reference estimates: a hit on a cached page that nobody holds uses a free page up.
        """
        request = self.requests.get(ctx.request_id)
        if request is not None:
            self.fence(request, ctx)
        committed, held = (request.committed, request.pages) if request is not None else (0, 0)
        used, wanted = self.num_pages - self.free, -(-slots_needed(self, ctx) // self.page_size)
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
        return (
            self._tier_metrics()
            - self._loads_before
            + KVCacheMetrics(
                input_tokens=self.input_tokens,
                cache_tokens=(self.device_hits + self.peer_hits) * self.page_size,
                device_blocks_served=self.device_hits,
                cross_replica_blocks_copied=self.peer_hits + self.kept,
                cross_replica_bytes_copied=(self.peer_hits + self.kept) * self._bytes_per_page,
                evicted_blocks=self.tree.evicted - self._evicted_before,
            )
        )

    def reset_metrics(self) -> None:
        """Counters to zero."""
        self.input_tokens = self.device_hits = self.peer_hits = self.kept = 0
        self._evicted_before = self.tree.evicted
        self._loads_before = self._tier_metrics()

    def _tier_metrics(self) -> KVCacheMetrics:
        """What came from tiers and went there since the start."""
        if self.loads is None:
            return KVCacheMetrics()
        self.loads.connector.poll()
        counters = self.loads.connector.counters
        return KVCacheMetrics(
            cache_tokens=self.loads.pages * self.page_size,
            h2d_blocks_copied=counters.h2d,
            d2h_blocks_copied=counters.d2h,
            disk_blocks_written=counters.disk_written,
            disk_blocks_read=counters.disk_read,
            failed_loads=counters.loads_failed,
            rejected_files=counters.damaged + counters.foreign + counters.outdated,
        )

    def join_after_reset(self, token: bytes) -> None:
        """Before any request: the others were reset with this token, and go on sharing pages under it."""
        self.exports.mask = Mask(token)
        if self.loads is not None:
            self.loads.rename(self.exports.mask)

    def reset_prefix_cache(self, token: bytes | None = None) -> int:
        """Forget cached pages that nobody holds, here and in the tiers; how many pages requests and exports still hold.

        Without a `token` those can still be hit. With one (Mask.new(), the same for all replicas) the weights may have
        changed: no request that starts after it reads what was computed before it, or by a request that has pages now.
        Such requests keep their pages, fill them and share them with each other until they end; none of these pages
        gets to another replica or a tier any more. Replicas that start later join_after_reset().
        """
        if self.unpublished:
            self.publish()
        if token is not None:
            for request in self.requests.values():
                if request.tip is None and request.pages and not request.dummy:
                    assert request.ctx is not None
                    request.tip = self.tree.retired_root(request.ctx.root_key)
            self.exports.mask = Mask(token)
        self.tree.reset(retire=token is not None)
        if self.loads is not None:
            self.loads.reset(self.exports.mask, self.tree.hashes())
        self.check()
        return self.usage.used

    def check(self) -> None:
        """check_integrity() if the manager was asked to do so all the time."""
        if self.runtime_checks:
            self.check_integrity()

    # -- integrity ---------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """IntegrityError unless every page is in exactly one place and all counts agree with what they count."""
        integrity.check(self)
