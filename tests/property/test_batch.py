"""A ContextBatch against the same contexts one by one: two caches, the same history, the same answers.

Page ids may differ (equal pages collapse at another moment), so what is compared is everything else: windows,
tokens, page counts, free pages, hits, refusals and counters. The two are only looked at now and then, because
looking makes the batch publish what it has put off.
"""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayk import ContextBatch, InferenceSession, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk.errors import InsufficientBlocksError, RaykError, TokenError

MACHINES = settings.get_profile("rayk-machines")
TOKEN = st.integers(0, 1)
PICK = st.integers(0, 30)


def make(size: int, pages: int, drafts: int) -> PagedKVCacheManager:
    more = {"speculative_method": "eagle", "num_draft_tokens": drafts} if drafts else {}
    params = MHAKVCacheParams(
        dtype="float32", n_kv_heads=1, head_dim=1, num_layers=1, page_size=size, devices=["cpu"],
        enable_prefix_caching=True, **more,
    )  # fmt: skip
    return PagedKVCacheManager(params, InferenceSession(runtime="inline"), pages, max_batch_size=8)


class BatchMachine(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 3), pages=st.integers(4, 24), drafts=st.sampled_from([0, 0, 1]))
    def start(self, size: int, pages: int, drafts: int) -> None:
        self.size, self.made = size, 0
        self.single, self.many = make(size, pages, drafts), make(size, pages, drafts)
        self.contexts: list[TextContext] = []  # in the order of the batch
        self.batch = ContextBatch()

    def both(self, single, many) -> bool:
        """The same outcome twice; whether it succeeded."""
        errors: list[RaykError | None] = []
        for call in (single, many):
            try:
                call()
                errors.append(None)
            except RaykError as error:
                errors.append(error)
        assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])
        return errors[0] is None

    # -- coming and going --------------------------------------------------------------------------

    @precondition(lambda self: len(self.contexts) < 8)
    @rule(tokens=st.lists(TOKEN, min_size=1, max_size=8), limit=st.integers(8, 40), early=st.booleans())
    def admit(self, tokens: list[int], limit: int, early: bool) -> None:
        self.made += 1
        a, b = (TextContext(f"r{self.made}", tokens, limit) for _ in range(2))
        if early:  # a context may also be in the batch before it has a page
            self.batch.add(b)
        for manager in (self.single, self.many):
            manager.claim(a.request_id, 0)
        if not self.both(lambda: self.single.alloc(a, 0), lambda: self.many.alloc(b, 0)):
            for manager in (self.single, self.many):
                manager.release(a.request_id, 0)
            if early:
                self.batch.remove(b.request_id)
            return
        self.contexts.append(a)
        if not early:
            self.batch.add(b)

    @precondition(lambda self: self.contexts)
    @rule(pick=PICK, release_first=st.booleans(), preempt=st.booleans())
    def finish(self, pick: int, release_first: bool, preempt: bool) -> None:
        at = pick % len(self.contexts)
        a = self.contexts[at]
        last = self.contexts.pop()
        if at < len(self.contexts):
            self.contexts[at] = last
        if preempt:
            a.reset()
            self.batch[at].reset()
        self.single.release(a.request_id, 0)
        if release_first:
            self.many.release(a.request_id, 0)
        b = self.batch.remove(a.request_id)
        if not release_first:
            self.many.release(a.request_id, 0)
        self.same_window(a, b)
        b.tokens.append(1)  # its own tokens again: this must not reach the arena

    # -- a step --------------------------------------------------------------------------------------

    @precondition(lambda self: self.contexts)
    @rule(count=st.integers(1, 4), token=TOKEN, inputs=st.booleans())
    def decode(self, count: int, token: int, inputs: bool) -> None:
        for _ in range(count):
            refused = []
            for ctx in self.contexts:
                try:
                    self.single.alloc(ctx, 0)
                except InsufficientBlocksError:
                    refused.append(ctx.request_id)
            [got] = self.many.alloc_many([self.batch])
            assert sorted(got) == sorted(refused)
            if refused:
                return
            if inputs:
                self.same_inputs()
            tokens = np.full(len(self.batch), token, np.int32)
            full = [c for c in self.contexts if c.tokens.end == c.tokens.length >= c.max_length]
            if full:
                before = self.batch.lengths.copy()
                with pytest.raises(TokenError, match="max_length"):
                    self.batch.update(tokens)
                assert (self.batch.lengths == before).all()
                return
            for ctx in self.contexts:
                ctx.update(token)
            self.batch.update(tokens)
            self.both(lambda: self.single.step([self.contexts]), lambda: self.many.step([self.batch]))

    def same_inputs(self) -> None:
        a = self.single.runtime_inputs([self.contexts])[0].shards[0]
        b = self.many.runtime_inputs([self.batch])[0].shards[0]
        assert a.lookup_table.shape == b.lookup_table.shape
        assert ((a.lookup_table == self.single.total_num_blocks()) == (b.lookup_table == a.lookup_table.max())).all()
        core = self.many._calls.cores[0]
        for row, ctx in zip(b.lookup_table.tolist(), self.batch, strict=True):
            request = core.requests[ctx.request_id]
            mine = core.table.rows[request.row][: request.pages].tolist()  # not get_req_blocks(): that publishes
            shown = [page for page in row if page != core.num_pages]
            assert shown == mine[: len(shown)]
        for name in ("cache_lengths", "max_prompt_length", "max_cache_length", "attention_dispatch_metadata"):
            assert getattr(a, name).tolist() == getattr(b, name).tolist()

    # -- the odd things that end the short way ------------------------------------------------------

    @precondition(lambda self: self.contexts)
    @rule(pick=PICK, chunk=st.integers(1, 3))
    def chunk(self, pick: int, chunk: int) -> None:
        at = pick % len(self.contexts)
        if chunk < self.contexts[at].tokens.active_length:
            self.contexts[at].tokens.chunk(chunk)
            self.batch[at].tokens.chunk(chunk)

    @precondition(lambda self: self.contexts)
    @rule(pick=PICK, drafts=st.lists(TOKEN, max_size=2))
    def draft(self, pick: int, drafts: list[int]) -> None:
        at = pick % len(self.contexts)
        self.contexts[at].draft_tokens_to_verify = tuple(drafts)
        self.batch[at].draft_tokens_to_verify = tuple(drafts)

    @precondition(lambda self: self.contexts)
    @rule(pick=PICK)
    def alone(self, pick: int) -> None:
        """One context of the batch is allocated and stepped by itself."""
        at = pick % len(self.contexts)
        a, b = self.contexts[at], self.batch[at]
        if self.both(lambda: self.single.alloc(a, 0), lambda: self.many.alloc(b, 0)):
            self.both(lambda: self.single.step([[a]]), lambda: self.many.step([[b]]))

    @rule()
    def forget_the_cache(self) -> None:
        self.single.reset_prefix_cache()
        self.many.reset_prefix_cache()

    # -- looking -------------------------------------------------------------------------------------

    @staticmethod
    def same_window(a: TextContext, b: TextContext) -> None:
        assert a.tokens.all.tolist() == b.tokens.all.tolist()
        assert (a.tokens.processed, a.tokens.end) == (b.tokens.processed, b.tokens.end)
        assert a.cached_prefix_length == b.cached_prefix_length

    @invariant()
    def same_windows(self) -> None:
        if hasattr(self, "batch"):
            assert [c.request_id for c in self.contexts] == [c.request_id for c in self.batch]
            for a, b in zip(self.contexts, self.batch, strict=True):
                self.same_window(a, b)
            assert self.single.get_metrics_aggregated() == self.many.get_metrics_aggregated()

    @rule(tokens=st.lists(TOKEN, min_size=1, max_size=8))
    def look(self, tokens: list[int]) -> None:
        probe = TextContext("probe", tokens, 99)
        assert self.single.get_prefix_cache_hit_counts(probe) == self.many.get_prefix_cache_hit_counts(probe)
        assert self.single.num_free_blocks() == self.many.num_free_blocks()
        for ctx in self.contexts:
            assert len(self.single.get_req_blocks(ctx.request_id, 0)) == len(
                self.many.get_req_blocks(ctx.request_id, 0)
            )
        self.single.check_integrity()
        self.many.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "batch"):
            self.look([0])
            while self.contexts:
                self.finish(0, True, False)
            self.look([0])
            assert self.many.get_num_used_pages(0) == 0


TestBatch = BatchMachine.TestCase
TestBatch.settings = settings(MACHINES, max_examples=4 * MACHINES.max_examples, stateful_step_count=40)
