"""The engine's dealings with its replica's cache: every call of ReplicaCore that it makes is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rayk.context import TextContext
from rayk.engine.events import PagesChanged
from rayk.engine.generation import Generation
from rayk.errors import InsufficientBlocksError
from rayk.hashing import PageHash
from rayk.inputs import LeafInputs, ShardInputs
from rayk.pages import Pages
from rayk.replica import ReplicaCore


class _Told:
    """A PageListener."""

    def __init__(self, tell: Callable[[PagesChanged], None]) -> None:
        self._tell = tell

    def stored(self, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        self._tell(PagesChanged(True, b"".join([each[:8] for each in hashes])))

    def removed(self, hashes: Sequence[PageHash]) -> None:
        self._tell(PagesChanged(False, b"".join([each[:8] for each in hashes])))


class Cache:
    """`watermark`: the share of all pages that admissions leave free for the growth of what runs already."""

    def __init__(self, core: ReplicaCore, watermark: float) -> None:
        self.core = core
        self.page_size = core.params.page_size
        self._spare = math.ceil(core.num_pages * watermark)

    def report_pages(self, tell: Callable[[PagesChanged], None]) -> None:
        """Call `tell` with what is cached and dropped from now on. Before any request."""
        self.core.listen(_Told(tell))

    def admit(self, generation: Generation, alone: bool) -> bool:
        """Claim and allocate; False, and nothing changed, while there is no room. `alone`: the watermark is moot."""
        core, ctx = self.core, generation.ctx
        if not alone and core.used_fraction_after(ctx) * core.num_pages > core.num_pages - self._spare + 1e-6:
            return False
        core.claim(ctx.request_id)
        if self.extend(generation):
            return True
        core.release(ctx.request_id)
        return False

    def extend(self, generation: Generation) -> bool:
        """Pages for a request's next window, reusing what others cached meanwhile; False when there are too few."""
        ctx = generation.ctx
        try:
            reused = self.core.alloc(ctx)
        except InsufficientBlocksError:
            return False
        found = ctx.tokens.processed
        self.core.settle([ctx])  # before its tokens are looked at: a load that failed moves the window back
        if not generation.preemptions:
            generation.cached_tokens += sum(reused) - (found - ctx.tokens.processed)
        return True

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

    def release(self, generation: Generation) -> None:
        """Give a request's pages back; published ones stay until their place is needed."""
        self.core.release(generation.request_id)

    def will_be_reused(self, generation: Generation, running: Sequence[Generation]) -> bool:
        """Whether one of `running` is computing the very page that this request would compute first.

        It is worth waiting for: equal prompts that arrive together are then computed once.
        """
        ctx = generation.ctx
        have = self.core.resident(ctx)
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
