"""Every message survives encoding, and what is no message is refused with a reason."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import protocol as m
from rayk.errors import MessageError

from .strategies import MESSAGES, enveloped, messages

QUICK = settings(max_examples=12, derandomize=True)
SEED = {"data": st.data()}


def decode(wire: bytes, like: Any) -> Any:
    return (m.decode_reply if isinstance(like, m.Reply) else m.decode_envelope)(wire)


def place_of(message: Any) -> int:
    """Where an envelope or a reply has its message."""
    return type(message).__struct_fields__.index("result" if isinstance(message, m.Reply) else "command") + 1


def refusal(wire: bytes, like: Any) -> str:
    with pytest.raises(MessageError) as caught:
        decode(wire, like)
    assert "use the same version everywhere" in str(caught.value)
    return str(caught.value)


def example(cls: type[msgspec.Struct]) -> Any:
    """The simplest message of a class, in its envelope."""
    values: dict[str, Any] = {}
    view = m.ContextView("r", 0, b"", 0, 1)
    contexts = m.Contexts([], b"", b"")
    known = {
        "contexts": contexts,
        "command": m.GetMetrics(),
        "view": view,
        "metrics": m.KVCacheMetrics(),
        "shape": (1, 2, 3),
    }
    simple = {"int": 1, "str": "x", "bytes": b"x", "bool": True, "float": 1.0}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            kind = getattr(parameter.annotation, "__name__", str(parameter.annotation))
            values[name] = known.get(name, simple.get(kind, {} if kind.startswith("dict") else []))
    return enveloped(cls(**values))


def test_all_messages_are_tried() -> None:
    declared = {
        cls for cls in vars(m).values() if inspect.isclass(cls) and issubclass(cls, m.Message) and cls is not m.Message
    }
    assert declared == {*MESSAGES, m.ReplicaEnvelope, m.SchedulerEnvelope, m.Reply}
    assert len({cls.__name__ for cls in declared}) == len(declared), "a tag names one message"


@pytest.mark.parametrize("cls", MESSAGES)
@QUICK
@given(**SEED)
def test_round_trip(cls: type[msgspec.Struct], data: st.DataObject) -> None:
    numbers = st.integers(0, 2**63 - 1)
    message = enveloped(
        data.draw(messages(cls)), data.draw(st.text(max_size=9)), data.draw(numbers), data.draw(numbers)
    )
    wire = m.encode(message)
    assert isinstance(wire, bytes)
    again = decode(wire, message)
    assert again == message and type(again) is type(message)
    assert m.encode(again) == wire


@pytest.mark.parametrize("cls", MESSAGES)
def test_every_truncation_is_refused(cls: type[msgspec.Struct]) -> None:
    message = example(cls)
    wire = m.encode(message)
    for length in range(len(wire)):
        text = refusal(wire[:length], message)
        assert f"{length} bytes" in text
    refusal(wire + b"\x00", message)


@pytest.mark.parametrize("cls", MESSAGES)
def test_an_unknown_tag_is_named(cls: type[msgspec.Struct]) -> None:
    message = example(cls)
    parts = msgspec.msgpack.decode(m.encode(message))
    parts[place_of(message)][0] = "Teleport"
    assert "Invalid value 'Teleport'" in refusal(msgspec.msgpack.encode(parts), message)
    parts = msgspec.msgpack.decode(m.encode(message))
    parts[0] = "Postcard"
    assert "Invalid value 'Postcard'" in refusal(msgspec.msgpack.encode(parts), message)


@pytest.mark.parametrize("cls", MESSAGES)
def test_extra_and_missing_fields_are_refused(cls: type[msgspec.Struct]) -> None:
    message = example(cls)
    required = [p for p in inspect.signature(cls).parameters.values() if p.default is inspect.Parameter.empty]
    parts = msgspec.msgpack.decode(m.encode(message))
    parts[place_of(message)].append(None)
    assert "length" in refusal(msgspec.msgpack.encode(parts), message)
    if required:
        parts = msgspec.msgpack.decode(m.encode(message))
        del parts[place_of(message)][len(required) :]
        assert "length" in refusal(msgspec.msgpack.encode(parts), message)


class Odd(msgspec.Struct):
    """A value that no field takes."""

    odd: int = 0


@pytest.mark.parametrize("cls", [cls for cls in MESSAGES if cls.__struct_fields__])
def test_a_field_of_another_type_is_refused(cls: type[msgspec.Struct]) -> None:
    message = example(cls)
    for at, name in enumerate(cls.__struct_fields__, start=1):
        if (cls, name) == (m.Failure, "fields"):
            continue  # takes anything in a list
        parts = msgspec.msgpack.decode(m.encode(message))
        parts[place_of(message)][at] = {1: [{}]}
        assert f"$[{place_of(message)}][{at}]" in refusal(msgspec.msgpack.encode(parts), message), name


@settings(max_examples=200, derandomize=True)
@given(st.binary(max_size=40))
def test_random_bytes_are_refused(wire: bytes) -> None:
    for decoder in (m.decode_envelope, m.decode_reply):
        with pytest.raises(MessageError):
            decoder(wire)


@settings(max_examples=200, derandomize=True)
@given(cls=st.sampled_from(MESSAGES), at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_gives_a_valid_message(cls: type[msgspec.Struct], at: int, byte: int) -> None:
    message = example(cls)
    wire = bytearray(m.encode(message))
    wire[at % len(wire)] = byte
    try:
        again = decode(bytes(wire), message)
    except MessageError:
        return
    assert decode(m.encode(again), again) == again


def test_nesting_without_end_is_refused() -> None:
    """The fields of a Failure may be anything; an answer that nests them too deep must not break the reader."""
    head = m.encode(m.Reply(1, 1, m.Failure("ConfigError", [])))
    tail = b"\x90" + b"".join(map(msgspec.msgpack.encode, (0, 0, None, None, 0)))
    assert head.endswith(tail)
    refusal(head[: -len(tail)] + b"\x91" * 100_000 + tail, m.Reply(1, 1, m.Done()))


def test_a_reply_is_no_envelope_and_an_envelope_no_reply() -> None:
    refusal(m.encode(m.Reply(1, 1, m.Done())), m.ReplicaEnvelope("d", 1, 1, m.Claim("r")))
    refusal(m.encode(m.ReplicaEnvelope("d", 1, 1, m.Claim("r"))), m.Reply(1, 1, m.Done()))


def test_a_command_in_the_wrong_envelope_is_refused_by_name() -> None:
    wire = m.encode(m.ReplicaEnvelope("d", 1, 1, m.Describe()))  # type: ignore[arg-type]
    assert "Invalid value 'Describe'" in refusal(wire, m.ReplicaEnvelope("d", 1, 1, m.Claim("r")))


def test_messages_are_immutable_and_compact() -> None:
    claim = m.Claim("r")
    with pytest.raises(AttributeError):
        claim.request_id = "s"  # type: ignore[misc]
    tokens = bytes(4 * 1024)
    contexts = m.Contexts(["r"], bytes(56), tokens)
    wire = m.encode(m.ReplicaEnvelope("driver", 1, 1, m.Admit(contexts, True)))
    assert len(wire) < len(tokens) + 120
