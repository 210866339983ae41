"""One request inside the engine, from submission to its end."""

from __future__ import annotations

import secrets
from typing import Any

from rayk.context import IntArray, TextContext
from rayk.engine.detokenizer import Detokenizer, text_of
from rayk.engine.page_sharing import IncomingPages
from rayk.engine.structure import Structure
from rayk.errors import RaykError
from rayk.kvcache.request import NOTHING_REUSED, Reused
from rayk.protocol.engine_reports import Finished, Text
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
        "scored",
        "seed",
        "stop_ids",
        "structure",
        "submitted_at",
    )

    def __init__(
        self,
        request: Request,
        tokens: IntArray,
        limits: Limits,
        order: int,
        now: float,
        eos: tuple[int, ...] = (),
        tokenizer: Any = None,
    ) -> None:
        self.request = request
        self.number = request.number
        self.request_id = request.key  # in the cache; errors name the request's own
        self.sampling = request.sampling
        self.order = order
        drawn = request.sampling.seed
        self.seed = drawn if drawn is not None else 0 if request.sampling.greedy else secrets.randbits(63)
        self.submitted_at = now
        self.deadline = None if request.timeout is None else now + request.timeout
        self.prompt_length = len(tokens) - request.generated
        self.limit = self.prompt_length + limits.new_tokens(self.prompt_length, request.sampling)  # of all its tokens
        self.ctx = TextContext(
            request.key,
            tokens,
            self.limit,
            request.cache_salt,
            adapter=request.adapter,
        )
        self.stop_ids = (*(() if self.sampling.ignore_eos else eos), *self.sampling.stop_token_ids)
        self.scored = len(tokens) if self.sampling.prompt_logprobs is None or request.generated else 1
        """Tokens of its prompt whose log probabilities were reported, or are not wanted."""
        self.processors: Any = None  # of its logits, made by the sampler when they are needed first
        self.structure: Structure | None = None  # what its answer may still become, by the engine
        self.paused = False
        self.preemptions = 0
        self.cached: Reused = NOTHING_REUSED
        self.coming: IncomingPages | None = None  # from a peer, until it is admitted
        self.computes = False  # a load failed: the rest of its prompt is not looked for any more
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.detokenizer: Detokenizer | None = None
        if self.sampling.stop or request.stream_text:
            self.detokenizer = Detokenizer(tokenizer, self.sampling.stop)
            for at, token in enumerate(self.answer.tolist(), 1):
                self.detokenizer.add(token, may_stop=at >= self.sampling.min_tokens)
            self.detokenizer.piece()  # who continues an answer has seen it

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.ctx.tokens.length - self.prompt_length

    @property
    def simple(self) -> bool:
        """Whether a new token needs no look of its own: no text and no log probabilities."""
        return self.detokenizer is None and self.sampling.logprobs is None and self.structure is None

    @property
    def unscored(self) -> bool:
        """Whether the log probabilities of tokens of its prompt are to be reported."""
        return self.scored < self.prompt_length

    @property
    def answer(self) -> IntArray:
        """The tokens of the answer so far, read-only."""
        return self.ctx.tokens.all[self.prompt_length :]

    def cut_window(self, tokens: int) -> int:
        """Have the next forward process at most so many of its tokens; how many it will be."""
        window = self.ctx.tokens
        if window.end - window.processed > tokens:
            window.chunk(tokens)
        return window.end - window.processed

    def show(self, token: int, is_stop: bool) -> bool:
        """The text, if anybody needs it, grows by a token other than a stop token; whether it has a stop string."""
        if self.detokenizer is None:
            return False
        if not is_stop:
            self.detokenizer.add(token, may_stop=self.generated >= self.sampling.min_tokens)
        return self.detokenizer.stopped

    def complete(self, token: int, ended: str | Exception | None) -> bool:
        """Whether that token makes an answer whole that has a structure; nothing where it is over anyway."""
        if self.structure is None or ended == "stop":
            return False
        self.structure.add(token)
        return self.structure.over

    def new_text(self) -> list[Text]:
        """The text since the last call, for a request that streams it: none, or one event."""
        piece = self.detokenizer.piece() if self.request.stream_text and self.detokenizer is not None else ""
        return [Text(self.number, piece)] if piece else []

    def whole_text(self, tokenizer: Any, reason: str) -> str | None:
        """The text of the answer, which ended for that reason; None without a tokenizer. Raises what that one does."""
        if self.detokenizer is not None:
            self.detokenizer.finish()
            return self.detokenizer.text
        if tokenizer is None:
            return None
        answer = self.answer.tolist()
        return text_of(tokenizer, answer[:-1] if reason == "stop" and answer[-1] in self.stop_ids else answer)

    def finished(self, reason: str, now: float, text: str | None = None, error: RaykError | None = None) -> Finished:
        """Its last event, with the seconds from its submission to its admission, its first token and now."""

        def after(moment: float | None) -> float | None:
            return None if moment is None else moment - self.submitted_at

        times = after(self.admitted_at), after(self.first_token_at), now - self.submitted_at
        return Finished(self.number, reason, self.cached, text, error, self.preemptions, *times)
