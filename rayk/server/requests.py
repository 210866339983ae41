"""Bodies of requests, and how they are read: a field that is wrong is named, one that nobody knows is ignored.

These Structs are the schema of openapi.json too. Fields are those of OpenAI's API, and vLLM's beyond it.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import msgspec

from rayk.server.errors import HttpError

log = logging.getLogger("rayk.server")

T = TypeVar("T", bound="Body")
Json = dict[str, Any]

_warned: set[tuple[str, str]] = set()  # kinds of bodies and fields of theirs that were warned of
MOST_WARNINGS = 256


class Body(msgspec.Struct, kw_only=True):
    """What all bodies have."""

    model: str | None = None


class StreamOptions(msgspec.Struct):
    """`include_usage`: a last event with the usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body, kw_only=True):
    """What requests for tokens have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    prompt_logprobs: int | None = None
    user: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    timeout: float | None = None
    response_format: Json | None = None
    structured_outputs: Json | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Json | None = None
    reasoning_effort: str | None = None


class ResponsesBody(GenerationBody, kw_only=True):
    """POST /v1/responses. Nothing is kept: a conversation comes whole, as `input`."""

    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: Json | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: Json | None = None
    reasoning: Json | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: Json | None = None


class TokenizeBody(Body, kw_only=True):
    """POST /tokenize: a prompt, or messages."""

    prompt: str | None = None
    messages: list[Json] | None = None
    tools: list[Json] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]


STANDARD = frozenset({"metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "user"})
"""Fields of OpenAI's that change nothing here, and of which nobody has to be warned."""


def read(kind: type[T], body: bytes) -> T:
    """The body as that kind; HttpError 400 names the field that is wrong."""
    try:
        raw = msgspec.json.decode(body)
        if not isinstance(raw, dict):
            raise HttpError(400, f"the body is {type(raw).__name__}, it must be a JSON object")
        found = msgspec.convert(raw, kind, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        field = path[path.find("$") + 1 :].rstrip("`").lstrip(".") or None
        if field is None and "required field" in message:
            field = message.split("`")[1]
        raise HttpError(400, message if field is None else f"{field}: {message}", field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    for field in raw.keys() - set(kind.__struct_fields__) - STANDARD:
        if len(_warned) < MOST_WARNINGS and (kind.__name__, field) not in _warned:
            _warned.add((kind.__name__, field))
            log.warning("%s: the field %.64r is unknown here and ignored", kind.__name__.removesuffix("Body"), field)
    return found


def depth(value: Any, limit: int) -> int:
    """How deep JSON is nested, at most limit + 1."""
    deepest, level = 0, [value]
    while level and deepest <= limit:
        deepest += 1
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return deepest
