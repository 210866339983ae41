"""How the next token of a request is chosen: its settings, and the one random number of each position."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rayk.errors import ConfigError
from rayk.structured import GUIDED, StructuredOutputs
from rayk.values import INT64_MAX, checked_text, has_utf8, shown

MAX_LOGPROBS = 20
MAX_STOPS = 64
LONGEST_STOP = 1024  # characters
LAST_TOKEN = 2**31 - 1
COLD = 1e-6  # temperatures below it are 0: float32 could not tell
MOST_PENALTY = 1e4
MOST_CHOICES = 128
MOST_BIASES = 1024
BIAS = 100.0  # as far as a logit is moved

ALIASES = {"max_tokens": "max_new_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n"}
"""Other names of settings, by vLLM and transformers: both are understood where settings are given."""

Uint64 = npt.NDArray[np.uint64]


def by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of SamplingParams' fields. ConfigError for one that there is not, or that has two names."""
    found: dict[str, Any] = {}
    for given, value in settings.items():
        name = ALIASES.get(given, given)
        if given in GUIDED and value is not None:
            name, value = "structured_outputs", {GUIDED[given]: value}
        if name in found:
            raise ConfigError(f"{given!r} and {name!r} are one setting: give one of them")
        if name not in SamplingParams.__struct_fields__:
            known = ", ".join([*SamplingParams.__struct_fields__, *ALIASES])
            raise ConfigError(f"{given!r} is not a sampling setting; there are {known}")
        if name == "structured_outputs":
            value = StructuredOutputs.of(value)
        found[name] = (value,) if name == "stop" and isinstance(value, str) else value
    return found


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_TRANSLATED = ALIASES.keys() | GUIDED.keys() | {"structured_outputs"}


class _Named(msgspec.StructMeta):
    """Understands ALIASES where settings are made."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        if not _TRANSLATED.isdisjoint(settings):
            settings = by_name(settings)
        return super().__call__(*args, **settings)


class SamplingParams(msgspec.Struct, metaclass=_Named, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of one request. Checked by the engine, request by request: see problem().

    max_new_tokens: also max_tokens. min_tokens (also min_new_tokens): before so many nothing ends the answer.
    temperature: 0 takes the most likely token. top_k: 0 is off; top_p: 1 is off; min_p: 0 is off.
    repetition_penalty: divides the logits of tokens that occurred, the prompt's included; 1 is off.
    presence_penalty, frequency_penalty: taken from the logits of tokens that the answer has, once or as often as it
    has them; 0 is off. logit_bias: added to the logits of these tokens.
    seed: equal seeds give equal tokens for equal logits, whatever else is in the batch; None draws one.
    stop: strings that end the text, left out of it. stop_token_ids: tokens that end it, kept, as the model's own
    end-of-sequence tokens are (ignore_eos: those do not end it).
    logprobs: None, or report the natural logarithm of each chosen token's probability before any of the settings
    above, and of so many of the most likely ones. prompt_logprobs: the same for the prompt's tokens, all of which are
    computed then.
    structured_outputs: what shape the answer must have, as a mapping with one of json (a schema), json_object, regex,
    choice and grammar (also guided_json, ..): min_tokens then holds for nothing.
    n: so many answers (also num_return_sequences), each a request of its own; the i-th has the seed plus i.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by what a request has generated, or has been given."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.structured_outputs is not None
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < COLD

    @property
    def shape(self) -> tuple[float, int, float, float]:
        """What shapes the distribution, without what depends on the request's own tokens."""
        return (self.temperature, self.top_k, self.top_p, self.min_p)

    def problem(self) -> str | None:
        """Why a request with these settings cannot be served, or None."""
        if self.structured_outputs is not None and (said := self.structured_outputs.problem()) is not None:
            return f"structured_outputs are none: {said}"
        for (name, good, rule), usual in zip(_RULES, _DEFAULTS, strict=True):
            value = getattr(self, name)
            if value is not usual and not good(value):
                return f"{name} is {shown(value)}, it must be {rule}"
        if self.min_tokens > self.max_new_tokens:
            return f"min_tokens is {shown(self.min_tokens)}, it must be an integer of 0 .. max_new_tokens"
        return None

    def plain(self) -> SamplingParams:
        """The same in Python's own types, so that it can be sent (numpy's numbers cannot). Has no problem()."""
        empty = not (self.stop or self.stop_token_ids or self.logit_bias)
        if empty and all(type(getattr(self, name)) in kinds for name, kinds in _PLAIN):
            return self
        whole = {name: int(getattr(self, name)) for name in ("max_new_tokens", "top_k", "n", "min_tokens")}
        maybe = {
            name: None if getattr(self, name) is None else int(getattr(self, name))
            for name in ("seed", "logprobs", "prompt_logprobs")
        }
        real = {name: float(getattr(self, name)) for name in _NUMBERS}
        biases = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        stops = tuple(int(token) for token in self.stop_token_ids)
        more: dict[str, Any] = {**whole, **maybe, **real}
        texts = tuple(checked_text("stop", each) for each in self.stop)
        return SamplingParams(
            stop=texts,
            stop_token_ids=stops,
            ignore_eos=bool(self.ignore_eos),
            logit_bias=biases,
            structured_outputs=self.structured_outputs,
            **more,
        )

    def choice(self, index: int) -> SamplingParams:
        """The settings of one of the n answers."""
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + index) % 2**64
        return msgspec.structs.replace(self, n=1, seed=seed)


