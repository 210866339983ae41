"""From a body to what a Cluster takes: prompts as tokens, and their settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rayk.cluster import Cluster
from rayk.dispatch.chat import chat_tokens
from rayk.errors import ConfigError
from rayk.sampling import SamplingParams
from rayk.server.errors import HttpError
from rayk.server.requests import ChatBody, CompletionBody, GenerationBody, Json, TokenizeBody, depth
from rayk.server.settings import Limits
from rayk.structured import GUIDED

SHORT = 2_000  # characters that are tokenized in the event loop: it takes less time than to hand them to a thread
OFF = -1  # of top_k, as vLLM has it


class Asked(NamedTuple):
    """One HTTP request for tokens: prompts as [n] token ids each, their texts where they came as text."""

    tokens: list[list[int]]
    texts: list[str | None]
    sampling: SamplingParams


def sampling_of(body: GenerationBody, default_tokens: int, limits: Limits, **more: Any) -> SamplingParams:
    """The settings of a body; HttpError 400 names the field that is wrong. Temperature is 1 unless given."""
    if body.best_of not in (None, 1):
        raise HttpError(400, "best_of: only the answers asked for are made; use n", "best_of")
    given: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": default_tokens}
    for name in SamplingParams.__struct_fields__:
        value = getattr(body, name, None)
        if value is not None and name not in ("logprobs", "stop", "structured_outputs"):
            given[name] = value
    if body.max_tokens is not None:
        given["max_new_tokens"] = body.max_tokens
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.top_k == OFF:
        given["top_k"] = 0
    if (shape := structure_of(body, limits)) is not None:
        given["structured_outputs"] = shape
    given |= more
    try:
        sampling = SamplingParams(**given)
    except ConfigError as error:  # of a structure
        raise HttpError(400, str(error), "structured_outputs") from None
    problem = sampling.problem()
    if problem is not None:
        name, _, rest = problem.partition(" ")
        name = {"max_new_tokens": "max_tokens"}.get(name, name)
        raise HttpError(400, f"{name} {rest}", name)
    return sampling


def structure_of(body: GenerationBody, limits: Limits) -> Json | None:
    """What shape the answer must have; HttpError 400 names the field that says it wrongly, or twice."""
    said: dict[str, Json] = {}
    if (given := body.response_format) is not None:
        kind, schema = given.get("type"), given.get("json_schema")
        if kind == "json_object":
            said["response_format"] = {"json_object": True}
        elif kind == "json_schema":
            if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
                field = "response_format.json_schema.schema"
                raise HttpError(400, f"{field}: give a JSON schema", field)
            said["response_format"] = {"json": schema["schema"]}
        elif kind != "text":
            raise HttpError(
                400,
                f"response_format.type is {kind!r:.100}, it must be text, json_object or json_schema",
                "response_format.type",
            )
    if body.structured_outputs is not None:
        said["structured_outputs"] = body.structured_outputs
    for name, field in GUIDED.items():
        if (given := getattr(body, name)) is not None:
            said[name] = {field: given}
    if len(said) > 1:
        names = list(said)
        raise HttpError(400, f"{names[1]}: {names[0]} says already what the answer must be", names[1])
    for name, shape in said.items():
        if depth(shape, limits.schema_depth) > limits.schema_depth:
            raise HttpError(400, f"{name}: it is nested deeper than {limits.schema_depth}", name)
        return shape
    return None


def completion_prompts(body: CompletionBody, limits: Limits) -> list[str | list[int]]:
    """The prompts of a completion, as text or tokens."""
    prompt, prompts = body.prompt, list[str | list[int]]()
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise HttpError(400, "prompt: it is empty; give text, token ids, or several of these", "prompt")
    tokens = [each for each in prompt if isinstance(each, int)]
    if tokens and len(tokens) < len(prompt):
        raise HttpError(400, "prompt: token ids beside other prompts; give one list, or a list of lists", "prompt")
    prompts = [tokens] if tokens else [each for each in prompt if not isinstance(each, int)]
    if len(prompts) > limits.prompts:
        raise HttpError(400, f"prompt: {len(prompts)} prompts, at most {limits.prompts} in one request", "prompt")
    return prompts


def tokenize(cluster: Cluster, text: str, special: bool | None = None) -> list[int]:
    """Token ids of a text."""
    found: list[int] = cluster.tokenizer(text, add_special_tokens=special is not False)["input_ids"]
    return found


def chat_prompt(cluster: Cluster, body: ChatBody | TokenizeBody, reasoning_effort: str | None = None) -> list[int]:
    """Token ids of a chat; HttpError 400 says what the template does not like."""
    variables = dict(body.chat_template_kwargs or {})
    if reasoning_effort is not None:
        variables.setdefault("reasoning_effort", reasoning_effort)
    final = bool(body.continue_final_message)
    try:
        return chat_tokens(
            cluster.tokenizer,
            messages_of(body.messages or []),
            tools=body.tools,
            add_generation_prompt=not final if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=final,
            chat_template=getattr(body, "chat_template", None),
            **variables,
        )
    except ConfigError as error:
        raise HttpError(400, str(error), "messages") from None
    except TypeError as error:  # a variable with the name of an argument
        raise HttpError(400, f"chat_template_kwargs: {error}", "chat_template_kwargs") from None


def messages_of(given: Sequence[Json]) -> list[Json]:
    """Messages as templates want them: text parts joined, arguments of tool calls as objects, developer as system."""
    messages = []
    for at, message in enumerate(given):
        where = f"messages[{at}]"
        role = message.get("role")
        if not isinstance(role, str):
            raise HttpError(400, f"{where}.role: a message needs a role, such as user", f"{where}.role")
        made = dict(message, role="system" if role == "developer" else role)
        made["content"] = _content(message.get("content"), f"{where}.content")
        if message.get("tool_calls") is not None:
            made["tool_calls"] = [
                _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(_list(message["tool_calls"], where))
            ]
        messages.append(made)
    return messages


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise HttpError(400, f"{where}.tool_calls: must be a list", f"{where}.tool_calls")
    return value


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise HttpError(400, f"{where}: must be text, or a list of text parts", where)
    texts = []
    for at, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise HttpError(400, f"{where}[{at}]: parts other than text are not understood here", f"{where}[{at}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _call(call: Any, where: str) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise HttpError(400, f"{where}: a tool call needs a function with a name", where)
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise HttpError(400, f"{where}.function.arguments: not JSON", f"{where}.function.arguments") from None
    return dict(call, function=dict(function, arguments=arguments))
