"""What no message can carry is refused where a request is made, and names the value; the rest comes back plain."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from rayk import TextContext
from rayk.errors import ConfigError, TokenError
from rayk.values import checked_integer, checked_optional_name, checked_request_id, checked_seconds, checked_text


class Text(str):
    """A str that msgspec does not encode."""

    def __str__(self) -> str:
        return "another"


class Number(int):
    """An int that msgspec does not encode."""


SURROGATES = ["\ud800", "a\udfffb", "x" * 100 + "\ud912", "\udc80" * 3]
NO_TEXT = [5, 5.0, b"abc", ["a"], ("a",), pytest.param(object(), id="object"), True, *SURROGATES]
NO_INTEGER = [None, "7", 1.0, 1.5, math.nan, math.inf, True, np.bool_(True), [1], 2**63, -(2**63) - 1, 2**70, 10**5000]
NO_SECONDS = ["7", b"7", True, math.nan, math.inf, -math.inf, 10**400, -(10**400), [1.0], object(), np.float32("nan")]


@pytest.mark.parametrize("value", NO_TEXT, ids=ascii)
def test_no_text_is_refused(value: Any) -> None:
    for checked in (checked_text, checked_optional_name):
        with pytest.raises(ConfigError, match="the name") as caught:
            checked("the name", value)
        str(caught.value).encode()
        assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match="a request id"):
        checked_request_id(value)


@pytest.mark.parametrize("value", NO_INTEGER, ids=lambda v: f"{v!r:.20}" if not isinstance(v, int) else "large")
def test_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="the number must be an integer"):
        checked_integer("the number", value)


@pytest.mark.parametrize("value", NO_SECONDS, ids=lambda v: f"{v!r:.20}" if not isinstance(v, int) else "large")
def test_no_seconds_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="the time must be a"):
        checked_seconds("the time", value)


def test_none_is_text_only_where_it_may_be_left_out_and_an_id_is_never_empty() -> None:
    assert checked_optional_name("salt", None) is None
    with pytest.raises(ConfigError, match="None"):
        checked_text("salt", None)
    for nothing in (None, "", Text("")):
        with pytest.raises(ConfigError, match="a request id"):
            checked_request_id(nothing)


@pytest.mark.parametrize(
    "value", ["a", "ä", "日本", "\U0001f600", "\x00", " ", Text("r1"), np.str_("r2"), "x" * 10_000]
)
def test_text_comes_back_as_a_plain_str_that_a_message_carries(value: str) -> None:
    for text in (checked_text("t", value), checked_optional_name("t", value), checked_request_id(value)):
        assert type(text) is str
        assert text == value
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(text)) == value


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63), Number(7), np.int32(7), np.uint64(9), torch.tensor(3)])
def test_integers_come_back_as_plain_ints_that_a_message_carries(value: Any) -> None:
    number = checked_integer("n", value)
    assert type(number) is int
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(number)) == int(value)


def test_bounds_are_named() -> None:
    with pytest.raises(ConfigError, match="max_new must be an integer of 1 to 9, got 10"):
        checked_integer("max_new", 10, 1, 9)


@pytest.mark.parametrize("value", [0, -1, 1.5, 10**300, np.float64(2), np.float32(2), np.int64(2)])
def test_seconds_come_back_as_a_plain_float(value: Any) -> None:
    assert type(checked_seconds("t", value)) is float
    assert checked_seconds("t", value) == float(value)


# -- where a request is made --------------------------------------------------------------------------


@pytest.mark.parametrize("request_id", [*NO_TEXT, None, ""], ids=ascii)
def test_a_context_needs_an_id(request_id: Any) -> None:
    with pytest.raises(ConfigError, match="a request id"):
        TextContext(request_id, [1], 9)


@pytest.mark.parametrize("name", ["cache_salt", "adapter", "session_id", "tenant"])
@pytest.mark.parametrize("value", NO_TEXT, ids=ascii)
def test_what_tells_requests_apart_is_text(name: str, value: Any) -> None:
    with pytest.raises(TokenError, match=f"'r'.*{name}"):
        TextContext("r", [1], 9, **{name: value})


@pytest.mark.parametrize("name", ["max_length", "priority", "pending_future_count"])
@pytest.mark.parametrize("value", NO_INTEGER, ids=lambda v: f"{v!r:.20}" if not isinstance(v, int) else "large")
def test_numbers_of_a_context_are_int64(name: str, value: Any) -> None:
    with pytest.raises(TokenError, match=f"'r'.*{name} must be an integer"):
        TextContext("r", [1], **{"max_length": 9, name: value})


@pytest.mark.parametrize("value", NO_SECONDS, ids=lambda v: f"{v!r:.20}" if not isinstance(v, int) else "large")
def test_a_deadline_is_finite(value: Any) -> None:
    with pytest.raises(TokenError, match=r"'r'.*deadline"):
        TextContext("r", [1], 9, deadline=value)


def test_fields_of_other_types_become_plain_ones() -> None:
    ctx = TextContext(
        np.str_("r"),
        [1],
        np.int64(9),
        np.str_("s"),
        tenant=Text("t"),
        priority=np.int8(-1),
        deadline=np.float32(1),
        pending_future_count=np.int64(1),
    )
    plain = (ctx.request_id, ctx.max_length, ctx.root_key[0], ctx.tenant, ctx.priority, ctx.deadline)
    assert [type(value) for value in plain] == [str, int, str, str, int, float]
    assert plain == ("r", 9, "s", "t", -1, 1.0)
    assert ctx.pending_future_count == 1
    assert not ctx.plain
