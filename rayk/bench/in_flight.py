"""Requests on their way, and the queue and batch of each replica.

waiting ──try_admit──> running (prefill ──> decode) ──> finished ──tick──> released
   ^                      │
   └──── preempted <──────┘   newest first, when an alloc is refused; its tokens are computed again later
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from rayk.bench.clocked import Prefill
from rayk.bench.request import BenchRequest
from rayk.context import TextContext


class Flight:
    """One request in flight. The driver owns it and its context."""

    __slots__ = (
        "admission",
        "again",
        "context",
        "counted",
        "counted_at",
        "entered_at",
        "entering",
        "first_token_at",
        "last_tick",
        "last_token_at",
        "late",
        "left",
        "length",
        "next_token",
        "prefill",
        "refusals",
        "replica",
        "request",
        "request_id",
        "reused",
        "submitted_at",
        "take",
    )

    def __init__(self, request: BenchRequest, submitted_at: float, replica: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.context = TextContext(
            request.request_id,
            request.prompt(),
            request.prompt_length + request.output_length,
            session_id=request.session_id,
        )
        self.submitted_at = submitted_at
        self.replica = replica  # -1 until a router has chosen
        self.length = request.prompt_length
        self.left = request.output_length  # tokens still to be generated
        self.next_token = request.output_first
        self.prefill = 0  # tokens of the context that are still to be computed before it decodes
        self.take = 0  # tokens that this tick's forward computes
        self.admission = 0  # running number of its last admission
        self.counted = False  # whether its first admission was counted
        self.entered_at = 0.0  # its last admission
        self.again = False  # whether that was not its first one
        self.late = False  # whether it has to look once more for what was cached while it waited to be prefilled
        self.counted_at = 0  # which of the first admissions that was
        self.reused = 0  # tokens that its first admission counted as cached, until its first forward
        self.entering = False  # whether its next forward is the first since its admission
        self.refusals = 0  # admissions refused in a row while its replica was idle
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.last_tick = -1

    @property
    def checked_whole(self) -> bool:
        """Whether its next forward must check all its slots: its first one reuses a prefix, its last one ends it."""
        return self.entering or (self.left == 1 and self.prefill in (0, self.take))


class Lane:
    """What the driver keeps for one replica."""

    __slots__ = (
        "blocked",
        "due",
        "executed",
        "finished",
        "free_pages",
        "growing",
        "pace",
        "preempted",
        "replica",
        "running",
        "waiting",
    )

    def __init__(self, replica: int, free_pages: int, pace: Prefill | None = None) -> None:
        self.replica = replica
        self.free_pages = free_pages  # as of the last reply, at least: admissions since then count without reuse
        self.waiting: deque[Flight] = deque()
        self.running: list[Flight] = []  # in order of admission
        self.executed: list[Flight] = []  # in the last forward, to be stepped
        self.finished: list[Flight] = []  # to be released
        self.preempted: list[Flight] = []  # to be released, then queued again
        self.growing: list[Flight] = []  # decoding, and the next token needs a page
        self.pace = pace  # None: prefill takes no time of its own
        self.due = math.inf  # when the prefill that is under way will be done
        self.blocked = False  # an admission was refused and no page was given back since

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

    def requeue(self, flights: Iterable[Flight]) -> None:
        """Put flights at the front of the queue, the first of them first."""
        self.waiting.extendleft(reversed(list(flights)))
