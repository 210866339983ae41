"""Answers of a given shape: which tokens may come next, by llguidance.

A schema is compiled once for a model. Masks are computed while the model does its forward. What an answer may become is
a function of its tokens alone: one that goes on elsewhere is read again there, and none is lost.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from rayk.request_errors import RequestError
from rayk.structured import StructuredOutputs

KEPT = 256  # compiled schemas
WHITE = r"[ \n]{0,20}"  # between the parts of JSON: a model that is lost in it comes out again

_threads = ThreadPoolExecutor(1, "rayk-masks")


class Grammars:
    """What answers of one model are held to. Loads llguidance when it is needed first."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._tokenizer: Any = None
        self._compiled: OrderedDict[StructuredOutputs, Any] = OrderedDict()

    def begin(self, request_id: str, given: StructuredOutputs) -> Structure:
        """The structure of a new answer. RequestError says what is wrong with it."""
        matcher = self._compiled.get(given)
        if matcher is None:
            matcher = self._compiled[given] = self._compile(request_id, given)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(given)
        return Structure(matcher.deep_copy(), self._vocab_size)

    def _compile(self, request_id: str, given: StructuredOutputs) -> Any:
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise RequestError(
                request_id, "structured_outputs need llguidance where the model runs: pip install 'rayk[server]'"
            ) from None
        if self._source is None or not self._eos:
            raise RequestError(request_id, "structured_outputs need a tokenizer and an end-of-sequence token")
        try:
            if self._tokenizer is None:
                size = max(self._vocab_size, len(self._source))
                self._tokenizer = llguidance.hf.from_tokenizer(self._source, size, eos_token=list(self._eos))
            matcher = llguidance.LLMatcher(self._tokenizer, _grammar(llguidance.LLMatcher, given), log_level=0)
        except Exception as error:  # of what was given
            raise RequestError(request_id, f"structured_outputs: {error}") from None
        if matcher.is_error():
            raise RequestError(request_id, f"structured_outputs: {matcher.get_error()}")
        return matcher


def _grammar(kind: Any, given: StructuredOutputs) -> str:
    """The grammar in llguidance's form."""
    if given.json is not None or given.json_object:
        schema = given.json or '{"type": "object"}'
        return str(kind.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE}))
    if given.regex is not None:
        return str(kind.grammar_from_regex(given.regex))
    if given.choice:
        return str(kind.grammar_from_lark("start: " + " | ".join(json.dumps(each) for each in given.choice)))
    return str(kind.grammar_from_lark(given.grammar))


class Structure:
    """What one answer may still become."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask: Future[torch.Tensor] | None = None

    def prepare(self) -> None:
        """Begin to compute which tokens may come next, in another thread."""
        if self._mask is None:
            self._mask = _threads.submit(self._allowed)

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, [vocab] bool."""
        self.prepare()
        assert self._mask is not None
        return self._mask.result()

    def _allowed(self) -> torch.Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        found = np.zeros(self._vocab_size, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        found[: len(known)] = known
        return torch.from_numpy(found)

    def add(self, *tokens: int) -> None:
        """Those came next. ValueError when they may not, or when the grammar got too complex."""
        if self._mask is not None:
            self._mask.result()  # it reads the matcher
            self._mask = None
        if not self._matcher.consume_tokens(list(tokens)):
            raise ValueError(f"the answer left its structure: {self._matcher.get_error()}")

    @property
    def over(self) -> bool:
        """Whether the answer is whole, and nothing can follow."""
        return bool(self._matcher.is_stopped())
