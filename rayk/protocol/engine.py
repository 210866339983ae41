"""What a driver and an engine say to each other: requests one way, reports the other, as msgpack.

A report holds everything since the last one, whatever the number of steps; its tokens are columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from rayk import protocol as m
from rayk.context import as_int32
from rayk.errors import RaykError
from rayk.kvcache.request import NOTHING_REUSED, Reused
from rayk.protocol.engine_reports import (
    MOVED,
    Answered,
    Arrivals,
    Begun,
    Event,
    Finished,
    Numbers,
    PagesChanged,
    PromptLogprobs,
    Text,
    TokenLogprobs,
    Tokens,
)
from rayk.protocol.engine_request import Imports, Request
from rayk.sampling import SamplingParams
from rayk.values import printable


class Ask(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """A Request; `tokens` are raw int32."""

    number: int
    request_id: str
    tokens: bytes
    sampling: SamplingParams
    generated: int = 0
    timeout: float | None = None
    stream_text: bool = False
    cache_salt: str | None = None
    adapter: str | None = None
    imports: Imports | None = None

    @classmethod
    def of(cls, request: Request) -> Ask:
        """TokenError when the tokens are none."""
        tokens = as_int32(request.tokens, request.request_id).tobytes()
        rest = (request.sampling, request.generated, request.timeout, request.stream_text)
        more = (request.cache_salt, request.adapter, request.imports)
        return cls(request.number, request.request_id, tokens, *rest, *more)

    def request(self) -> Request:
        """The request again."""
        tokens = np.frombuffer(self.tokens, np.int32)
        rest = (self.sampling, self.generated, self.timeout, self.stream_text, self.cache_salt, self.adapter)
        return Request(self.number, self.request_id, tokens, *rest, self.imports)


class Submit(m.Message, frozen=True):
    """Take these requests; what is wrong with one is reported as its end."""

    asks: list[Ask]


class Cancel(m.Message, frozen=True):
    """End these requests."""

    numbers: list[int]


class HandOver(m.Message, frozen=True):
    """Let go of all requests, and of those that still come, until this is taken back: they go on elsewhere. Each one's
    Ended says MOVED, after all of its tokens."""

    on: bool


class Forget(m.Message, frozen=True):
    """That driver is gone: end its requests, take nothing of it and report nothing to it any more."""

    driver: int


class Query(m.Message, frozen=True):
    """A command of the page exchange (rayk.replica.page_exchange); the answer is an Answered with this number, none is
    wanted for number 0. `data` is as in Imports."""

    number: int
    command: m.ExchangeCommand
    data: list[list[bytes]] = []


Command = Submit | Cancel | HandOver | Forget | Query


class Ended(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """A Finished."""

    number: int
    reason: str
    cached: Reused = NOTHING_REUSED
    text: str | None = None
    failure: m.Failure | None = None
    preemptions: int = 0
    admitted_after: float | None = None
    first_token_after: float | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, event: Finished) -> Ended:
        error = _failure(event.error) if event.error is not None else None
        times = (event.admitted_after, event.first_token_after, event.seconds)
        return cls(event.number, event.reason, event.cached, event.text, error, event.preemptions, *times)

    @property
    def moved(self) -> bool:
        """Whether it goes on elsewhere."""
        return self.reason == MOVED

    @property
    def error(self) -> RaykError | None:
        """What went wrong, or None."""
        return m.to_error(self.failure) if self.failure is not None else None


def _failure(error: RaykError) -> m.Failure:
    """The error as a message can carry it, whatever text a model or a tokenizer put into it."""
    made = m.failure(error)
    return m.Failure(made.kind, [printable(each) if isinstance(each, str) else each for each in made.fields])


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened since the last report. numbers[i] got tokens[i], in this order: raw int64 and int32.

    `logprobs[number]` has an entry for each of its tokens here; `prompt_logprobs` are PromptLogprobs.
    `pages`: what was cached (True) or dropped since, in
    order, 8 bytes of each page's hash, by engines that were asked for it. `prefill_rate`: tokens of prompts that it
    computes in a second, 0 while that is not known. `used_pages`: held by requests and transfers. An empty report says
    that the engine lives. Where several drivers share an engine, each gets what its requests bring, and the scheduler
    the rest, with the numbers of those that began and ended: `first` are raw int64. `batch` counts its reports.
    """

    numbers: bytes = b""
    tokens: bytes = b""
    logprobs: dict[int, list[TokenLogprobs]] = {}
    texts: list[tuple[int, str]] = []
    ended: list[Ended] = []
    pages: list[tuple[bool, bytes]] = []
    steps: int = 0
    arrivals: list[Arrivals] = []
    prefill_rate: float = 0.0
    used_pages: int = 0
    answered: list[Answered] = []
    prompt_logprobs: list[tuple[int, int, list[TokenLogprobs]]] = []
    first: bytes = b""
    batch: int = 0

    @classmethod
    def of(
        cls, events: Sequence[Event], steps: int, prefill_rate: float = 0.0, used_pages: int = 0, batch: int = 0
    ) -> Report:
        """The report of these events."""
        kinds: dict[type[Event], list[Any]] = defaultdict(list)
        for event in events:
            kinds[type(event)].append(event)
        columns: list[Tokens] = kinds[Tokens]
        first = [number for event in kinds[Begun] for number in event.numbers]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for each in columns:
            for number, found in each.logprobs.items():
                logprobs.setdefault(number, []).append(found)
        return cls(
            np.concatenate([each.numbers for each in columns]).tobytes() if columns else b"",
            np.concatenate([each.tokens for each in columns]).astype(np.int32).tobytes() if columns else b"",
            logprobs,
            kinds[Text],
            [Ended.of(event) for event in kinds[Finished]],
            [(event.stored, event.keys) for event in kinds[PagesChanged]],
            steps,
            kinds[Arrivals],
            prefill_rate,
            used_pages,
            kinds[Answered],
            [(event.number, event.start, event.found) for event in kinds[PromptLogprobs]],
            np.array(first, np.int64).tobytes() if first else b"",
            batch,
        )

    def columns(self) -> tuple[Numbers, Numbers]:
        """Request numbers and their tokens, [n] each."""
        return np.frombuffer(self.numbers, np.int64), np.frombuffer(self.tokens, np.int32).astype(np.int64)


_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """The message's bytes."""
    return _encoder.encode(message)


def decode_command(wire: bytes) -> Command:
    """msgspec.ValidationError for what is none."""
    return _commands.decode(wire)


def decode_report(wire: bytes) -> Report:
    """msgspec.ValidationError for what is none."""
    return _reports.decode(wire)
