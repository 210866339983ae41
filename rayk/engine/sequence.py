"""One request inside the engine, from submission to its end."""

from __future__ import annotations

from typing import Any

from rayk.context import IntArray, TextContext
from rayk.engine.detokenizer import Detokenizer
from rayk.engine.page_sharing import IncomingPages
from rayk.kvcache.request import NOTHING_REUSED, Reused
from rayk.protocol.engine_request import Limits, Request


class SequenceState:
    """The engine owns it and its context. `order` is its place in the queue, kept through preemptions."""

    __slots__ = (
        "admitted_at",
        "cached",
        "coming",
        "computes",
        "ctx",
        "deadline",
        "detokenizer",
        "first_token_at",
        "limit",
        "number",
        "order",
        "paused",
        "preemptions",
        "processors",
        "prompt_length",
        "request",
        "request_id",
        "sampling",
        "seed",
        "stop_ids",
        "submitted_at",
    )

    def __init__(self, request: Request, tokens: IntArray, limits: Limits, order: int, seed: int, now: float) -> None:
        self.request = request
        self.number = request.number
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.order = order
        self.seed = seed
        self.submitted_at = now
        self.deadline = None if request.timeout is None else now + request.timeout
        self.prompt_length = len(tokens) - request.generated
        self.limit = self.prompt_length + limits.new_tokens(self.prompt_length, request.sampling)  # of all its tokens
        self.ctx = TextContext(
            request.request_id,
            tokens,
            self.limit,
            request.cache_salt,
            adapter=request.adapter,
        )
        self.stop_ids: tuple[int, ...] = ()
        self.processors: Any = None  # of its logits, made by the sampler when they are needed first
        self.detokenizer: Detokenizer | None = None
        self.paused = False
        self.preemptions = 0
        self.cached: Reused = NOTHING_REUSED
        self.coming: IncomingPages | None = None  # from a peer, until it is admitted
        self.computes = False  # a load failed: the rest of its prompt is not looked for any more
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.ctx.tokens.length - self.prompt_length

    @property
    def simple(self) -> bool:
        """Whether a new token needs no look of its own: no text and no log probabilities."""
        return self.detokenizer is None and self.sampling.logprobs is None

    @property
    def answer(self) -> IntArray:
        """The tokens of the answer so far, read-only."""
        return self.ctx.tokens.all[self.prompt_length :]
