"""Prompts as callers give them, made into requests: one or several, as text or token ids, with their settings.

Here a request is checked, once: what a message or a replica could not carry ends it with a RequestError, and it goes
nowhere.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, repeat
from time import monotonic
from typing import Any

import msgspec
import numpy as np

from rayk.context import IntArray, as_int32
from rayk.dispatch.output import Handle
from rayk.engine.replicas import ModelSource
from rayk.errors import ConfigError, RaykError, TokenError
from rayk.kvcache.page_hash import tenant_salt
from rayk.protocol.engine_request import timeout_problem
from rayk.request_errors import RequestError
from rayk.sampling import SamplingParams, by_name
from rayk.values import (
    INT64_MIN,
    checked_integer,
    checked_optional_name,
    checked_request_id,
    checked_seconds,
    checked_text,
    shown,
    told,
)

Prompt = str | Sequence[int] | IntArray | Mapping[str, Any]
"""Text, token ids, or a mapping with "text" or "tokens" and, if wanted, "id", "cache_salt" and "session"; for admission
by a policy "tenant", "priority" (an int, higher first) and "deadline" (seconds)."""

Sampling = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, or one for each."""

FIELDS = ("id", "text", "tokens", "cache_salt", "session", "tenant", "priority", "deadline")
NAMES = ("cache_salt", "session", "tenant")


class Prompts:
    """Makes handles, numbered as they come. `tokenizer`: for text, where `source` has none; `has_tokenizer`: whether
    the replicas have one, to turn answers into text. With a `tenant_key` each tenant has a root of its own."""

    def __init__(
        self, source: ModelSource, tokenizer: Any, has_tokenizer: bool, tenant_key: bytes | None = None
    ) -> None:
        self._source = source
        self._tenant_key = tenant_key
        self._tokenizer = tokenizer
        self._has_tokenizer = has_tokenizer
        self._numbers = count(1)
        self._calls = count(1)

    def handles(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling,
        changes: Mapping[str, Any],
        timeout: float | None,
        on_news: Callable[[Handle], None] | None,
        most: int | None = None,
    ) -> Iterator[Handle]:
        """One for each answer (n of each prompt), made when it is asked for, with the time of this call; finished
        already, with its error, where a prompt is none. ConfigError, at once, for what is no list of prompts or has
        more than `most`, and for settings that are none."""
        listed = _listed(prompts)
        if most is not None and len(listed) > most:
            raise ConfigError(
                f"{len(listed)} prompts in one call, which takes {most}; generate() and stream() take any number, "
                "and send them on as others end"
            )
        settings = _settings(sampling, changes, len(listed))
        call, now = next(self._calls), monotonic()
        late = timeout_problem(timeout)

        def made() -> Iterator[Handle]:
            checked: tuple[SamplingParams, str | None] | None = None
            given: SamplingParams | None = None
            index = count()
            for prompt, each in zip(listed, settings, strict=False):
                if checked is None or each is not given:
                    given, checked = each, _checked(each)
                plain, problem = checked
                first = self._handle(
                    next(index), prompt, plain.choice(0), problem or late, None if late else timeout, on_news
                )
                refused = first.result().error if first.done else None
                first.call, first.submitted_at = call, now
                yield first
                for choice in range(1, plain.n):
                    more = first.beside(next(index), next(self._numbers), choice, plain.choice(choice))
                    if refused is not None:
                        more.end(refused)
                    yield more

        return made()

    def _handle(
        self,
        index: int,
        prompt: Prompt,
        sampling: SamplingParams,
        problem: str | None,
        timeout: float | None,
        on_news: Callable[[Handle], None] | None,
    ) -> Handle:
        number = next(self._numbers)
        name, more = f"request-{number}", dict[str, Any]()
        tokens, error = np.empty(0, np.int32), None
        try:
            fields = _fields(prompt)
            name = _name(fields.pop("id", None), name)
            _check(name, fields)
            tokens = self._tokens(name, fields)
            refused_as = partial(RequestError, name)
            more = {each: checked_optional_name(each, fields.get(each), refused_as) for each in NAMES}
            more["priority"] = checked_integer("priority", fields.get("priority", 0), error=refused_as)
            if (deadline := fields.get("deadline")) is not None:
                more["deadline"] = checked_seconds("deadline", deadline, refused_as)
            if problem is not None:
                raise RequestError(name, problem)
        except RaykError as refused:
            error = refused
        except Exception as raised:  # somebody's own tokenizer, sequence or mapping: a matter of this request alone
            error = RequestError(name, f"it cannot be read: {told(raised)}")
        if error is None and sampling.prompt_logprobs is not None:
            more["cache_salt"] = f"prompt-logprobs-{secrets.token_hex(16)}"  # none of its prompt is to be found cached
        if error is None and self._tenant_key is not None:
            more["cache_salt"] = tenant_salt(self._tenant_key, more["tenant"], more["cache_salt"])
        if error is None and sampling.seed is None and not sampling.greedy:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))  # so that it can go on elsewhere
        handle = Handle(
            index,
            number,
            name,
            tokens,
            sampling,
            timeout=None if timeout is None else float(timeout),
            stream_text=on_news is not None and self._has_tokenizer,
            **more,
        )
        handle.on_news = on_news
        if error is not None:
            handle.end(error)
        return handle

    def _tokens(self, name: str, fields: Mapping[str, Any]) -> IntArray:
        if "tokens" in fields:
            given = fields["tokens"]
            if isinstance(given, (str, bytes, bytearray, memoryview)):
                raise RequestError(name, f"tokens must be a flat sequence of ints, got {shown(given)}")
            return _int32(name, given)
        return _int32(
            name, self.tokenizer(name)(checked_text("text", fields["text"], partial(RequestError, name)))["input_ids"]
        )

    def tokenizer(self, name: str) -> Any:
        """transformers' own, loaded when it is needed first; RequestError of that name where there is none."""
        if self._tokenizer is None:
            if self._source.folder is None or not self._has_tokenizer:
                raise RequestError(name, f"{self._source} has no tokenizer; send token ids, or pass tokenizer=")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(str(self._source.folder), local_files_only=True)
        return self._tokenizer


