"""Requests on their way, and the queue and batch of each replica.

waiting ──try_admit──> running (prefill ──> decode) ──> finished ──tick──> released
   ^                      │
   ├──── preempted <──────┤   newest first, when an alloc is refused; its tokens are computed again later
   └──── sent again <─────┘   when its replica is lost
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any

from rayk.context import TextContext
from rayk.kvcache.tick import Tick
from rayk.workloads.request import BenchRequest


class Prefill:
    """One replica's prefill clock: it prefills `rate` tokens a second, one request after the other, while its decoding
    requests go on. It only says when; the driver waits."""

    __slots__ = ("_free_at", "_rate")

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at = rate, 0.0

    def due(self, tokens: int, ready_at: float) -> float:
        """When the next one will be done: `tokens` tokens that could begin at `ready_at`. A driver that comes late does
        not delay those behind."""
        return max(self._free_at, ready_at) + tokens / self._rate

    def done(self, at: float) -> None:
        """The next one was done at that moment, which due() said."""
        self._free_at = at


@dataclass(slots=True, eq=False)
class Flight:
    """One request in flight. The driver owns it and its context, which is made with the request's `traits`."""

    request: BenchRequest
    submitted_at: float
    traits: InitVar[dict[str, Any] | None] = None
    replica: int = -1  # until one was chosen
    context: TextContext = field(init=False)
    length: int = field(init=False)
    left: int = field(init=False)  # tokens still to be generated
    next_token: int = field(init=False)
    prefill: int = 0  # tokens of the context that are still to be computed before it decodes
    take: int = 0  # tokens that this tick's forward computes
    admission: int = 0  # running number of its last admission
    counted: bool = False  # whether its first admission was counted
    entered_at: float = 0.0  # its last admission
    again: bool = False  # whether that was not its first one
    late: bool = False  # whether it has to look once more for what was cached while it waited to be prefilled
    counted_at: int = 0  # which of the first admissions that was
    reused: int = 0  # tokens that its first admission counted as cached, until its first forward
    entering: bool = False  # whether its next forward is the first since its admission
    retries: int = 0  # replicas that were lost with it
    refusals: int = 0  # admissions refused in a row while its replica was idle
    first_token_at: float | None = None
    last_token_at: float = 0.0
    last_tick: int = -1

    def __post_init__(self, traits: dict[str, Any] | None) -> None:
        request = self.request
        self.context = TextContext(
            request.request_id,
            request.prompt(),
            request.prompt_length + request.output_length,
            session_id=request.session_id,
            **traits or {},
        )
        self.length, self.left, self.next_token = request.prompt_length, request.output_length, request.output_first

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.request.request_id

    @property
    def checked_whole(self) -> bool:
        """Whether its next forward must check all its slots: its first one reuses a prefix, its last one ends it."""
        return self.entering or (self.left == 1 and self.prefill in (0, self.take))


@dataclass(slots=True, eq=False)
class Lane:
    """What the driver keeps for one replica."""

    replica: int
    free_pages: int = 0  # as of the last reply, at least: admissions since then count without reuse
    pace: Prefill | None = None  # None: prefill takes no time of its own
    due: float = math.inf  # when the prefill that is under way will be done
    blocked: bool = False  # an admission was refused and no page was given back since
    waiting: deque[Flight] = field(default_factory=deque)
    running: list[Flight] = field(default_factory=list)  # in order of admission
    executed: list[Flight] = field(default_factory=list)  # in the last forward, to be stepped
    finished: list[Flight] = field(default_factory=list)  # to be released
    preempted: list[Flight] = field(default_factory=list)  # to be released, then queued again
    growing: list[Flight] = field(default_factory=list)  # decoding, and the next token needs a page

    @property
    def prefill(self) -> int:
        """Tokens that running requests still have to compute before they decode."""
        return sum(flight.prefill for flight in self.running)

    def next_batch(self, rows: int, token_budget: int | None, now: float = math.inf) -> list[Flight]:
        """At most `rows` running requests for the next forward, with `take` set and windows chunked to it.

        Every decoding request gets its token; prefill, oldest first, shares what is left of `token_budget` (None: no
        bound), at least one token. Where it takes time, only what is done by `now` is in the batch, and `due` says
        when the next will be.
        """
        self.due = math.inf
        filled = False
        chosen = self.running[:rows]
        left: float = float("inf")
        if token_budget is not None:
            left = max(1, token_budget - sum(flight.prefill == 0 for flight in chosen))
        batch = []
        for flight in chosen:
            if not flight.prefill:
                flight.take = 1
            elif left:
                flight.take = int(min(flight.prefill, left))
                if self.pace is not None:
                    if flight.late:  # those before it are cached when they were stepped: in the next tick
                        if not filled:
                            flight.late = False
                            self.growing.append(flight)
                        self.due, left = now, 0
                        continue
                    due = self.pace.due(flight.take, flight.entered_at)
                    if due > now:
                        self.due, left = due, 0
                        continue
                    self.pace.done(due)
                    filled = True
                left -= flight.take
                if flight.take < flight.prefill:
                    flight.context.tokens.chunk(flight.take)
            else:
                continue
            batch.append(flight)
        return batch

    def tick(self, batch: list[Flight], execute: bool = True) -> Tick:
        """What is left of the iterations before, and the next forward."""
        return Tick(
            step=[flight.context for flight in self.executed],
            release=[flight.request_id for flight in (*self.finished, *self.preempted)],
            alloc=[flight.context for flight in self.growing],
            execute=[flight.context for flight in batch] if execute else (),
        )

    def advance(self, flight: Flight, page_size: int) -> bool:
        """Move a request past what its forward did; whether it got a token. Its last token finishes it."""
        tokens = flight.context.tokens
        chunked = flight.prefill and tokens.end < tokens.length
        flight.context.update(flight.next_token)
        if flight.prefill:
            flight.prefill = tokens.active_length if chunked else 0  # also after a window moved back
            if flight.prefill:
                return False
        flight.next_token -= 1
        flight.length += 1
        flight.left -= 1
        if not flight.left:
            self.finished.append(flight)
        elif (flight.length - 1) % page_size == 0:
            self.growing.append(flight)
        return True

    def requeue(self, flights: Iterable[Flight]) -> None:
        """Put flights at the front of the queue, the first of them first."""
        self.waiting.extendleft(reversed(list(flights)))
