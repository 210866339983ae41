"""Envelopes around commands and answers, and their codec."""

from __future__ import annotations

from typing import Any

import msgspec

from rayk.errors import MessageError, UnsendableError
from rayk.protocol.base import Done, Failure, Message
from rayk.protocol.from_replica import (
    NOT_ASKED,
    AdmitDone,
    BlocksDone,
    CacheDelta,
    ContextsDone,
    Exported,
    Found,
    Fraction,
    InputsDone,
    KeepDone,
    MetricsDone,
    Missing,
    MovedBack,
    PrefixesDone,
    ResetDone,
    TickDone,
    TiersDone,
    UsageDone,
    Value,
)
from rayk.protocol.from_scheduler import (
    Claimed,
    Counts,
    Description,
    Drained,
    Enlisted,
    EnterDone,
    Explained,
    Located,
    PlaceDone,
    Released,
    RemoveDone,
    Unasked,
)
from rayk.protocol.to_replica import (
    Blocks,
    CheckIntegrity,
    GetCacheDelta,
    GetContexts,
    GetMetrics,
    GetPrefixes,
    GetTiers,
    GetUsage,
    Inputs,
    Lookup,
    ReadPages,
    ReplicaCommand,
    UsedFraction,
)
from rayk.protocol.to_scheduler import GetRoster, Locate, SchedulerCommand

READ_ONLY = (
    Lookup,
    GetPrefixes,
    Inputs,
    Blocks,
    GetUsage,
    GetCacheDelta,
    UsedFraction,
    GetMetrics,
    ReadPages,
    CheckIntegrity,
    GetTiers,
    GetContexts,
    GetRoster,
    Locate,
)


Result = (
    Done
    | Failure
    | AdmitDone
    | PlaceDone
    | EnterDone
    | Found
    | Exported
    | PrefixesDone
    | KeepDone
    | MovedBack
    | TickDone
    | InputsDone
    | Value
    | BlocksDone
    | Claimed
    | Released
    | UsageDone
    | Fraction
    | MetricsDone
    | ResetDone
    | TiersDone
    | Counts
    | Description
    | Explained
    | Enlisted
    | Located
    | ContextsDone
    | Missing
    | Unasked
    | Drained
    | RemoveDone
)


class ReplicaEnvelope(Message, frozen=True):
    """`known`: the sender wants to hear what the replica's cache changed after that batch; see
    rayk.replica.cache_events. `pages`: it wants to hear how many are in use."""

    client: str
    epoch: int
    seq: int
    command: ReplicaCommand
    known: int = NOT_ASKED
    pages: bool = False


class SchedulerEnvelope(Message, frozen=True):
    client: str
    epoch: int
    seq: int
    command: SchedulerCommand


class Reply(Message, frozen=True):
    """A replica numbers what it changed so far, and has so many tokens to prefill; `news` is what was asked for, and
    so are the pages in use, after a number that grows with every answer, also of those that take its place.

    A scheduler says in `roster` which version of its roster is the latest.
    """

    epoch: int
    seq: int
    result: Result
    seen: int = 0
    unfilled: int = 0
    news: CacheDelta | None = None
    pages: tuple[int, int] | None = None
    roster: int = 0


Envelope = ReplicaEnvelope | SchedulerEnvelope


_encoder = msgspec.msgpack.Encoder()


_envelopes = msgspec.msgpack.Decoder(Envelope)


_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Envelope | Reply) -> bytes:
    """One message as msgpack. UnsendableError for a value that none can carry, such as a field of a context that was
    set to one after the context was made."""
    try:
        return _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        what = message.command if isinstance(message, Envelope) else message.result
        raise UnsendableError(f"{type(what).__name__} holds what no message can carry: {error}") from None


def decode_envelope(wire: bytes) -> Envelope:
    """MessageError says what is malformed or unknown."""
    envelope: Envelope = _decode(_envelopes, wire, "command")
    return envelope


def decode_reply(wire: bytes) -> Reply:
    """MessageError says what is malformed or unknown."""
    reply: Reply = _decode(_replies, wire, "reply")
    return reply


def _decode(decoder: Any, wire: bytes, what: str) -> Any:
    try:
        return decoder.decode(wire)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(
            f"{len(wire)} bytes are no {what} of this version of rayk: {error}; use the same version everywhere"
        ) from error
