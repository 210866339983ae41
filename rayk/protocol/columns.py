"""Batches of contexts, and what became of them, as columns: one array a field instead of one object a request.

A batch of 256 requests passes through three processes. As columns it is copied there as bytes, and only the
driver and the replica, who have to, look at single requests. Within one process contexts are handed on as they are, so
that nothing is packed, copied or hashed again. rows_of() reads either form: scripts and replicas do not know which one
they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rayk.context import TextContext
from rayk.errors import MessageError
from rayk.kvcache.tick import Admission
from rayk.protocol.base import Failure, to_error
from rayk.protocol.contexts import Contexts, ContextView, Origin, Traits
from rayk.protocol.from_replica import AdmitDone

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

FIELDS = 7  # of Contexts.numbers
BASE, SENT, PROCESSED, END, MAX_LENGTH, PENDING, CACHED = range(FIELDS)
RESULTS = 7  # of AdmitDone.numbers
TOKEN_BYTES = 4
PLAIN = Traits()


def matrix(raw: bytes, rows: int, columns: int) -> Int64:
    """Read-only int64 [rows, columns]; MessageError when the bytes are not that."""
    if len(raw) != 8 * rows * columns:
        raise MessageError(f"{len(raw)} bytes are not the {columns} numbers each of {rows} request(s)")
    return np.frombuffer(raw, np.int64).reshape(rows, columns)


class PackedContexts:
    """Received Contexts: readable by row, and divisible by replica without looking at tokens."""

    def __init__(self, contexts: Contexts) -> None:
        self.contexts = contexts
        self.ids = contexts.ids
        self.numbers = matrix(contexts.numbers, len(contexts.ids), FIELDS)
        self.stops: list[int] = (np.cumsum(self.numbers[:, SENT]) * TOKEN_BYTES).tolist()
        if (self.stops[-1] if self.stops else 0) != len(contexts.tokens) or (self.numbers[:, SENT] < 0).any():
            raise MessageError(
                f"{len(contexts.tokens)} bytes of tokens are not those of {len(contexts.ids)} request(s)"
            )
        self._traits = contexts.traits

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each context, those included that were sent before."""
        lengths: list[int] = (self.numbers[:, BASE] + self.numbers[:, SENT]).tolist()
        return lengths

    def traits(self, row: int) -> Traits:
        """The rarer fields of a context."""
        return self._traits.get(row, PLAIN) if self._traits else PLAIN

    @cached_property
    def rows(self) -> list[list[int]]:
        """`numbers` as Python ints."""
        rows: list[list[int]] = self.numbers.tolist()
        return rows

    @cached_property
    def int32(self) -> list[npt.NDArray[np.int32]]:
        """The sent tokens of each context; read-only, and valid as long as the message is."""
        whole, start, parts = np.frombuffer(self.contexts.tokens, np.int32), 0, []
        for row in self.rows:
            parts.append(whole[start : start + row[SENT]])
            start += row[SENT]
        return parts

    def tokens(self, row: int) -> bytes:
        """The sent tokens of a context, raw int32."""
        return self.contexts.tokens[self.stops[row - 1] if row else 0 : self.stops[row]]

    def view(self, row: int) -> ContextView:
        """One context as a message of its own."""
        base, _, processed, end, max_length, pending, cached = self.rows[row]
        t = self.traits(row)
        origin = Origin(max_length, t.cache_salt, t.adapter, t.session_id, t.tenant) if not base else None
        return ContextView(
            self.ids[row], base, self.tokens(row), processed, end, pending, None if cached < 0 else cached,
            t.to_verify, t.accepted, origin,
        )  # fmt: skip

    def part(self, rows: Sequence[int]) -> Contexts:
        """The contexts of those rows, in that order."""
        if len(rows) == len(self.ids):
            return self.contexts
        whole, stops, traits = memoryview(self.contexts.tokens), self.stops, self.contexts.traits
        return Contexts(
            [self.ids[i] for i in rows],
            self.numbers[rows].tobytes(),
            b"".join([whole[stops[i - 1] if i else 0 : stops[i]] for i in rows]),
            {at: traits[i] for at, i in enumerate(rows) if i in traits} if traits else {},
        )


class LocalContexts(Contexts, frozen=True):
    """Contexts of this process. It is never encoded: of the columns there are only the ids."""

    held: Sequence[TextContext] = ()


class LocalView(ContextView, frozen=True):
    """One of them."""

    held: TextContext = None  # type: ignore[assignment]  # always given; what is before it has defaults


def local_contexts(ctxs: Sequence[TextContext]) -> LocalContexts:
    """Those contexts as part of a command."""
    return LocalContexts([ctx.request_id for ctx in ctxs], b"", b"", {}, ctxs)


