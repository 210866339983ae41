"""What is asked of an engine, and whether it can be served at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from rayk.context import IntArray, as_int32
from rayk.errors import TokenError
from rayk.protocol.base import MessagePart
from rayk.protocol.serving import DRIVER_SHIFT
from rayk.protocol.to_replica import ImportHead
from rayk.request_errors import RequestError
from rayk.sampling import SamplingParams
from rayk.values import shown


class Imports(MessagePart, frozen=True):
    """Pages of a request's prefix that other engines have pinned for it. `data[i]`: the pages of each buffer, for the
    i-th of those that nothing else carries."""

    heads: list[ImportHead]
    data: list[list[bytes]]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request. `tokens`: [n] ints, the prompt, followed by the last `generated` tokens of an answer to continue.

    `number` is the sender's own, unique among its requests; events bear it. `timeout` is in seconds from its
    submission. `stream_text` asks for pieces of text while it runs. Requests share pages only with those of equal
    `cache_salt` and `adapter`.
    """

    number: int
    request_id: str
    tokens: Any
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated: int = 0
    timeout: float | None = None
    stream_text: bool = False
    cache_salt: str | None = None
    adapter: str | None = None
    imports: Imports | None = None

    @property
    def key(self) -> str:
        """Its id among the requests of all drivers."""
        driver = self.number >> DRIVER_SHIFT
        return f"{driver}/{self.request_id}" if driver else self.request_id


def timeout_problem(timeout: Any) -> str | None:
    """Why `timeout` is no number of seconds, or None."""
    if timeout is None:
        return None
    try:
        if isinstance(timeout, Real) and not isinstance(timeout, bool) and 0 < float(timeout) < math.inf:
            return None
    except OverflowError:  # an integer beyond all floats
        pass
    return f"timeout is {shown(timeout)}, it must be a number of seconds above 0"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask of an engine. `max_length` counts prompt and answer."""

    vocab_size: int
    max_length: int
    num_pages: int
    page_size: int
    has_tokenizer: bool

    def check(self, request: Request) -> IntArray:
        """The request's tokens, [n] int32; RequestError says what is wrong with it and what would do."""

        def refuse(message: str) -> RequestError:
            return RequestError(request.request_id, message)

        try:
            tokens = as_int32(request.tokens, request.request_id)
        except TokenError as error:
            raise refuse(error.message) from None
        prompt, sampling = len(tokens) - request.generated, request.sampling
        if prompt < 1:
            raise refuse("the prompt is empty; give it at least one token")
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if wrong.size:
            at = int(wrong[0])
            raise refuse(
                f"token {tokens[at]} at position {at} is outside the vocabulary of {self.vocab_size} tokens; "
                "use the tokenizer of this model"
            )
        problem = sampling.problem()
        if problem is not None:
            raise refuse(problem)
        for name, given in (("stop", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
            beyond = [token for token in given if token >= self.vocab_size]
            if beyond:
                raise refuse(f"{name} token {beyond[0]} is outside the vocabulary of {self.vocab_size} tokens")
        if (sampling.stop or request.stream_text) and not self.has_tokenizer:
            raise refuse("stop strings and text need a tokenizer, and this model's folder has none; use stop_token_ids")
        problem = timeout_problem(request.timeout)
        if problem is not None:
            raise refuse(problem)
        if prompt >= self.max_length:
            raise refuse(
                f"its prompt of {prompt} tokens leaves no room for an answer within the model's {self.max_length}; "
                "shorten it"
            )
        if request.generated >= self.new_tokens(prompt, sampling):
            raise refuse(f"{request.generated} tokens are generated already, {sampling.max_new_tokens} were asked for")
        self._check_pages(prompt, sampling, refuse)
        return tokens

    def _check_pages(self, prompt: int, sampling: SamplingParams, refuse: Any) -> None:
        longest = prompt + self.new_tokens(prompt, sampling)
        needed = -(-(longest - 1) // self.page_size)  # the last token is not processed any more
        if needed > self.num_pages:
            raise refuse(
                f"{prompt} prompt and {longest - prompt} new tokens need {needed} pages of {self.page_size} tokens, "
                f"the replica has {self.num_pages}: it can never fit; use more pages, or ask for fewer tokens"
            )

    def new_tokens(self, prompt: int, sampling: SamplingParams) -> int:
        """Most tokens that the answer to a prompt of that length may have."""
        return min(sampling.max_new_tokens, self.max_length - prompt)
