"""Envelopes around commands and answers, and their codec."""

from __future__ import annotations

from typing import Any

import msgspec

from rayk.errors import MessageError, UnsendableError
from rayk.protocol import from_replica, from_scheduler, to_replica, to_scheduler
from rayk.protocol.base import Done, Failure, Message

READ_ONLY = (
    to_replica.Lookup,
    to_replica.GetPrefixes,
    to_replica.Inputs,
    to_replica.Blocks,
    to_replica.GetUsage,
    to_replica.GetCacheDelta,
    to_replica.UsedFraction,
    to_replica.GetMetrics,
    to_replica.ReadPages,
    to_replica.CheckIntegrity,
    to_replica.GetTiers,
    to_replica.GetContexts,
    to_scheduler.GetRoster,
    to_scheduler.Locate,
)


Result = (
    Done
    | Failure
    | from_replica.AdmitDone
    | from_scheduler.PlaceDone
    | from_scheduler.EnterDone
    | from_replica.Found
    | from_replica.Exported
    | from_replica.PrefixesDone
    | from_replica.KeepDone
    | from_replica.MovedBack
    | from_replica.TickDone
    | from_replica.InputsDone
    | from_replica.Value
    | from_replica.BlocksDone
    | from_scheduler.Claimed
    | from_scheduler.Released
    | from_replica.UsageDone
    | from_replica.Fraction
    | from_replica.MetricsDone
    | from_replica.ResetDone
    | from_replica.TiersDone
    | from_scheduler.Counts
    | from_scheduler.Description
    | from_scheduler.Explained
    | from_scheduler.Enlisted
    | from_scheduler.Located
    | from_replica.ContextsDone
    | from_replica.Missing
    | from_scheduler.Unasked
    | from_scheduler.Drained
    | from_scheduler.RemoveDone
)


class ReplicaEnvelope(Message, frozen=True):
    """`known`: the sender wants to hear what the replica's cache changed after that batch; see
    rayk.replica.cache_events. `pages`: it wants to hear how many are in use."""

    client: str
    epoch: int
    seq: int
    command: to_replica.ReplicaCommand
    known: int = from_replica.NOT_ASKED
    pages: bool = False


class SchedulerEnvelope(Message, frozen=True):
    client: str
    epoch: int
    seq: int
    command: to_scheduler.SchedulerCommand


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
    news: from_replica.CacheDelta | None = None
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
