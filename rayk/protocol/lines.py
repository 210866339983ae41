"""What goes over a driver's line to an engine, or to a Cluster's scheduler: posts one way, the parts of a stream the
other; and what a line is. What posts and parts say is in rayk.protocol.engine and rayk.protocol.serving.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rayk.protocol.base import Failure, Message, MessagePart


class Post(Message, frozen=True, gc=False):
    """The `number`th of that sender's, from 1 on; `driver`: see rayk.protocol.serving."""

    sender: str
    number: int
    driver: int
    body: bytes


class Read(Message, frozen=True, gc=False):
    """The `number`th part, from 1 on, of what there is for that driver; the stream of that `name` begins with the
    first. Parts up to number `heard` are not asked for again."""

    name: str
    driver: int
    number: int
    heard: int


class Part(MessagePart, frozen=True, omit_defaults=True):
    """The answer to a Read; with `over`, or a `failure`, there is none and no later one."""

    body: bytes = b""
    over: bool = False
    failure: Failure | None = None


class PathState(NamedTuple):
    """What carries messages to one replica, of a Cluster also its reports.

    `kind`: "unix" or "tcp" (a socket), "calls" (Ray's, for `reason`), or "direct" (within this process). `messages`
    went by sockets so far.
    """

    replica: int
    kind: str
    reason: str = ""
    messages: int = 0


_encoder = msgspec.msgpack.Encoder()
_messages: msgspec.msgpack.Decoder[Post | Read] = msgspec.msgpack.Decoder(Post | Read)
_parts = msgspec.msgpack.Decoder(Part)


def encode_line(message: Post | Read | Part) -> bytes:
    """As msgpack."""
    return _encoder.encode(message)


def decode_line(wire: bytes) -> Post | Read:
    """msgspec.ValidationError for what is neither."""
    return _messages.decode(wire)


def decode_part(wire: bytes) -> Part:
    """msgspec.ValidationError for what is none."""
    return _parts.decode(wire)
