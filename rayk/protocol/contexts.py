"""Contexts in messages: whole or as what changed, alone or as columns. Token arrays are raw little-endian int32
bytes."""

from __future__ import annotations

from rayk.protocol.base import MessagePart


class Origin(MessagePart, frozen=True):
    """What never changes about a context; sent with its first tokens."""

    max_length: int
    cache_salt: str | None = None
    adapter: str | None = None
    session_id: str | None = None
    tenant: str | None = None


class ContextView(MessagePart, frozen=True):
    """A driver's context as a replica needs it: tokens from position `base` on, the window, draft tokens."""

    request_id: str
    base: int
    tokens: bytes
    processed: int
    end: int
    pending: int = 0
    cached_prefix: int | None = None
    to_verify: bytes = b""
    accepted: bytes = b""
    origin: Origin | None = None  # present when base is 0
    generation: int = 0  # of the sender's claim


class Traits(MessagePart, frozen=True):
    """What few contexts of a batch have; all defaults for the others."""

    cache_salt: str | None = None
    adapter: str | None = None
    session_id: str | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    to_verify: bytes = b""
    accepted: bytes = b""


class Contexts(MessagePart, frozen=True):
    """Many contexts as columns, so that a batch costs little more than its bytes; see rayk.protocol.columns.

    `numbers` is int64 [n, 7]: base, tokens sent, processed, end, max_length, placeholders, cached prefix (-1: None).
    `tokens` are the sent tokens of all, one context after the other; `traits` by row, for those that have any.
    """

    ids: list[str]
    numbers: bytes
    tokens: bytes
    traits: dict[int, Traits] = {}


class Moved(MessagePart, frozen=True):
    """Where alloc() left a window."""

    processed: int
    end: int
    cached_prefix: int | None