class LocalRows:
    """LocalContexts as PackedContexts are read."""

    def __init__(self, contexts: LocalContexts) -> None:
        self.contexts = contexts
        self.ids = contexts.ids
        self.held = contexts.held

    @property
    def lengths(self) -> list[int]:
        """Tokens of each context."""
        return [ctx.tokens.length for ctx in self.held]

    @cached_property
    def rows(self) -> list[list[int]]:
        """Their numbers; none of their tokens was sent before."""
        return [
            [0, ctx.tokens.length, ctx.tokens.processed, ctx.tokens.end, ctx.max_length, ctx.pending_future_count, -1]
            for ctx in self.held
        ]

    def traits(self, row: int) -> Traits:
        """The rarer fields of a context."""
        ctx = self.held[row]
        return Traits(*ctx.root_key, ctx.session_id, ctx.tenant, ctx.priority, ctx.deadline)

    def tokens(self, row: int) -> bytes:
        """The tokens of a context, raw int32."""
        window = self.held[row].tokens
        return window.data[: window.length].tobytes()

    def view(self, row: int) -> ContextView:
        """One context as a message of its own."""
        ctx = self.held[row]
        return LocalView(ctx.request_id, 0, b"", ctx.tokens.processed, ctx.tokens.end, held=ctx)

    def part(self, rows: Sequence[int]) -> Contexts:
        """The contexts of those rows, in that order."""
        if len(rows) == len(self.ids):
            return self.contexts
        return local_contexts([self.held[i] for i in rows])


ContextRows = PackedContexts | LocalRows


def rows_of(contexts: Contexts) -> ContextRows:
    """Contexts of a command, readable by row."""
    return LocalRows(contexts) if isinstance(contexts, LocalContexts) else PackedContexts(contexts)


def joined(parts: Sequence[Contexts]) -> Contexts:
    """The contexts of all parts, in that order; parts of one form."""
    local = [part.held for part in parts if isinstance(part, LocalContexts)]
    if local:
        return local_contexts([ctx for held in local for ctx in held])
    ids: list[str] = []
    traits: dict[int, Traits] = {}
    for part in parts:
        traits.update((len(ids) + row, found) for row, found in part.traits.items())
        ids += part.ids
    return Contexts(ids, b"".join([p.numbers for p in parts]), b"".join([p.tokens for p in parts]), traits)


class AdmitResult(NamedTuple):
    """One row of Outcomes. `processed` is -1 for a context that was refused or not tried."""

    processed: int
    end: int
    cached_prefix: int | None
    device_tokens: int
    peer_tokens: int
    host_tokens: int = 0
    disk_tokens: int = 0


class AdmitResults:
    """What became of each context of a batch; nothing yet when made."""

    def __init__(self, rows: int) -> None:
        self.numbers: Int64 = np.full((rows, RESULTS), -1, np.int64)
        self.seconds: Float64 = np.zeros((rows, 2))
        self.failures: dict[int, Failure] = {}

    @classmethod
    def received(cls, numbers: bytes, seconds: bytes, failures: dict[int, Failure], rows: int) -> AdmitResults:
        """Those of an AdmitDone or a PlaceDone; read-only."""
        outcomes = cls.__new__(cls)
        outcomes.numbers = matrix(numbers, rows, RESULTS)
        outcomes.seconds = np.frombuffer(seconds, np.float64).reshape(rows, 2)
        outcomes.failures = failures
        return outcomes

    def put(self, rows: Sequence[int], done: AdmitDone) -> None:
        """A replica's answer about the contexts of those rows."""
        self.numbers[rows] = matrix(done.numbers, len(rows), RESULTS)
        self.seconds[rows] = np.frombuffer(done.seconds, np.float64).reshape(len(rows), 2)
        for at, failure in done.failures.items():
            self.failures[rows[at]] = failure

    @property
    def columns(self) -> tuple[bytes, bytes, dict[int, Failure]]:
        """As a message has them."""
        return self.numbers.tobytes(), self.seconds.tobytes(), self.failures

    @cached_property
    def rows(self) -> list[list[int]]:
        """`numbers` as Python ints, once they are all there."""
        rows: list[list[int]] = self.numbers.tolist()
        return rows

    @property
    def refused(self) -> list[int]:
        """Rows that were refused or not tried."""
        rows: list[int] = np.flatnonzero(self.numbers[:, 0] < 0).tolist()
        return rows

    def admissions(self, replicas: Sequence[int]) -> list[Admission]:
        """For the driver: what became of each, on those replicas. Requests that were not tried failed for the reason of
        the first that was refused."""
        failures = self.failures
        columns = (*self.numbers[:, 3:].T.tolist(), *self.seconds.T.tolist())
        found = list(map(Admission._make, zip(replicas, [None] * len(replicas), *columns, strict=True)))
        for row in self.refused:
            error = to_error(failures[row if row in failures else min(failures)])
            found[row] = Admission(replicas[row], error)
        return found

    def __getitem__(self, row: int) -> AdmitResult:
        processed, end, cached, *reused = self.numbers[row].tolist()
        return AdmitResult(processed, end, None if cached < 0 else cached, *reused)
