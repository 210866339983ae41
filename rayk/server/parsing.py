"""What a model says, split while it comes: reasoning, content, and tool calls in the formats that models write them.

A parser is fed pieces of one answer's text, cut anywhere; what may be the beginning of a tag waits for the rest.
"""

from __future__ import annotations

import json
import secrets
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple

from rayk.errors import ConfigError

Json = dict[str, Any]

REASONING = {"qwen3": ("<think>", "</think>"), "deepseek_r1": ("<think>", "</think>")}
"""Tags around reasoning, by --reasoning-parser. deepseek_r1: its template has opened the tag already."""
OPEN_AT_START = frozenset({"deepseek_r1"})

TOOLS = {"hermes": ("<tool_call>", "</tool_call>"), "qwen": ("<tool_call>", "</tool_call>"), "llama3_json": None}
"""Tags around each call's JSON, by --tool-parser; None: the whole answer is the JSON of a call, or of several."""
WHOLE = "llama3_json"
PYTHON_TAG = "<|python_tag|>"

_json = json.JSONDecoder(strict=False)


class Part(NamedTuple):
    """What a piece of text came to. `calls` are whole: `id`, `name`, and `arguments` as JSON text."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Json, ...] = ()


class State(Enum):
    """Where in an answer a parser is."""

    start = auto()  # reasoning may open
    thinking = auto()
    content = auto()
    calling = auto()  # between the tags of a call
    whole = auto()  # the answer may be a call as a whole
    plain = auto()  # nothing is looked for any more


class AnswerParser:
    """`tools`: a key of TOOLS; `reasoning`: of REASONING; None leaves them in the content. `calls`: how many so far."""

    def __init__(self, tools: str | None = None, reasoning: str | None = None) -> None:
        self.calls = 0
        self._tags = TOOLS[tools] if tools is not None else None
        self._think = REASONING[reasoning] if reasoning is not None else None
        if tools is None:
            self._body = State.plain
        else:
            self._body = State.whole if self._tags is None else State.content
        self._state = self._body if self._think is None else State.start
        if reasoning in OPEN_AT_START:
            self._state = State.thinking
        self._strips = self._state is not State.plain  # white space at this place
        self._text = ""  # that is not told yet

    @property
    def plain(self) -> bool:
        """Whether all that comes is content as it is."""
        return self._state is State.plain and not self._strips

    def feed(self, piece: str, final: bool = False) -> Part:
        """More of the text, or the last of it."""
        if self.plain:
            return Part(piece)
        self._text += piece
        content, thought, calls = list[str](), list[str](), list[Json]()
        while self._step(final, content, thought, calls):
            pass
        self.calls += len(calls)
        return Part("".join(content), "".join(thought), tuple(calls))

    def _step(self, final: bool, content: list[str], thought: list[str], calls: list[Json]) -> bool:
        """Go on in the text; whether it came to another state."""
        if self._strips:
            self._text = self._text.lstrip()
        match self._state:
            case State.start:
                assert self._think is not None
                if self._text.startswith(self._think[0]):
                    self._text, self._state = self._text.removeprefix(self._think[0]), State.thinking
                elif not final and self._think[0].startswith(self._text):
                    return False
                else:
                    self._state = self._body
                return True
            case State.thinking:
                assert self._think is not None
                text, found = self._before(self._think[1], final)
                self._tell(thought, text)
                if found:
                    self._state, self._strips = self._body, True
                return found
            case State.content:
                assert self._tags is not None
                text, found = self._before(self._tags[0], final)
                self._tell(content, text)
                if found:
                    self._state = State.calling
                return found
            case State.calling:
                assert self._tags is not None
                text, tag, rest = self._text.partition(self._tags[1])
                if not tag and not final:
                    return False
                if read := calls_of(text):
                    calls += read
                else:  # it is none: nothing of what the model said is lost
                    content.append(self._tags[0] + text + tag)
                self._text, self._state, self._strips = rest, State.content, bool(read)
                return bool(tag)
            case State.whole:
                begins = self._text[:1] in ("", "{", "[") or self._text.startswith(PYTHON_TAG)
                if not final and (begins or PYTHON_TAG.startswith(self._text)):
                    return False
                calls += calls_of(self._text.removeprefix(PYTHON_TAG)) if final else []
                if calls:
                    self._text = ""
                self._state = State.plain
                return True
            case _:
                self._tell(content, self._text)
                self._text = ""
                return False

    def _tell(self, parts: list[str], text: str) -> None:
        if text:
            parts.append(text)
            self._strips = False

    def _before(self, tag: str, final: bool) -> tuple[str, bool]:
        """The text before a tag, which is taken with it and with the white space between; or, with False, what is
        certain to be before one, as far as there is."""
        before, found, after = self._text.partition(tag)
        if found:
            self._text = after
            return before.rstrip(), True
        if final:
            self._text = ""
            return before, False
        keep = next((n for n in range(min(len(tag) - 1, len(before)), 0, -1) if tag.startswith(before[-n:])), 0)
        certain = before[: len(before) - keep].rstrip()
        self._text = before[len(certain) :]
        return certain, False


def calls_of(text: str) -> list[Json]:
    """The calls that a JSON text holds; none where it is no call."""
    parts, at, text = list[Any](), 0, text.strip()
    while at < len(text):
        try:
            part, at = _json.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        parts.append(part)
        at += len(text[at:]) - len(text[at:].lstrip("; \n"))
    if not parts:
        return []
    listed = parts[0] if len(parts) == 1 and isinstance(parts[0], list) else parts
    calls = []
    for each in listed:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return []
        arguments = each.get("arguments", each.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{secrets.token_hex(12)}", "name": each["name"], "arguments": written})
    return calls


def parsers(tools: str | None, reasoning: str | None) -> Any:
    """What makes a parser for each answer. ConfigError for a name that there is not."""
    for flag, name, known in (("tool-parser", tools, TOOLS), ("reasoning-parser", reasoning, REASONING)):
        if name is not None and name not in known:
            raise ConfigError(f"--{flag} {name!r} is not there; there are {', '.join(known)}")
    return partial(AnswerParser, tools, reasoning)
