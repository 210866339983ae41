"""One request of a benchmark, and the token space that its tokens come from.

A request's tokens are described by *runs* `[first, count]` and built when asked for, so a trace of millions of
tokens costs kilobytes until it is served. There are two disjoint spaces:

* slots (first >= 0): positions of text that a trace or a generator names. Equal slots are equal tokens and nothing
  else is: the token of a slot is a bijective mix of its 31-bit number.
* generated (first < 0): the tokens that the model will answer with, counted downwards, each used by one request
  only, so that an answer matches nothing but a later prompt that quotes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from rayk.errors import RaykError

SLOTS = 1 << 31
"""Number of distinct slots: non-negative int32 tokens."""

FIRST_GENERATED = -2
"""The first generated token; -1 is left out because contexts use it as a placeholder."""

_MASK = np.int64(SLOTS - 1)

IntArray = npt.NDArray[np.int32]
Runs = npt.NDArray[np.int64]


class TokenSpaceError(RaykError, ValueError):
    """A workload names more distinct tokens than int32 has."""

    source: str
    needed: int
    text: ClassVar[str] = (
        f"{{source}}: needs {{needed}} distinct tokens, int32 has {SLOTS} for each of prompts and answers; "
        "take fewer requests (--requests)"
    )


class RequestTooLargeError(RaykError, ValueError):
    """A request that no replica can ever hold."""

    request_id: str
    prompt: int
    output: int
    page_size: int
    needed: int
    pages: int
    text: ClassVar[str] = (
        "request {request_id!r} ({prompt} prompt and {output} generated tokens) needs {needed} pages of {page_size} "
        "tokens, a replica has {pages}; use --pages {needed} or more"
    )


def slot_tokens(slots: npt.NDArray[np.int64]) -> IntArray:
    """Tokens of `slots` ([n], 0 <= slot < 2**31): [n] int32, non-negative, one to one with the slots."""
    mixed = (slots * np.int64(0x2545F491)) & _MASK
    mixed ^= mixed >> 15
    mixed = (mixed * np.int64(0x5851F42D)) & _MASK
    mixed ^= mixed >> 16
    return mixed.astype(np.int32)


def run_tokens(runs: Runs) -> IntArray:
    """Tokens of `runs` ([k, 2] int64 of first and count), one after another: [sum of counts] int32."""
    parts = []
    for first, count in runs.tolist():
        if first >= 0:
            parts.append(slot_tokens(np.arange(first, first + count, dtype=np.int64)))
        else:
            parts.append(np.arange(first, first - count, -1, dtype=np.int64).astype(np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def joined(runs: Runs) -> Runs:
    """The same tokens in fewer runs: slot runs that continue each other become one."""
    if len(runs) < 2:
        return runs
    first, count = runs[:, 0], runs[:, 1]
    starts = np.flatnonzero(np.concatenate([[True], (first[1:] != first[:-1] + count[:-1]) | (first[:-1] < 0)]))
    return np.stack([first[starts], np.add.reduceat(count, starts)], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class BenchRequest:
    """One request: when it arrives, what it asks, and what the model will answer.

    `arrival_s` is seconds from the start of the workload; it orders requests. `after` is the index of the request
    that must have finished before this one may be sent (the previous turn of its session), or None.
    """

    index: int
    request_id: str
    arrival_s: float
    session_id: str | None
    prompt_length: int
    output_length: int
    runs: Runs
    output_first: int
    after: int | None = None

    def prompt(self) -> IntArray:
        """The prompt's tokens, [prompt_length] int32."""
        return run_tokens(self.runs)

    def output(self) -> IntArray:
        """The tokens that the model answers with, [output_length] int32: output_first, output_first - 1, .."""
        return np.arange(self.output_first, self.output_first - self.output_length, -1, dtype=np.int64).astype(np.int32)

    def pages(self, page_size: int) -> int:
        """Most pages that serving this request takes: all its tokens but the last answer, which is never processed."""
        return -(-(self.prompt_length + self.output_length - 1) // page_size)

    def too_large(self, page_size: int, pages: int) -> RequestTooLargeError | None:
        """The error that says that it cannot fit into `pages` pages, if so."""
        needed, lengths = self.pages(page_size), (self.prompt_length, self.output_length)
        return RequestTooLargeError(self.request_id, *lengths, page_size, needed, pages) if needed > pages else None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they are to be sent, and where they came from.

    `source` names the file or generator; `kind` the format or generator; `parameters` what shaped it.
    """

    source: str
    kind: str
    requests: Sequence[BenchRequest]
    parameters: dict[str, float | int | str]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(request.prompt_length + request.output_length for request in self.requests)

    def first(self, count: int | None) -> Workload:
        """The same workload with its first `count` requests (all of them when None)."""
        if count is None or count >= len(self.requests):
            return self
        return Workload(self.source, self.kind, self.requests[:count], self.parameters)


class TokenSpace:
    """Hands out slots and generated tokens while a workload is read or made; each is handed out once."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._slots = 0
        self._generated = 0

    def slots(self, count: int) -> int:
        """The first of `count` fresh slots. TokenSpaceError when there are not that many left."""
        first, self._slots = self._slots, self._slots + count
        if self._slots > SLOTS:
            raise TokenSpaceError(self._source, self._slots)
        return first

    def generated(self, count: int) -> int:
        """The first (largest) of `count` fresh generated tokens. TokenSpaceError when there are not that many left."""
        first, self._generated = FIRST_GENERATED - self._generated, self._generated + count
        if self._generated > SLOTS + FIRST_GENERATED:
            raise TokenSpaceError(self._source, self._generated)
        return first
