"""Hypothesis strategies for any message, made from the types that msgspec sees."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as shape

from rayk import protocol as m

MESSAGES: list[type[msgspec.Struct]] = [*get_args(m.ReplicaCommand), *get_args(m.SchedulerCommand), *get_args(m.Result)]

INT64 = st.integers(-(2**63), 2**64 - 1)
ANY = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def of_type(kind: shape.Type) -> st.SearchStrategy[Any]:
    match kind:
        case shape.IntType():
            return INT64
        case shape.FloatType():
            return st.floats(allow_nan=False)
        case shape.StrType():
            return st.text(max_size=12)
        case shape.BytesType():
            return st.binary(max_size=24)
        case shape.BoolType():
            return st.booleans()
        case shape.NoneType():
            return st.none()
        case shape.AnyType():
            return ANY
        case shape.ListType(item):
            return st.lists(of_type(item), max_size=3)
        case shape.TupleType(items):
            return st.tuples(*map(of_type, items))
        case shape.DictType(key, value):
            return st.dictionaries(of_type(key), of_type(value), max_size=3)
        case shape.UnionType(types):
            return st.one_of(*map(of_type, types))
        case shape.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: of_type(field.type) for field in fields})
    raise AssertionError(f"no strategy for {kind}")


def messages(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any message of that class."""
    return of_type(shape.type_info(cls))


def enveloped(message: Any, client: str = "driver", epoch: int = 1, seq: int = 1) -> Any:
    """The envelope or reply that such a message travels in."""
    if isinstance(message, m.ReplicaCommand):
        return m.ReplicaEnvelope(client, epoch, seq, message)
    if isinstance(message, m.SchedulerCommand):
        return m.SchedulerEnvelope(client, epoch, seq, message)
    return m.Reply(epoch, seq, message)
