"""The engine's dealings with its replica's cache: every call of ReplicaCore that it makes is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rayk.context import TextContext
from rayk.engine.sequence import SequenceState
from rayk.errors import InsufficientBlocksError
from rayk.kvcache.connector import TierCount
from rayk.kvcache.page_hash import KEY_BYTES, PageHash, RootKey
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.request import NOTHING_REUSED, Reused
from rayk.kvcache.runtime_inputs import LeafInputs, ShardInputs
from rayk.protocol.engine_reports import PagesChanged


class _PageReporter:
    """A PageListener."""

    def __init__(self, report: Callable[[PagesChanged], None]) -> None:
        self._report = report

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        self._report(PagesChanged(True, b"".join([each[:KEY_BYTES] for each in hashes])))

    def removed(self, hashes: Sequence[PageHash]) -> None:
        self._report(PagesChanged(False, b"".join([each[:KEY_BYTES] for each in hashes])))


class Cache:
    """`watermark`: the share of all pages that admissions leave free for the growth of what runs already."""

    def __init__(self, core: ReplicaCore, watermark: float) -> None:
        self.core = core
        self.page_size = core.params.page_size
        self.reused = NOTHING_REUSED  # of all requests together
        self._spare = math.ceil(core.num_pages * watermark)

    def report_pages(self, report: Callable[[PagesChanged], None]) -> None:
        """Call `report` with what is cached and dropped from now on. Before any request."""
        self.core.listen(_PageReporter(report))

    def all_pages(self) -> PagesChanged:
        """What is cached now, for whoever was told nothing of it."""
        return PagesChanged(True, b"".join([each[:KEY_BYTES] for each in self.core.page_hashes()]))

    def admit(self, sequence: SequenceState, alone: bool) -> bool:
        """Claim and allocate; False, and nothing changed, while there is no room. `alone`: the watermark is moot."""
        core, ctx = self.core, sequence.ctx
        if not alone and core.used_fraction_after(ctx) * core.num_pages > core.num_pages - self._spare + 1e-6:
            return False
        core.claim(ctx.request_id)
        sequence.computes = False
        if self.extend(sequence):
            return True
        core.release(ctx.request_id)
        return False

    def extend(self, sequence: SequenceState) -> bool:
        """Pages for a request's next window, reusing what others cached meanwhile; False when there are too few.

        A part of it may have to be loaded from a tier. Then the request awaits() a load: it may not be in a batch
        before the load has landed, loading() is over, and the next extend() has moved the window back to what failed.
        """
        ctx = sequence.ctx
        if sequence.computes or self._land(sequence):  # it has pages for all of its tokens
            return True
        before = ctx.tokens.processed
        try:
            reused = self.core.alloc(ctx, sequence.coming.imports if sequence.coming is not None else ())
        except InsufficientBlocksError:
            return False
        self._count(sequence, sequence.cached.plus(reused))
        # A tier that finds what it cannot load would have it start over with every chunk.
        sequence.computes = ctx.tokens.processed < before
        if not self.loading(sequence):
            self._land(sequence)
        return True

    def awaits(self, sequence: SequenceState) -> bool:
        """Whether it has a load that extend() has not ended."""
        loads = self.core.loads
        return loads is not None and sequence.ctx.request_id in loads.under_way

    def loading(self, sequence: SequenceState) -> bool:
        """Whether a part of its prompt is still on its way from a tier: extend() would wait for it."""
        return self.core.loading(sequence.ctx)

    def _land(self, sequence: SequenceState) -> bool:
        """End the request's load, waiting for it if need be; False when it has none. It keeps the pages that it has."""
        ctx = sequence.ctx
        if not self.awaits(sequence):
            return False
        found = ctx.tokens.processed
        self.core.wait_for_loads([ctx])  # a load that failed moves the window back
        sequence.computes = ctx.tokens.processed < found
        self._count(sequence, sequence.cached.less(found - ctx.tokens.processed))
        return True

    def _count(self, sequence: SequenceState, cached: Reused) -> None:
        if not sequence.preemptions and cached != sequence.cached:
            more = (new - old for new, old in zip(cached, sequence.cached, strict=True))
            self.reused = self.reused.plus(Reused(*more))
            sequence.cached = cached

    def poll(self) -> None:
        """Take note of what has come from the tiers or gone there. Never waits."""
        self.core.poll_transfers()

    @property
    def tiers(self) -> TierCount:
        """What the node's tiers hold."""
        connector = self.core.connector
        return connector.count() if connector is not None else TierCount()

    def extend_rows(self, contexts: Sequence[TextContext]) -> list[TextContext]:
        """Pages for the next token of each; those for which there were none, which keep what they had."""
        refused = self.core.alloc_many(contexts)
        return [ctx for ctx in contexts if ctx.request_id in refused] if refused else []

    def inputs(self, contexts: Sequence[TextContext]) -> ShardInputs:
        """Block table and lengths of a batch, with the pages; the next call overwrites them."""
        inputs = self.core.runtime_inputs(contexts)
        assert isinstance(inputs, LeafInputs)
        return inputs.shards[0]

    def publish(self, contexts: Sequence[TextContext]) -> None:
        """Let others reuse the full pages of what was processed."""
        if len(contexts):
            self.core.step(contexts)

    def release(self, sequence: SequenceState) -> None:
        """Give a request's pages back; published ones stay until their place is needed."""
        self.core.release(sequence.request_id)

    def will_be_reused(self, sequence: SequenceState, running: Sequence[SequenceState]) -> bool:
        """Whether one of `running` is computing the very page that this request would compute first.

        It is worth waiting for: equal prompts that arrive together are then computed once.
        """
        ctx = sequence.ctx
        have = self.core.cached_pages(ctx)
        if have >= self.core.may_reuse(ctx):
            return False
        need = (have + 1) * self.page_size
        page = ctx.tokens.data[:need].tobytes()
        return any(
            other.ctx.tokens.length > need
            and other.ctx.root_key == ctx.root_key
            # From the end: prompts that share a system prompt differ late.
            and other.ctx.tokens.data[:need].tobytes() == page
            for other in running
        )
