"""What a step of an engine reports. Tokens come as columns: one entry a step, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rayk import protocol as m
from rayk.errors import RaykError
from rayk.kvcache.request import NOTHING_REUSED, Reused

Numbers = npt.NDArray[np.int64]
MOVED = "moved"


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one position: of the chosen token, and of the most likely ones."""

    chosen: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Request numbers[i] got tokens[i]: [n] int64 each. `logprobs[i]` exists for those that asked."""

    numbers: Numbers
    tokens: Numbers
    logprobs: dict[int, TokenLogprobs]


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Of the tokens of request `number`'s prompt from position `start` on, before its first token comes."""

    number: int
    start: int
    found: list[TokenLogprobs]


class Text(NamedTuple):
    """More text of a request that streams it; stop strings never show."""

    number: int
    piece: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is over and holds nothing any more.

    `reason` is "stop" (a stop token or string), "length" (as many tokens as asked for, or the model's limit), or, with
    the `error`, "timeout", "cancelled" or "error"; MOVED when it was handed over and goes on elsewhere. `text` is the
    whole answer where there is a tokenizer. `cached` are tokens that were found in the cache from its first admission
    on, until it was preempted. Times are seconds of the engine's clock since submission; None: it did not come to that.
    """

    number: int
    reason: str
    cached: Reused = NOTHING_REUSED
    text: str | None = None
    error: RaykError | None = None
    preemptions: int = 0
    admitted_after: float | None = None
    first_token_after: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Begun:
    """The requests with those numbers have their first tokens here: for a scheduler, which sees no tokens."""

    numbers: list[int]


@dataclass(frozen=True, slots=True)
class PagesChanged:
    """Pages were cached (`stored`) or dropped; `keys` are 8 bytes of each one's hash, in order."""

    stored: bool
    keys: bytes


class Arrivals(m.MessagePart, frozen=True):
    """Request `number` was admitted: what became of each of its imports, which are not needed any more."""

    number: int
    arrivals: list[m.Arrival]


class Answered(m.MessagePart, frozen=True):
    """The answer to Query `number`; `data` are the pages of each buffer, where nothing else carries them."""

    number: int
    result: m.Result
    data: list[bytes] = []


Event = Tokens | Begun | PromptLogprobs | Text | Finished | PagesChanged | Arrivals | Answered
