"""What a caller may name a request and say about it: text, integers and seconds that every message can carry.

They are checked once, where a request is made. A message holds many requests, and one value that cannot be encoded
would fail all of them. What comes back has the plain type: msgspec encodes no subclasses of str and int (numpy's).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from operator import index
from typing import Any

from rayk.errors import ConfigError, RaykError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
LONGEST_NAME = 1 << 14  # characters of an id, a salt, an adapter, a session or a tenant
SHOWN = 10**30  # a larger integer is not written out

Refusal = Callable[[str], RaykError]  # makes the error of a refused value from its text


def checked_text(name: str, value: Any, error: Refusal = ConfigError) -> str:
    """`value` if it is a str that UTF-8 can carry; lone surrogates are none."""
    if not isinstance(value, str):
        raise error(f"{name} must be a str, got {shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as why:
            near = ascii(value[max(0, why.start - 8) : why.start + 8])
            raise error(f"{name} cannot be sent as UTF-8: {why.reason}, at position {why.start}, near {near}") from None
    return value if type(value) is str else str.__str__(value)


def checked_name(name: str, value: Any, error: Refusal = ConfigError) -> str:
    """The same, of at most LONGEST_NAME characters."""
    text = checked_text(name, value, error)
    if len(text) > LONGEST_NAME:
        raise error(f"{name} has {len(text)} characters, at most {LONGEST_NAME} may be; send a digest of it")
    return text


def checked_optional_name(name: str, value: Any, error: Refusal = ConfigError) -> str | None:
    """The same, or None."""
    if value is None or isinstance(value, str):
        return None if value is None else checked_name(name, value, error)
    raise error(f"{name} must be a str or None, got {shown(value)}")


def checked_request_id(request_id: Any, error: Refusal = ConfigError) -> str:
    """`request_id` if it is a str of 1 to LONGEST_NAME characters that UTF-8 can carry."""
    if type(request_id) is str and request_id.isascii() and 0 < len(request_id) <= LONGEST_NAME:
        return request_id
    text = checked_name("a request id", request_id, error)
    if not text:
        raise error("a request id must not be empty")
    return text


def checked_integer(
    name: str, value: Any, least: int = INT64_MIN, most: int = INT64_MAX, error: Refusal = ConfigError
) -> int:
    """`value` as an int of least .. most. Integers of other types (numpy's) are fine, bools and floats are not."""
    number: int = value
    if type(value) is not int:
        try:
            if isinstance(value, bool) or type(value).__name__ == "bool":  # numpy's, which is an index, too
                raise TypeError
            number = int.__index__(index(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):  # the latter of tensors
            raise error(f"{name} must be an integer, got {shown(value)}") from None
    if not least <= number <= most:
        raise error(f"{name} must be an integer of {least} to {most}, got {shown(number)}")
    return number


def checked_seconds(name: str, value: Any, error: Refusal = ConfigError) -> float:
    """`value` as a finite float."""
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):
            raise TypeError
        seconds = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise error(f"{name} must be a number of seconds, got {shown(value)}") from None
    except OverflowError:
        raise error(f"{name} must be a finite number of seconds, got {shown(value)}") from None
    if not isfinite(seconds):
        raise error(f"{name} must be a finite number of seconds, got {seconds}")
    return seconds


def has_utf8(text: str) -> bool:
    """Whether the text can be sent: lone surrogates cannot."""
    return printable(text) == text


def printable(text: str) -> str:
    """The same text, lone surrogates spelt out."""
    return text if text.isascii() else str.encode(text, "utf-8", "backslashreplace").decode()


def told(error: BaseException) -> str:
    """An error of somebody else's as a part of a message: its type and its text, cut. Never raises."""
    try:
        text = printable(str(error))
    except Exception:  # whatever its __str__ does
        text = ""
    return f"{type(error).__name__}: {text if len(text) <= 500 else text[:498] + '..'}"


def shown(value: Any) -> str:
    """A value for a message, however large it is and whatever its __repr__ does. Never raises."""
    if isinstance(value, int) and not -SHOWN < value < SHOWN:
        return f"one of {value.bit_length()} bits"
    try:
        text = ascii(value)
    except Exception:  # such as an integer of too many digits inside a list
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}.."