def _fields(prompt: Any) -> dict[Any, Any]:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    return {"text" if isinstance(prompt, str) else "tokens": prompt}


def _name(given: Any, default: str) -> str:
    """The request's id as a string; RequestError, of the default name, for what is none."""
    if given is None:
        return default
    refuse = partial(RequestError, default)
    if isinstance(given, (int, np.integer)):
        return str(checked_integer("a request id", given, INT64_MIN, 2**64 - 1, refuse))
    return checked_request_id(given, refuse)


def _check(name: str, fields: Mapping[Any, Any]) -> None:
    """RequestError unless the fields of a prompt are what they may be; their tokens are looked at later."""
    unknown = [each for each in fields if each not in FIELDS]
    if unknown:
        raise RequestError(name, _unknown(unknown))
    if ("text" in fields) == ("tokens" in fields):
        raise RequestError(name, "a prompt has either text or tokens")


def _unknown(fields: Sequence[Any]) -> str:
    """What is wrong with fields that a prompt does not have, and what may have been meant."""
    said = []
    for field in fields[:8]:
        meant = difflib.get_close_matches(str(field)[:64], [*FIELDS, *SamplingParams.__struct_fields__], 1, 0.6)
        hint = f" (did you mean {meant[0]!r}?)" if meant and meant[0] != field else ""
        hint = (
            " (a sampling setting: give it beside the prompts)" if field in SamplingParams.__struct_fields__ else hint
        )
        said.append(f"{shown(field)}{hint}")
    more = f" and {len(fields) - 8} more" if len(fields) > 8 else ""
    return f"a prompt has no field {', '.join(said)}{more}; it has text or tokens, and id, cache_salt, session"


def _int32(name: str, tokens: Any) -> IntArray:
    try:
        return as_int32(tokens, name)
    except TokenError as error:
        raise RequestError(name, error.message) from None


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several, as a list. ConfigError for what is neither."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, bytearray, memoryview)):
        raise ConfigError(f"prompts are {type(prompts).__name__}; give text as str, or token ids as a list of ints")
    dimensions = getattr(prompts, "ndim", None)  # an array or a tensor: one prompt, or one in each row
    if dimensions == 1 and getattr(getattr(prompts, "dtype", None), "kind", "i") not in "OU":
        return [prompts]
    try:
        listed = list(prompts)
    except TypeError:
        raise ConfigError(
            f"prompts are {shown(prompts)}; give text, token ids, a mapping with one of them, or several of these"
        ) from None
    return [listed] if dimensions is None and listed and isinstance(listed[0], (int, np.integer)) else listed


def _settings(sampling: Sampling, changes: Mapping[str, Any], prompts: int) -> Iterable[SamplingParams]:
    """The settings of each prompt. ConfigError for what is none."""
    single = isinstance(sampling, SamplingParams | None)
    try:
        listed = [sampling or SamplingParams()] if isinstance(sampling, SamplingParams | None) else list(sampling)
    except TypeError:
        raise ConfigError(f"sampling is {shown(sampling)}; give SamplingParams, or one for each prompt") from None
    wrong = [each for each in listed if not isinstance(each, SamplingParams)]
    if wrong:
        raise ConfigError(f"sampling has {shown(wrong[0])}; give SamplingParams, or one for each prompt")
    if not single and len(listed) != prompts:
        raise ConfigError(f"got {len(listed)} sampling settings for {prompts} prompts; pass one, or one for each")
    if changes:
        named = by_name(changes)
        listed = [msgspec.structs.replace(each, **named) for each in listed]
    return repeat(listed[0], prompts) if single else listed


def _checked(sampling: SamplingParams) -> tuple[SamplingParams, str | None]:
    """The settings in Python's own types, or why they are none."""
    try:
        problem = sampling.problem()
        return (sampling.plain(), None) if problem is None else (SamplingParams(), problem)
    except Exception as raised:  # of a number that is none of Python's
        return SamplingParams(), f"its settings cannot be read: {told(raised)}"
