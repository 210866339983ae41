"""Hypothesis strategies for any message, made from the types that msgspec sees."""

from __future__ import annotations

from collections.abc import Mapping
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


Leaves = Mapping[type[shape.Type], st.SearchStrategy[Any]]
LEAVES: Leaves = {
    shape.IntType: INT64,
    shape.FloatType: st.floats(allow_nan=False),
    shape.StrType: st.text(max_size=12),
    shape.BytesType: st.binary(max_size=24),
    shape.BoolType: st.booleans(),
    shape.NoneType: st.none(),
    shape.AnyType: ANY,
}


def of_type(kind: shape.Type, leaves: Leaves = LEAVES) -> st.SearchStrategy[Any]:
    """Any value of that type; `leaves`: of the types that hold no others."""
    match kind:
        case shape.ListType(item):
            return st.lists(of_type(item, leaves), max_size=3)
        case shape.TupleType(items):
            return st.tuples(*(of_type(item, leaves) for item in items))
        case shape.DictType(key, value):
            return st.dictionaries(of_type(key, leaves), of_type(value, leaves), max_size=3)
        case shape.UnionType(types):
            return st.one_of(*(of_type(each, leaves) for each in types))
        case shape.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: of_type(field.type, leaves) for field in fields})
    return leaves[type(kind)]


def messages(cls: type[msgspec.Struct], leaves: Leaves = LEAVES) -> st.SearchStrategy[Any]:
    """Any message of that class."""
    return of_type(shape.type_info(cls), leaves)


def enveloped(message: Any, client: str = "driver", epoch: int = 1, seq: int = 1) -> Any:
    """The envelope or reply that such a message travels in."""
    if isinstance(message, m.ReplicaCommand):
        return m.ReplicaEnvelope(client, epoch, seq, message)
    if isinstance(message, m.SchedulerCommand):
        return m.SchedulerEnvelope(client, epoch, seq, message)
    return m.Reply(epoch, seq, message)
