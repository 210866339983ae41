"""What all messages are: tagged Structs as arrays, their parts, and the two answers that any command may get."""

from __future__ import annotations

from typing import Any

import msgspec

from rayk import errors
from rayk.errors import MessageError, RaykError


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class MessagePart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Done(Message, frozen=True):
    pass


class Failure(Message, frozen=True):
    """An error by name and fields; see failure() and to_error()."""

    kind: str
    fields: list[Any]


def failure(error: RaykError) -> Failure:
    """The error as a message; its arguments are its fields."""
    return Failure(type(error).__name__, list(error.args))


def to_error(message: Failure) -> RaykError:
    """The error that failure() was made from; an unknown kind becomes a MessageError that quotes it."""
    cls = errors.by_name(message.kind)
    if cls is None or len(cls.fields) != len(message.fields):
        return MessageError(f"a replica reported an unknown error {message.kind} {message.fields}")
    return cls(*message.fields)
