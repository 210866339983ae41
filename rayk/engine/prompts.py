"""Prompts as callers give them, made into requests: one or several, as text or token ids, with their settings."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import msgspec
import numpy as np

from rayk.context import IntArray, as_int32
from rayk.engine.errors import RequestError
from rayk.engine.output import Handle
from rayk.engine.request import timeout_problem
from rayk.engine.sampling import SamplingParams
from rayk.engine.serve import ModelSource
from rayk.errors import ConfigError, RaykError, TokenError

Prompt = str | Sequence[int] | IntArray | Mapping[str, Any]
"""Text, token ids, or a mapping with "text" or "tokens" and, if wanted, "id", "cache_salt" and "session"."""

Sampling = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, or one for each."""


class Prompts:
    """Makes handles, numbered as they come. `tokenizer`: for text, where `source` has none; `has_tokenizer`: whether
    the replicas have one, to turn answers into text."""

    def __init__(self, source: ModelSource, tokenizer: Any, has_tokenizer: bool) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._has_tokenizer = has_tokenizer
        self._numbers = count(1)

    def handles(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling,
        changes: Mapping[str, Any],
        timeout: float | None,
        on_news: Callable[[Handle], None] | None,
    ) -> list[Handle]:
        """One for each prompt; finished already, with its error, where a prompt is none. ConfigError for settings that
        are none."""
        listed = _listed(prompts)
        settings = _settings(sampling, changes, len(listed))
        return [
            self._handle(i, prompt, each, timeout, on_news)
            for i, (prompt, each) in enumerate(zip(listed, settings, strict=True))
        ]

    def _handle(
        self,
        index: int,
        prompt: Prompt,
        sampling: SamplingParams,
        timeout: float | None,
        on_news: Callable[[Handle], None] | None,
    ) -> Handle:
        number = next(self._numbers)
        fields = dict(prompt) if isinstance(prompt, Mapping) else {}
        if not fields:
            fields["text" if isinstance(prompt, str) else "tokens"] = prompt
        request_id = str(fields.pop("id", f"request-{number}"))
        tokens, error = np.empty(0, np.int32), None
        try:
            tokens = self._tokens(request_id, fields)
        except RaykError as refused:
            error = refused
        problem = sampling.problem() or timeout_problem(timeout)
        if problem is None:
            sampling = sampling.plain()
            if sampling.seed is None and not sampling.greedy:  # given here, so that it can go on elsewhere
                sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        elif error is None:
            error = RequestError(request_id, problem)
        salt, stream = fields.get("cache_salt"), on_news is not None and self._has_tokenizer
        handle = Handle(
            index, number, request_id, tokens, sampling, timeout=timeout, stream_text=stream, cache_salt=salt
        )
        handle.session = fields.get("session")
        handle.on_news = on_news
        if error is not None:
            handle.end(error)
        return handle

    def _tokens(self, request_id: str, fields: Mapping[str, Any]) -> IntArray:
        unknown = set(fields) - {"text", "tokens", "cache_salt", "session"}
        if unknown:
            raise RequestError(request_id, f"a prompt has no field {min(unknown)!r}; it has text or tokens, and an id")
        if ("text" in fields) == ("tokens" in fields):
            raise RequestError(request_id, "a prompt has either text or tokens")
        for name in ("cache_salt", "session"):
            if not isinstance(fields.get(name), str | None):
                raise RequestError(request_id, f"{name} must be a string, got {fields[name]!r}")
        if "tokens" in fields:
            try:
                return as_int32(fields["tokens"], request_id)
            except TokenError as error:
                raise RequestError(request_id, error.message) from None
        if not isinstance(fields["text"], str):
            raise RequestError(request_id, f"text must be a string, got {fields['text']!r}")
        return as_int32(self._tokenize(request_id)(fields["text"])["input_ids"], request_id)

    def _tokenize(self, request_id: str) -> Any:
        if self._tokenizer is None:
            if self._source.folder is None or not self._has_tokenizer:
                raise RequestError(request_id, f"{self._source} has no tokenizer; send token ids, or pass tokenizer=")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(str(self._source.folder), local_files_only=True)
        return self._tokenizer


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "ndim"):  # an array or a tensor: one prompt, or one in each row
        return [prompts] if prompts.ndim == 1 else list(prompts)
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], (int, np.integer)) else listed


def _settings(sampling: Sampling, changes: Mapping[str, Any], prompts: int) -> list[SamplingParams]:
    listed = [sampling or SamplingParams()] * prompts if isinstance(sampling, SamplingParams | None) else list(sampling)
    if len(listed) != prompts:
        raise ConfigError(f"got {len(listed)} sampling settings for {prompts} prompts; pass one, or one for each")
    unknown = set(changes) - set(SamplingParams.__struct_fields__)
    if unknown:
        known = ", ".join(SamplingParams.__struct_fields__)
        raise ConfigError(f"{min(unknown)!r} is not a sampling setting; there are {known}")
    if isinstance(changes.get("stop"), str):
        changes = {**changes, "stop": (changes["stop"],)}
    return [msgspec.structs.replace(each, **changes) for each in listed] if changes else listed
