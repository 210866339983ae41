"""One replica's cache: the calls that claim, allocate, step, read and release.

No Ray, no threads, no clock: a plain object that changes only through its methods. `alloc` is a
transaction. A request is claimed -> allocated -> .. -> released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rayk.context import TextContext
from rayk.errors import AlreadyClaimedError, BatchError, InsufficientBlocksError
from rayk.kvcache import decode, integrity
from rayk.kvcache.allocation import allocate
from rayk.kvcache.connector import Connector, Tier
from rayk.kvcache.context_batch import ContextBatch
from rayk.kvcache.lookup_table import fill_batch
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.prefix_tree import Match, PageListener
from rayk.kvcache.progress import waiting
from rayk.kvcache.request import NEVER, NOTHING_REUSED, Request, Reused, Usage
from rayk.kvcache.runtime_inputs import BatchCharacteristics, BatchShape, ReplicaInputs
from rayk.kvcache.segment import Segment
from rayk.kvcache.state import CacheState
from rayk.kvcache.tier_loads import TierLoads


class ReplicaCore(CacheState):
    """The calls of one replica's cache, on its state."""

    def connect(self, connector: Connector) -> None:
        """Offload what is cached from now on to `connector`, and load from it. Before any request; once.

        The core owns it: shutdown() shuts it down.
        """
        self.loads = TierLoads(connector, self.exports, self.page_size, self.commit)
        self.listen(self.loads)

    def listen(self, listener: PageListener, end: Callable[[], None] | None = None) -> None:
        """Hash every page that is cached, now and from now on, and tell `listener` of it and of what is dropped.
        shutdown() calls `end`."""
        if self.unpublished:
            self.publish()
        self.tree.listen(listener, self.exports.hasher)
        self._listened = True
        if end is not None:
            self._at_shutdown.append(end)

    def page_hashes(self) -> Iterator[bytes]:
        """The hash of every cached page; nothing before listen()."""
        return self.tree.hashes()

    # -- claims ----------------------------------------------------------------------------------

    def claim(self, request_id: str, dummy: bool = False, client: str = "", generation: int = 0) -> None:
        """Reserve a place for the request; takes no page. A dummy has the null page for its only page.

        `generation` is the number of this claim, which no other claim of the id has; 0 where nobody asks for it.
        """
        if request_id in self.requests:
            raise AlreadyClaimedError(request_id, self.replica)
        commit_at = NEVER if dummy or not self.caching else self.page_size
        self.requests[request_id] = Request(self.table.acquire(), dummy, commit_at, client, generation)
        self._claims += 1

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
                self.loads.released(request.tip.path_hashes(), request.tip.path_pages())
        pages, committed = request.pages, request.committed
        if pages > committed and not request.dummy:
            self.pool.give(self.table.rows[request.row][committed:pages])
        if request.tip is not None:
            self.tree.release(request.tip)
        if request.bound:
            request.bound = 0
            self.table.unbind(request.row)
        self.table.drop(request.row, pages)
        if self.runtime_checks:
            self.check_integrity()

    def blocks(self, request_id: str) -> list[int]:
        """Page ids in sequence order; empty for an unknown request."""
        if self.unpublished:
            self.publish()
        request = self.requests.get(request_id)
        return [] if request is None else self.table.rows[request.row][: request.pages].tolist()

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
            window.length + self.extra_slots <= request.slot_capacity
            and window.end - window.processed == 1
            and ctx.plain
            and request.ctx is ctx
        ):
            self.input_tokens += 1
            return NOTHING_REUSED
        if request.dummy:
            return NOTHING_REUSED
        reused = allocate(self, request, ctx, imports)
        self.input_tokens += window.end - window.processed
        if reused is not NOTHING_REUSED:
            self.device_hits += reused.device_tokens // self.page_size
            self.peer_hits += reused.peer_tokens // self.page_size
        if self.runtime_checks:
            self.check_integrity()
        return reused

    def accept_handover(self, ctx: TextContext, imports: Sequence[PageImport] = ()) -> Reused:
        """alloc() of a claimed request that runs on another replica: it gets its pages here, with what is cached of it.

        The next alloc() with the request's own context moves its window back to what is cached; until then nothing is
        computed into the pages, and step() passes the request over. `ctx` is a copy of its context as it was last.
        """
        computed = self.input_tokens
        reused = self.alloc(ctx, imports)
        self.wait_for_loads([ctx])
        self.input_tokens = computed  # counted by the next alloc
        request = self.requests[ctx.request_id]
        request.handed_over, request.next_commit_at = True, NEVER
        self.suspend(request)
        self.check()
        return reused

    def alloc_many(self, batch: Sequence[TextContext]) -> dict[str, InsufficientBlocksError]:
        """alloc() for each context; what was refused, by request id. The refused ones keep what they had."""
        if self.loads is not None and self.loads.under_way:
            self.wait_for_loads(batch)
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

    # -- commit --------------------------------------------------------------------------------

    def step(self, batch: Sequence[TextContext]) -> None:
        """Commit the pages of each request that are full and processed; equal pages collapse into one."""
        if self.loads is not None and self.loads.under_way:
            self.wait_for_loads(batch)
        if type(batch) is ContextBatch and decode.ready(self, batch) and decode.step(self, batch):
            if self._listened or self.runtime_checks:
                self.publish()
                self.check()
            return
        if self.unpublished:
            self.publish()
        full = []
        if len(batch) == 1:
            ctx = batch[0]
            alone = self.requests.get(ctx.request_id)
            if alone is None or alone.ctx is not ctx:
                [alone] = self.claimed(batch)
            if ctx.tokens.processed >= alone.next_commit_at:
                full.append((ctx, alone, self._full_pages(ctx, alone)))
        else:
            for ctx, request in zip(batch, self.claimed(batch), strict=True):
                if ctx.tokens.processed >= request.next_commit_at:
                    full.append((ctx, request, self._full_pages(ctx, request)))
        for ctx, request, pages in full:
            if pages > request.committed:
                self.commit(ctx, request, pages)
        if self.loads is not None:
            self.loads.flush()
        if self.runtime_checks:
            self.check_integrity()

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

    # -- tiers -----------------------------------------------------------------------------------

    @property
    def loads_under_way(self) -> bool:
        """Whether any request has a load that wait_for_loads() has not ended."""
        return self.loads is not None and bool(self.loads.under_way)

    def loading(self, ctx: TextContext) -> bool:
        """Whether the request waits for a load, so that a batch with it would, too."""
        return self.loads is not None and self.loads.waiting(ctx.request_id)

    def poll_transfers(self) -> None:
        """Take note of finished transfers: what has landed can be reused by others."""
        if self.loads is not None:
            self.loads.poll()

    def drain(self) -> None:
        """Wait until nothing is on its way to or from a tier."""
        if self.loads is not None:
            self.loads.land_all()
            with waiting():
                self.loads.connector.drain()

    def read_pages(self, page_ids: Sequence[int]) -> list[torch.Tensor]:
        """Host copies of those pages, one tensor per buffer; waits for loads."""
        if self.loads is not None:
            self.loads.land_all()
        return self.buffers.read(page_ids)

    def tier_hits(self, ctx: TextContext) -> tuple[int, int, int]:
        """Leading pages of the request that are cached here, and after them in the host and the disk tier."""
        match = self._match(ctx)
        have, stop, loads = match.pages if match is not None else 0, self.reusable_pages(ctx), self.loads
        if loads is None or stop <= have or not self.caching:
            return have, 0, 0
        parent = self.tree.page_hash(match) if match is not None else loads.root(ctx.root_key)
        size = self.page_size
        tiers = loads.find(parent, ctx.tokens.data[have * size : stop * size].tobytes()).tiers
        host = tiers.count(Tier.HOST)
        return have, host, len(tiers) - host

    @property
    def connector(self) -> Connector | None:
        """What connect() was given."""
        return self.loads.connector if self.loads is not None else None

    def shutdown(self) -> None:
        """Finish transfers, let go of the tiers and end its listeners. The core is of no use afterwards."""
        while self._at_shutdown:
            self._at_shutdown.pop()()
        if self.loads is not None:
            self.loads.land_all()
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
            self.wait_for_loads(batch)
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
            self.wait_for_loads(batch)
        rows, width, shape = fill_batch(self, batch, max_cache_length, characteristics)
        return (*self.stage.host_views(rows, width), shape)

    # -- other replicas ----------------------------------------------------------------------------

    def may_reuse(self, ctx: TextContext) -> int:
        """Leading pages that the next alloc may take from a cache; 0 when it will not look."""
        window = ctx.tokens
        request = self.requests.get(ctx.request_id)
        processed = window.processed if request is not None and request.pages else 0
        return self.reusable_pages(ctx) if self.caching and window.end - processed != 1 else 0

    def cached_pages(self, ctx: TextContext) -> int:
        """Leading pages of the request that are cached here. Changes nothing."""
        match = self._match(ctx)
        return match.pages if match is not None else 0

    def _match(self, ctx: TextContext) -> Match | None:
        if self.unpublished:
            self.publish()
        stop = self.reusable_pages(ctx)
        if not self.caching or stop < 1:
            return None
        return self.tree.find(ctx.root_key, ctx.tokens.data[: stop * self.page_size])

    # -- queries -----------------------------------------------------------------------------------

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
        used, wanted = self.num_pages - self.free, -(-self.slots_needed(ctx) // self.page_size)
        match = self._match(ctx) if self.may_reuse(ctx) > committed else None
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
        return self.counters() - self._counted_before

    def reset_metrics(self) -> None:
        """Counters to zero."""
        self._counted_before = self.counters()

    def counters(self) -> KVCacheMetrics:
        """Counters since the start."""
        copied = self.peer_hits + self.pages_adopted
        counters = KVCacheMetrics(
            input_tokens=self.input_tokens,
            cache_tokens=(self.device_hits + self.peer_hits) * self.page_size,
            device_blocks_served=self.device_hits,
            cross_replica_blocks_copied=copied,
            cross_replica_bytes_copied=copied * self.params.bytes_per_page,
            evicted_blocks=self.tree.evicted,
        )
        return counters if self.loads is None else counters + self.loads.metrics()

    def join_after_reset(self, token: bytes) -> None:
        """Before any request: the other replicas were reset with this token, and go on sharing pages under it."""
        mask = self.exports.change_mask(token)
        if self.loads is not None:
            self.loads.rename(mask)

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
            self.exports.change_mask(token)
        self.tree.reset(retire=token is not None)
        if self.loads is not None:
            self.loads.reset(self.exports.mask, self.tree.hashes())
        self.check()
        return self.usage.used

    def check(self) -> None:
        """check_integrity() if the manager was asked to do so all the time."""
        if self.runtime_checks:
            self.check_integrity()

    def check_integrity(self) -> None:
        """IntegrityError unless every page is in exactly one place and all counts agree with what they count."""
        integrity.check(self)
