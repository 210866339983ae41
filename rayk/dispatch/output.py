"""What a caller holds of a request: its output when it is over, and until then a handle to it."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, TypeVar

import msgspec

from rayk.context import IntArray
from rayk.errors import RaykError
from rayk.kvcache.request import NOTHING_REUSED, Reused
from rayk.protocol.engine import Ended, Report
from rayk.protocol.engine_reports import TokenLogprobs
from rayk.request_errors import RequestCancelledError, RequestError, RequestTimeoutError
from rayk.sampling import SamplingParams
from rayk.values import told

log = logging.getLogger("rayk.engine")

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """The answer to one prompt. With an `error`, `tokens` and `text` are what there was by then.

    `tokens` include the stop token that ended it; `text` (None without a tokenizer) leaves special tokens, stop tokens
    and stop strings out. `finish_reason`: "stop", "length", "timeout", "cancelled" or "error". `cached_tokens` of the
    prompt were not computed; `cached` says where they were found. `logprobs` has an entry for each token where asked
    for; `prompt_logprobs` one for each of the prompt, None for the first.
    `ttft` and `seconds` are from the call to the first token and to the end, `queued` from its arrival at a
    replica to its admission there, `gaps` are the seconds between arrivals of tokens, with how many arrived.
    """

    id: str
    prompt_length: int
    tokens: list[int]
    text: str | None
    cached_tokens: int
    finish_reason: str
    error: RaykError | None = None
    logprobs: list[TokenLogprobs] | None = None
    replica: int | None = None
    preemptions: int = 0
    retries: int = 0
    queued: float | None = None
    ttft: float | None = None
    seconds: float = 0.0
    gaps: list[tuple[float, int]] = field(default_factory=list, repr=False)
    cached: Reused = NOTHING_REUSED
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Update(msgspec.Struct, frozen=True):
    """More of one answer: number `index` of the call. `output` comes with the last one. `text` is that of `pieces`, as
    they came: one for each token that completed some text."""

    index: int
    id: str
    tokens: list[int]
    text: str
    output: Output | None = None
    logprobs: list[TokenLogprobs] = []
    pieces: list[str] = []


class Trace(Protocol):
    """What notes when a request came to what."""

    def mark(self, moment: str) -> None:
        """Now: "placed" or "sent"."""
        ...


class Handle:
    """One request of a Cluster's; whoever submitted it may wait for it, read along, or cancel it.

    What is not read yet is kept once, as the answer itself: a slow reader costs no more than that. A handle that is
    dropped cancels nothing: its request goes on to its end, and nobody hears of it.
    """

    def __init__(
        self, index: int, number: int, request_id: str, prompt: IntArray, sampling: SamplingParams, **more: Any
    ) -> None:
        self.index = index
        self.number = number
        self.ticket = 0  # of its latest attempt, once it was sent
        self.id = request_id
        self.prompt = prompt
        self.sampling = sampling
        self.timeout: float | None = more.get("timeout")
        self.stream_text: bool = more.get("stream_text", False)
        self.cache_salt: str | None = more.get("cache_salt")
        self.tenant: str | None = more.get("tenant")
        self.priority: int = more.get("priority", 0)
        self.deadline: float | None = more.get("deadline")
        self.submitted_at = monotonic()
        self.call = 0  # which call it came with: those of one call wait in line, calls take turns
        self.session: str | None = more.get("session")
        self.first: Handle | None = None  # of the answers to one prompt: they share its pages where that one is
        self.replica: int | None = None  # where it is placed, None while it waits
        self.prefilling = False  # it has no token from the replica where it is placed
        self.unwanted = False  # cancelled, and its replica was told
        self.retries = 0
        self.tokens: list[int] = []
        self.future: Future[Output] = Future()
        self.future.set_running_or_notify_cancel()  # whoever waits for it may be cancelled, the future is not
        self.trace: Trace | None = None  # of those that are sampled
        self.on_news: Callable[[Handle], None] | None = None  # called by the reader of reports, must not block
        self.canceller: Callable[[Handle], None] | None = None
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._taken = 0
        self._over = False
        self._output: Output | None = None  # until it is taken
        self._told = False  # somebody was told of what is not taken yet
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]
        self._first_at: float | None = None
        self._last_at = 0.0
        self._gaps: list[tuple[float, int]] = []
        self._preemptions = 0
        self._queued: float | None = None
        self._cached = NOTHING_REUSED

    def beside(self, index: int, number: int, choice: int, sampling: SamplingParams) -> Handle:
        """Another answer to the same prompt, with settings of its own."""
        if sampling.seed is None and not sampling.greedy:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        names = ("timeout", "stream_text", "cache_salt", "tenant", "priority", "deadline", "session")
        more = {name: getattr(self, name) for name in names}
        if sampling.prompt_logprobs is not None:
            more["cache_salt"] = f"{self.cache_salt}/{choice}"  # each computes all of its prompt
        other = Handle(index, number, f"{self.id}/{choice}", self.prompt, sampling, **more)
        other.call, other.submitted_at, other.on_news, other.first = self.call, self.submitted_at, self.on_news, self
        return other

    def result(self, timeout: float | None = None) -> Output:
        """Wait for the end. The built-in TimeoutError after `timeout` seconds; the request goes on."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """End the request; one that is over is left alone. result() comes soon, with what there is by then."""
        if self.canceller is not None and not self.done:
            self.canceller(self)

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self.future.done()

    def take(self) -> Update:
        """What came since the last call; the output once."""
        with self._lock:
            self._told = False
            output, self._output = self._output, None
            before, self._taken = self._taken, len(self.tokens)
            tokens = self.tokens[before:]
            logprobs = self._logprobs[before : self._taken] if self._logprobs else []
            pieces, self._pieces = self._pieces, []
        return Update(self.index, self.id, tokens, "".join(pieces), output, logprobs, pieces)

    # -- for the reader of reports ----------------------------------------------------------------------

    def begin_again(self, ticket: int) -> None:
        """From now on only that attempt counts; what is here already is not asked of it again."""
        with self._lock:
            self.ticket, self.replica = ticket, None

    def add(
        self,
        ticket: int,
        now: float,
        tokens: list[int],
        pieces: Sequence[str] = (),
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        """More of the answer came at that time, by that attempt."""
        with self._lock:
            if ticket != self.ticket:  # it was given up meanwhile, and the next one brings these tokens
                return
            if not tokens:
                pass
            elif self._first_at is None:
                self._first_at = self._last_at = now
                if len(tokens) > 1:
                    self._gaps.append((0.0, len(tokens) - 1))
            else:
                self._gaps.append((now - self._last_at, len(tokens)))
                self._last_at = now
            self.tokens += tokens
            self._pieces += pieces
            if logprobs:
                self._logprobs += logprobs
            told, self._told = self._told, True
        if not told:
            self._tell()

    def add_prompt_logprobs(self, start: int, found: list[TokenLogprobs]) -> None:
        """Those of the prompt's tokens from `start` on; what was known from there on is replaced."""
        self._prompt_logprobs[start:] = found

    def record_end(self, end: Ended) -> None:
        """The request left a replica. What was cached, and how long it waited there, is of its first admission."""
        self._preemptions += end.preemptions
        if self._queued is None and end.admitted_after is not None:
            self._queued = end.admitted_after
            self._cached = end.cached.less(max(0, end.cached.total - len(self.prompt)))

    def end(self, error: RaykError) -> None:
        """It is over, with that error."""
        reasons = {RequestCancelledError: "cancelled", RequestTimeoutError: "timeout"}
        self.finish(reasons.get(type(error), "error"), error)

    def finish(self, reason: str, error: RaykError | None = None, text: str | None = None) -> None:
        """It is over."""
        with self._lock:
            if self._over:
                return
            self._over = True
            output = Output(
                self.id,
                len(self.prompt),
                list(self.tokens),
                text,
                self._cached.total,
                reason,
                error,
                list(self._logprobs) if self.sampling.logprobs is not None else None,
                self.replica,
                self._preemptions,
                self.retries,
                self._queued,
                None if self._first_at is None else self._first_at - self.submitted_at,
                monotonic() - self.submitted_at,
                self._gaps,
                self._cached,
                self._prompt_logprobs if self.sampling.prompt_logprobs is not None else None,
            )
            self._output = output
            told, self._told = self._told, True
        _tell(self.future.set_result, output)  # its callbacks may look at the handle
        if not told:
            self._tell()

    def _tell(self) -> None:
        if self.on_news is not None and not _tell(self.on_news, self):
            self.on_news = None


