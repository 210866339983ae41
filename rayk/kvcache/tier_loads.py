"""A replica's dealings with its connector: what it offloads, and the loads of its requests.

A load starts in alloc, which moves the request's window past it at once. The loaded pages are the request's own and
in no tree until they have landed; each call that needs the request (runtime_inputs, step, the next alloc) lands them
first. Pages that did not land are computed: the next call with the request's context moves its window back to them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from rayk.context import TextContext
from rayk.kvcache.connector import Connector, Found, Landed, Tier, Transfer
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_hash import Mask, PageHash, RootKey
from rayk.kvcache.page_pins import PagePins
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.progress import waiting
from rayk.kvcache.request import Request

Commit = Callable[[TextContext, Request, int], None]

log = logging.getLogger("rayk.tiers")


class TierLoad:
    """Pages `base` .. `base + pages` of a request, on their way. `reached` is where its window was moved to."""

    __slots__ = ("base", "landed", "pages", "reached", "request", "transfer")

    def __init__(self, request: Request, transfer: Transfer, base: int, pages: int, reached: int) -> None:
        self.request = request
        self.transfer = transfer
        self.base = base
        self.pages = pages
        self.reached = reached
        self.landed = -1  # leading pages that are in the tree; -1 while they are on their way


class TierLoads:
    """Listens to the replica's tree and offloads what is cached; finds, starts and lands loads.

    `commit` puts a request's pages up to a number into the tree. `under_way` has the loads that end() has not ended:
    their requests may not go into a batch. Errors of a connector are misses.
    """

    def __init__(self, connector: Connector, pins: PagePins, page_size: int, commit: Commit) -> None:
        self.connector = connector
        self.under_way: dict[str, TierLoad] = {}
        self.found_pages = self.found_on_disk = 0  # that alloc found, less what then failed to land; of these
        self._commit = commit
        self._hasher = pins.hasher
        self._size = page_size
        self._page_bytes = page_size * 4
        self._holds, self._digest = connector.holds, self._hasher.digest
        self._mask = pins.mask
        self._masked = bool(self._mask.token)
        self._kept_out: set[bytes] = set()  # from before the last reset
        self._roots: dict[RootKey, PageHash] = {}
        self._new_hashes: list[bytes] = []
        self._new_pages: list[Pages] = []
        self._used: list[Sequence[bytes]] = []  # hashes of released prefixes
        self._landing = False
        self._warned = False

    # -- what the tree tells -----------------------------------------------------------------------

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        """Newly cached pages; flush() offloads them, before anybody can change them."""
        if not self._landing:  # else a tier has them
            self._new_hashes += self._mask.all(hashes) if self._masked else hashes
            self._new_pages.append(pages)

    def removed(self, hashes: Sequence[PageHash]) -> None:
        """Dropped pages: the tiers have them already."""

    def flush(self) -> None:
        """Offload what was cached since the last call. The core calls it before it returns from any method."""
        hashes, pages, used = self._new_hashes, self._new_pages, self._used
        try:
            if hashes:
                self._new_hashes, self._new_pages = [], []
                self.connector.offload(hashes, np.concatenate(pages))
            if used:
                self._used = []
                for prefix in used:
                    self.connector.touch(prefix)
            self.connector.poll()
        except Exception as error:
            self._warn("offload", error)

    def released(self, prefix: bytes, pages: Pages) -> None:
        """A request lets go of a prefix: its hashes, joined, and its pages, which are still its own.

        What was used last is kept longest below, too, and what lower tiers gave up meanwhile goes there again.
        """
        width, holds = self._hasher.width, self._holds
        hashes = self._mask.all([prefix[at : at + width] for at in range(0, len(prefix), width)])
        try:
            missing = [i for i, key in enumerate(hashes) if not holds(key)]
            if self._kept_out:
                missing = [i for i in missing if hashes[i] not in self._kept_out]
            if missing:
                self.connector.offload([hashes[i] for i in missing], pages[missing])
        except Exception as error:
            self._warn("offload", error)
        self._used.append(hashes)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the connector failed to %s; its pages are computed instead", what, exc_info=error)

    # -- looking -------------------------------------------------------------------------------------

    def root(self, key: RootKey) -> PageHash:
        """The hash above the first page of that salt and adapter."""
        root = self._roots.get(key)
        if root is None:
            if len(self._roots) > 10_000:
                self._roots.clear()
            root = self._roots[key] = self._hasher.root(key)
        return root

    def find(self, parent: PageHash, tokens: bytes) -> Found:
        """Which leading pages of `tokens`, that continue `parent`, are in a tier. A miss hashes one page."""
        try:
            hashes = self._chain(parent, tokens)
            return self.connector.lookup(map(self._mask.one, hashes) if self._masked else hashes)
        except Exception as error:
            self._warn("look up", error)
            return Found([], [])

    def _chain(self, parent: PageHash, tokens: bytes) -> Iterator[bytes]:
        [first] = self._hasher.chain(parent, tokens[: self._page_bytes])
        yield first
        yield from self._hasher.chain(first, tokens[self._page_bytes :])

    # -- loading ---------------------------------------------------------------------------------------

    def start(self, ctx: TextContext, request: Request, row: Pages) -> tuple[int, int]:
        """Load what a tier has of the request's first pages into those of `row` that it has not committed.

        Moves the window past them; how many pages come from host and disk. Unless it has landed already, the load is
        under way then.
        """
        base, window, tip, size = request.committed, ctx.tokens, request.tip, self._size
        if tip is not None:
            if tip.retired:
                return 0, 0  # it would mix what was computed before a reset with what came after
            parent = tip.last_hash(self._hasher.width)
        else:
            parent = self._roots.get(ctx.root_key) or self.root(ctx.root_key)
        data, start = window.data, base * size
        try:
            first = self._digest(parent + data[start : start + size].tobytes())
            if not self._holds(self._mask.one(first) if self._masked else first):
                return 0, 0
        except Exception as error:
            self._warn("look up", error)
            return 0, 0
        found = self.find(parent, data[start : len(row) * size].tobytes())
        count = len(found.hashes)
        reached = (base + count) * size
        if not count or reached <= window.processed:
            return 0, 0
        active = window.end - window.processed
        transfer = self._begin(found.hashes, row[base : base + count].copy())
        load = TierLoad(request, transfer, base, count, reached)
        window.processed = reached
        if reached >= window.end:  # the load covers the chunk: keep its size, move it on
            window.end = min(window.length, reached + active)
        self.found_pages += count
        if transfer.poll():
            self._land(load)
            self._move_back(ctx, load)
            count = load.landed
        else:
            self.under_way[ctx.request_id] = load
        host = found.tiers[:count].count(Tier.HOST)
        self.found_on_disk += count - host
        return host, count - host

    def _begin(self, hashes: Sequence[bytes], pages: Pages) -> Transfer:
        try:
            return self.connector.load(hashes, pages)
        except Exception as error:
            self._warn("load", error)
            return Landed(0)

    def waiting(self, request_id: str) -> bool:
        """Whether the request's load is still on its way, so that end() would wait for it."""
        load = self.under_way.get(request_id)
        return load is not None and load.landed < 0 and not load.transfer.poll()

    def poll(self) -> None:
        """Land the loads that have arrived: others can reuse their pages."""
        for load in self.under_way.values():
            if load.landed < 0 and load.transfer.poll():
                self._land(load)
        self.flush()

    def land_all(self) -> None:
        """Wait for all loads; they stay under way, for end() to move their windows."""
        for load in self.under_way.values():
            self._land(load)
        self.flush()

    def end(self, ctx: TextContext) -> tuple[int, bool]:
        """Wait for the context's load, which is under way no more: pages that did not land, and whether the window
        moved back to them."""
        load = self.under_way[ctx.request_id]
        self._land(load)
        del self.under_way[ctx.request_id]
        return load.pages - load.landed, self._move_back(ctx, load)

    def _land(self, load: TierLoad) -> None:
        """Wait for a load and put what landed into the tree."""
        if load.landed >= 0:
            return
        try:
            with waiting():
                load.landed = min(load.transfer.wait(), load.pages)
        except Exception as error:
            self._warn("load", error)
            load.landed = 0
        self.found_pages -= load.pages - load.landed
        if load.landed:
            assert load.request.ctx is not None
            self._landing = True
            self._commit(load.request.ctx, load.request, load.base + load.landed)
            self._landing = False

    def _move_back(self, ctx: TextContext, load: TierLoad) -> bool:
        """The load has ended: whether the window had to move back to what did not land."""
        good, window = (load.base + load.landed) * self._size, ctx.tokens
        if load.landed == load.pages or window.processed <= good:
            return False
        active, chunked = window.end - window.processed, window.end < window.length
        window.processed = good
        window.end = min(window.length, good + active) if chunked else window.length
        if ctx.cached_prefix_length == load.reached:
            ctx.cached_prefix_length = good
        return True

    def rename(self, mask: Mask) -> None:
        """Mask the keys of the tiers from now on."""
        self._mask, self._masked = mask, bool(mask.token)

    def reset(self, mask: Mask, held: Iterable[bytes]) -> None:
        """Forget what was to be offloaded, and all that the tiers have; from now on their keys are masked. Pages that
        are still `held` do not go there again when they are released."""
        self.rename(mask)
        self._kept_out = set(mask.all(list(held)))
        self._new_hashes, self._new_pages, self._used = [], [], []
        try:
            with waiting():
                self.connector.reset()
        except Exception as error:
            self._warn("forget its pages", error)

    def metrics(self) -> KVCacheMetrics:
        """What came from tiers and went there since the start."""
        self.connector.poll()
        counters = self.connector.counters
        return KVCacheMetrics(
            cache_tokens=self.found_pages * self._size,
            h2d_blocks_copied=counters.h2d,
            d2h_blocks_copied=counters.d2h,
            disk_blocks_written=counters.disk_written,
            disk_blocks_read=counters.disk_read,
            failed_loads=counters.loads_failed,
            rejected_files=counters.damaged + counters.foreign + counters.outdated,
        )

    def cancel(self, request_id: str) -> None:
        """The request is released."""
        load = self.under_way.pop(request_id, None)
        if load is not None and load.landed < 0:
            load.transfer.cancel()
