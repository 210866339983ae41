"""Reasoning and tool calls, cut anywhere: in pieces as at once, and nothing that is none of them is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayk.errors import ConfigError
from rayk.server.parsing import AnswerParser, parsers

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
HERMES = {
    "two calls": (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", "", 2),
    "thought": (f"<think>\nhm < 3\n</think>\n\n{CALL}", "", "hm < 3", 1),
    "no call": ("a <tool_ b <tool_call> no json </tool_call> c", "a <tool_ b<tool_call> no json </tool_call> c", "", 0),
    "cut off": ('so <tool_call>{"name": "f"', 'so<tool_call>{"name": "f"', "", 0),
    "not closed": ('<tool_call>{"name": "f"}', "", "", 1),
    "plain": (" hello <b> \n", "hello <b> \n", "", 0),
    "only thought": ("<think>hm", "", "hm", 0),
}


def parse(pieces: list[str], *kind: str | None) -> tuple[str, str, list[Any]]:
    parser = AnswerParser(*kind)
    parts = [parser.feed(piece) for piece in pieces] + [parser.feed("", final=True)]
    calls = [call for part in parts for call in part.calls]
    assert parser.calls == len(calls)
    return "".join(part.content for part in parts), "".join(part.reasoning for part in parts), calls


@pytest.mark.parametrize("name", HERMES)
def test_hermes_in_pieces(name: str) -> None:
    text, content, reasoning, count = HERMES[name]
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = parse(pieces, "hermes", "qwen3")
        assert (found[0], found[1], len(found[2])) == (content, reasoning, count), size
    for call in found[2]:
        assert call["name"] in ("get_weather", "f") and isinstance(json.loads(call["arguments"]), dict)


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", 1),
        ('<|python_tag|>{"name": "f", "parameters": {"a": ";"}}; {"name": "g", "arguments": {}}', "", 2),
        ('[{"name": "f"}, {"name": "g"}]', "", 2),
        ('{"no": "call"}', '{"no": "call"}', 0),
        ("{ is a brace", "{ is a brace", 0),
        ("<|python is not it", "<|python is not it", 0),
        ("Hello {", "Hello {", 0),
    ],
)
def test_llama3_json(text: str, content: str, count: int) -> None:
    for size in (1, 4, len(text)):
        found = parse([text[at : at + size] for at in range(0, len(text), size)], "llama3_json", None)
        assert (found[0], len(found[2])) == (content, count)


def test_reasoning_that_the_template_opened() -> None:
    assert parse(["hm", "</thi", "nk>\n\nyes"], None, "deepseek_r1") == ("yes", "hm", [])
    assert parse(["a <think> b"], None, None) == ("a <think> b", "", [])


def test_names_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match="--tool-parser 'xml' is not there; there are hermes"):
        parsers("xml", None)