def _int(value: Any, low: int, high: int = INT64_MAX) -> bool:
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        return False
    return low <= int(value) <= high


def _number(value: Any, low: float, high: float) -> bool:
    if type(value) is not float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        try:
            value = float(value)
        except OverflowError:  # an integer beyond all floats
            return False
    return math.isfinite(value) and low <= value <= high


def _strings(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_STOPS:
        return False
    return all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP and has_utf8(each) for each in value)


def _token_ids(value: Any) -> bool:
    listed = isinstance(value, (tuple, list)) and len(value) <= MAX_STOPS
    return listed and all(_int(token, 0, LAST_TOKEN) for token in value)


def _biases(value: Any) -> bool:
    if not isinstance(value, Mapping) or len(value) > MOST_BIASES:
        return False
    return all(_int(token, 0, LAST_TOKEN) and _number(bias, -BIAS, BIAS) for token, bias in value.items())


def _some_logprobs(value: Any) -> bool:
    return value is None or _int(value, 0, MAX_LOGPROBS)


def _penalty(value: Any) -> bool:
    return _number(value, -2, 2)


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", lambda value: _int(value, 1), "an integer of 1 .. 2**63 - 1"),
    ("temperature", lambda value: _number(value, 0, math.inf), "a finite number of at least 0"),
    ("top_k", lambda value: _int(value, 0), "an integer of 0 (off) .. 2**63 - 1"),
    ("top_p", lambda value: _number(value, 0, 1) and value > 0, "above 0 and at most 1 (1: off)"),
    ("min_p", lambda value: _number(value, 0, 1), "between 0 (off) and 1"),
    (
        "repetition_penalty",
        lambda value: _number(value, 1 / MOST_PENALTY, MOST_PENALTY),
        f"between {1 / MOST_PENALTY:g} and {MOST_PENALTY:g} (1: off)",
    ),
    ("seed", lambda value: value is None or _int(value, 0, 2**64 - 1), "an integer of 0 .. 2**64 - 1"),
    ("stop", _strings, f"at most {MAX_STOPS} strings of 1 .. {LONGEST_STOP} characters that UTF-8 can carry"),
    ("stop_token_ids", _token_ids, f"at most {MAX_STOPS} token ids"),
    ("ignore_eos", lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    ("logprobs", _some_logprobs, f"None or an integer of 0 .. {MAX_LOGPROBS}"),
    ("n", lambda value: _int(value, 1, MOST_CHOICES), f"an integer of 1 .. {MOST_CHOICES}"),
    ("min_tokens", lambda value: _int(value, 0), "an integer of 0 .. max_new_tokens"),
    ("presence_penalty", _penalty, "between -2 and 2 (0: off)"),
    ("frequency_penalty", _penalty, "between -2 and 2 (0: off)"),
    (
        "logit_bias",
        _biases,
        f"at most {MOST_BIASES} token ids, each with a number of {-BIAS:g} .. {BIAS:g}",
    ),
    ("prompt_logprobs", _some_logprobs, f"None or an integer of 0 .. {MAX_LOGPROBS}"),
)
"""Settings by name: whether a value is one, and what it must be."""
_DEFAULTS = [getattr(SamplingParams(), name) for name, _, _ in _RULES]

_PLAIN: tuple[tuple[str, tuple[type, ...]], ...] = (
    *((name, (int,)) for name in ("max_new_tokens", "top_k", "n", "min_tokens")),
    *((name, (int, type(None))) for name in ("seed", "logprobs", "prompt_logprobs")),
    *((name, (float,)) for name in _NUMBERS),
    *((name, (tuple,)) for name in ("stop", "stop_token_ids")),
    ("ignore_eos", (bool,)),
    ("logit_bias", (dict,)),
)
"""Types of settings that can be sent as they are."""


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Uint64) -> Uint64:
    """The finalizer of splitmix64 (Steele, Lea, Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Uint64, positions: Uint64) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each pair of seed and position of the token in the answer, [n] float64.

    A function of the two alone: a request draws the same numbers after a preemption, on another replica, and in any
    company.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
