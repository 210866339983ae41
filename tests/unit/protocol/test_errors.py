"""Errors cross processes with type, fields and text: as messages and by pickle."""

from __future__ import annotations

import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import errors
from rayk import protocol as m
from rayk.errors import InsufficientBlocksError, MessageError, RaykError

ROOT = Path(__file__).resolve().parents[3]
for path in (each for top in ("rayk", "actors", "scheduler") for each in (ROOT / top).rglob("*.py")):
    if re.search(r"^class \w+Error\(", path.read_text(), re.MULTILINE):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        importlib.import_module(name if name.startswith("rayk") else f"rayk.{name}")
KINDS: list[type[RaykError]] = sorted(errors._tree(RaykError).values(), key=lambda cls: cls.__name__)
"""All that there are, wherever they are."""
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(max_size=20),
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "list[str]": st.lists(st.text(max_size=5), max_size=8),
    "list[dict[str, int]]": st.lists(st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3), max_size=3),
    "dict[str, str]": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=8),
}


def fields_of(cls: type[RaykError]) -> st.SearchStrategy[list[Any]]:
    types = {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get("__annotations__", {}).items()}
    return st.tuples(*(VALUES[types[name]] for name in cls.fields)).map(list)


@pytest.mark.parametrize("cls", KINDS)
@settings(max_examples=10, derandomize=True)
@given(data=st.data())
def test_an_error_arrives_as_it_was(cls: type[RaykError], data: st.DataObject) -> None:
    error = cls(*data.draw(fields_of(cls)))
    reply = m.decode_reply(m.encode(m.Reply(1, 1, m.failure(error))))
    assert isinstance(reply.result, m.Failure) and reply.result.kind == cls.__name__
    for again in (m.to_error(reply.result), pickle.loads(pickle.dumps(error))):
        assert type(again) is cls
        assert again.args == error.args and str(again) == str(error)
        assert {n: getattr(again, n) for n in cls.fields} == {n: getattr(error, n) for n in cls.fields}


def test_names_are_unique() -> None:
    assert len({cls.__name__ for cls in KINDS}) == len(KINDS)
    assert all(errors.by_name(cls.__name__) is cls for cls in KINDS)
    assert errors.by_name("ValueError") is None


@pytest.mark.parametrize(
    "message",
    [
        m.Failure("OutOfCheeseError", ["r", 1]),
        m.Failure("ValueError", ["r"]),
        m.Failure("InsufficientBlocksError", ["r"]),
        m.Failure("InsufficientBlocksError", []),
        m.Failure("", []),
    ],
)
def test_an_unknown_failure_is_quoted(message: m.Failure) -> None:
    error = m.to_error(message)
    assert isinstance(error, MessageError)
    assert message.kind in str(error) and str(message.fields) in str(error)


def test_an_error_must_be_made_with_its_fields() -> None:
    with pytest.raises(TypeError, match="request_id, replica, needed, free, total"):
        InsufficientBlocksError("r", 0)