def _tell(call: Callable[[T], None], argument: T) -> bool:
    """Call what somebody gave us; whether it went well. It may be of a closed event loop, and must not end the thread
    that reads reports, whatever it raises."""
    try:
        call(argument)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        log.warning("a callback of a request raised", exc_info=error)
        return False
    return True


def deliver(report: Report, handles: Mapping[int, Handle]) -> list[int]:
    """Give the tokens and texts of a report to its requests, by ticket; the tickets of those whose first from
    there it was."""
    first, now = list[int](), monotonic()
    for number, start, found in report.prompt_logprobs:
        if (handle := handles.get(number)) is not None:
            handle.add_prompt_logprobs(start, found)
    numbers, tokens = (column.tolist() for column in report.columns())
    parts, logprobs = _by_number(zip(numbers, tokens, strict=True)), report.logprobs
    texts = _by_number(report.texts)
    for number, part in parts.items():
        handle = handles.get(number)
        if handle is not None:
            if handle.prefilling and handle.ticket == number:
                handle.prefilling = False
                first.append(number)
            pieces = texts.pop(number, ()) if texts else ()
            handle.add(number, now, part, pieces, logprobs.get(number, ()) if logprobs else ())
    for number, pieces in texts.items():  # of tokens that were reported before
        if (handle := handles.get(number)) is not None:
            handle.add(number, now, [], pieces)
    return first


def _by_number(given: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    """The values of each number, in their order."""
    found = defaultdict[int, list[T]](list)
    for number, value in given:
        found[number].append(value)
    return found


def end_as_reported(handle: Handle, end: Ended) -> None:
    """The request is over at its replica."""
    try:
        handle.record_end(end)
        handle.finish(end.reason, end.error, end.text)
    except Exception as raised:  # an error that nobody here knows
        handle.end(RequestError(handle.id, f"its end cannot be read: {told(raised)}"))
