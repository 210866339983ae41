"""Sizes that a caller controls: each has a bound, and what is beyond it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rayk
from rayk.actors import frames
from rayk.errors import ConfigError, RaykError
from rayk.sampling import MAX_LOGPROBS, MAX_STOPS, MOST_BIASES, MOST_CHOICES
from rayk.structured import LONGEST, StructuredOutputs
from rayk.values import LONGEST_NAME, checked_request_id

LONG = "x" * (LONGEST_NAME + 1)
SETTINGS: dict[str, dict[str, Any]] = {
    "stop": {"stop": ("x",) * (MAX_STOPS + 1)},
    "stop, its length": {"stop": ("x" * 1025,)},
    "stop_token_ids": {"stop_token_ids": (1,) * (MAX_STOPS + 1)},
    "logit_bias": {"logit_bias": dict.fromkeys(range(MOST_BIASES + 1), 1.0)},
    "n": {"n": MOST_CHOICES + 1},
    "logprobs": {"logprobs": MAX_LOGPROBS + 1},
    "prompt_logprobs": {"prompt_logprobs": MAX_LOGPROBS + 1},
    "structured_outputs": {"structured_outputs": {"regex": "x" * (LONGEST + 1)}},
    "structured_outputs, choices": {"structured_outputs": {"choice": tuple(f"x{i}" for i in range(1025))}},
    "structured_outputs, all choices": {"structured_outputs": {"choice": ("x" * LONGEST, "y")}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    problem = rayk.SamplingParams(**SETTINGS[name]).problem()
    assert problem is not None and problem.startswith(name.partition(",")[0]) and len(problem) < 500


def test_as_much_as_may_be() -> None:
    assert rayk.SamplingParams(structured_outputs={"choice": ("x" * (LONGEST - 1), "y")}).problem() is None
    assert StructuredOutputs(regex="x" * LONGEST).problem() is None
    assert rayk.SamplingParams(stop=("x" * 1024,) * MAX_STOPS).problem() is None
    assert checked_request_id(LONG[1:]) == LONG[1:]


@pytest.mark.parametrize("name", ["cache_salt", "adapter", "session_id", "tenant"])
def test_names_of_contexts(name: str) -> None:
    with pytest.raises(RaykError, match=f"{name} has {len(LONG)} characters") as caught:
        rayk.TextContext("r", [1], 10, **{name: LONG})
    assert len(str(caught.value)) < 500
    rayk.TextContext("r", [1], 10, **{name: LONG[1:]})


def test_ids(make: Callable[..., Any]) -> None:
    cache = make()
    manager, fine = cache.manager, rayk.TextContext("r", [1], 10)
    for call in (
        lambda: rayk.TextContext(LONG, [1], 10),
        lambda: manager.claim(LONG, 0),
        lambda: manager.alloc_dummy(LONG, 0),
        lambda: manager.contains(LONG, 0),
        lambda: manager.get_req_blocks(LONG, 0),
    ):
        with pytest.raises(ConfigError, match="a request id has"):
            call()
    assert manager.admit([fine]) == [0]
    with pytest.raises(rayk.RaykError, match="at most 262144 may be"):
        manager.try_admit([fine] * (262_144 + 1))
    manager.release("r", 0)


def test_messages_on_a_socket() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return frames.LONGEST + 1

    with pytest.raises(frames.SocketError, match="longer than"):
        next(frames.pieces(1, Long()))
    reader = frames.FrameReader()
    reader._sizes[7], reader._parts[7] = frames.LONGEST, [b""]
    with pytest.raises(frames.SocketError, match="longer than a message can be"):
        reader._joined(7, b"x", True)
    reader = frames.FrameReader()
    for number in range(frames.UNFINISHED):
        reader._joined(number, b"x", True)
    with pytest.raises(frames.SocketError):
        reader._joined(frames.UNFINISHED, b"x", True)
