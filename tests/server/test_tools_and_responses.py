"""Tool calls that a model makes or has to make, and /v1/responses, as OpenAI's client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from rayk.server.errors import HttpError
from rayk.server.parsing import parsers
from rayk.server.requests import ResponsesBody, read
from rayk.server.responses import Responses, as_chat

from .conftest import Served

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
CHAT = [{"role": "user", "content": "What is the weather in Rome?"}]
TIME = {"type": "function", "function": {"name": "get_time", "parameters": CITY}}


def test_calls_that_have_to_be_made(served: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": [WEATHER, TIME], "seed": 3, "max_tokens": 300}
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = served.client.chat.completions.create(**asked, tool_choice=named).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "get_weather" and isinstance(json.loads(call.function.arguments)["city"], str)
    stream = list(served.client.chat.completions.create(**asked, tool_choice=named, stream=True))
    [delta] = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert (delta.function.name, delta.function.arguments) == (call.function.name, call.function.arguments)
    assert stream[-1].choices[0].finish_reason == "tool_calls"
    free = served.client.chat.completions.create(**asked, tool_choice="required").choices[0].message.tool_calls
    assert free[0].function.name in ("get_weather", "get_time")
    answered = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"},
    ]
    assert served.client.chat.completions.create(**asked | {"messages": answered}).choices[0].message
    for wrong in ("nothing", {"type": "function", "function": {"name": "get_news"}}):
        with pytest.raises(openai.BadRequestError) as refused:
            served.client.chat.completions.create(**asked, tool_choice=wrong)
        assert refused.value.param == "tool_choice"


def test_a_response_is_the_chats_answer(served: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0}
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    [mine] = served.cluster.chat(chat, max_tokens=30)
    answer = served.client.responses.create(
        **asked, instructions="Be brief.", input="Hello!", max_output_tokens=30, metadata={"a": "b"}
    )
    assert answer.output_text == mine.text and answer.metadata == {"a": "b"}
    assert answer.status == ("incomplete" if mine.finish_reason == "length" else "completed")
    assert answer.usage.output_tokens == len(mine.tokens) and answer.usage.input_tokens == mine.prompt_length
    more = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello!"}]}]
    with served.client.responses.stream(**asked, instructions="Be brief.", input=more, max_output_tokens=30) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == mine.text
    assert events[-1].type == f"response.{answer.status}" and events[-1].response.output_text == mine.text
    shape = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "integer", "maximum": 99, "minimum": 0}}}
    assert 0 <= int(served.client.responses.create(**asked, input="a", text=shape).output_text) <= 99
    tool = {"type": "function"} | WEATHER["function"]
    called = served.client.responses.create(
        **asked, input=CHAT, tools=[tool], tool_choice={"type": "function", "name": "get_weather"}
    )
    [call] = called.output
    assert call.type == "function_call" and "city" in json.loads(call.arguments)
    rest = [*CHAT, call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "18"}]
    answered = served.client.responses.create(**asked, input=rest, tools=[tool], max_output_tokens=5)
    assert answered.usage.input_tokens > called.usage.input_tokens
    for param, given in (("previous_response_id", "resp_1"), ("tools", [{"type": "web"}])):
        with pytest.raises(openai.BadRequestError) as refused:
            served.client.responses.create(**asked, input="a", extra_body={param: given})
        assert refused.value.param == param


def events(data: bytes) -> Iterator[Any]:
    for each in data.decode().strip().split("\n\n"):
        kind, _, body = each.partition("\n")
        found = json.loads(body.removeprefix("data: "))
        assert kind == f"event: {found['type']}"
        yield found


def test_items_of_a_response_in_pieces() -> None:
    class Piece:
        def __init__(self, text: str, output: Any = None) -> None:
            self.text, self.output = text, output

    body = read(ResponsesBody, b'{"input": "a"}')
    form = Responses(body, "resp_1", "m", parsers("hermes", "qwen3"))
    data = form.begin()
    for text in ("<think>hm", "</think>", 'so <tool_call>{"name": "f"}', "</tool_call>"):
        data += form.more(Piece(text))  # type: ignore[arg-type]  # as much of an update as it reads
    data += form.fail(HttpError(503, "gone", code="unavailable"))
    found = list(events(data))
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert [each["item"]["type"] for each in found if each["type"] == "response.output_item.done"] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert found[-1]["response"]["status"] == "failed" and found[-1]["response"]["error"]["message"] == "gone"
    assert as_chat(body).messages == [{"role": "user", "content": "a"}]
