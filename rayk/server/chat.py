"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from rayk.dispatch.output import Output, Update
from rayk.protocol.engine_reports import TokenLogprobs
from rayk.server.completion import prompt_logprobs, token_text
from rayk.server.errors import HttpError
from rayk.server.generation import DONE, Usage, event, failure, heads, now, text_events
from rayk.server.parsing import AnswerParser, Part
from rayk.server.prompts import Asked
from rayk.server.requests import ChatBody, Json


class Message(msgspec.Struct, omit_defaults=True):
    """What the assistant says, or in an event a part of it."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Json] | None = None


class Whole(msgspec.Struct, omit_defaults=True):
    """The same as a whole: `content` is there, if only as null."""

    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[Json] | None = None


class Choice(msgspec.Struct, omit_defaults=True):
    """One answer."""

    index: int
    message: Whole
    logprobs: Json | None
    finish_reason: str | None
    token_ids: list[int] | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """A part of one in an event."""

    index: int
    delta: Message
    logprobs: Json | None
    finish_reason: str | None
    token_ids: list[int] | None = None


class ChatCompletion:
    """The answers of one request. `parser` makes what splits one answer's text into content, reasoning and calls."""

    def __init__(
        self, body: ChatBody, asked: Asked, name: str, model: str, tokenizer: Any, parser: type[AnswerParser] | Any
    ) -> None:
        self._body = body
        self._asked = asked
        self._tokenizer = tokenizer
        self._base = {"id": name, "created": now(), "model": model}
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        base = self._base | {"object": "chat.completion.chunk"}
        self._heads = heads(base, b'"delta":{"content":', range(asked.sampling.n))
        self._tail = b'},"logprobs":null,"finish_reason":null}]' + (b',"usage":null' if self._usage else b"") + b"}\n\n"
        self._plain = not body.logprobs and not body.return_token_ids
        self._parsers = [parser() for _ in range(asked.sampling.n)]

    def whole(self, outputs: Sequence[Output], usage: Usage) -> dict[str, Any]:
        """See Form."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        made = self._base | {"object": "chat.completion", "choices": choices, "usage": usage}
        if self._body.prompt_logprobs is not None:
            found = outputs[0].prompt_logprobs or []
            made["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._asked.tokens[0], found)
        if self._body.return_token_ids:
            made["prompt_token_ids"] = self._asked.tokens[0]
        return made

    def _choice(self, index: int, output: Output) -> Choice:
        part = self._parsers[index].feed(output.text or "", final=True)
        calls = [_call(call) for call in part.calls]
        message = Whole("assistant", part.content if part.content or not calls else None, None)
        message.reasoning_content, message.tool_calls = part.reasoning or None, calls or None
        logprobs = None
        if self._body.logprobs:
            logprobs = self._logprobs(output.tokens, output.logprobs or [])
        choice = Choice(index, message, logprobs, "tool_calls" if calls else output.finish_reason)
        if self._body.return_token_ids:
            choice.token_ids = output.tokens
        return choice

    def _logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> Json:
        content = []
        for token, each in zip(tokens, found, strict=False):
            top = [self._logprob(i, value) for i, value in zip(each.top_ids, each.top, strict=True)]
            content.append(self._logprob(token, each.chosen) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, value: float) -> Json:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    # -- events ------------------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """See Form."""
        first = Message(role="assistant", content="")
        return b"".join(self._event(Delta(index, first, None, None)) for index in range(self._asked.sampling.n))

    def more(self, update: Update) -> bytes:
        """See Form."""
        output, parser, text, before = update.output, self._parsers[update.index], update.text, b""
        if self._plain and parser.plain:
            if output is None:
                return text_events(self._heads[update.index], update.pieces, self._tail)
            before = text_events(self._heads[update.index], update.pieces[:-1], self._tail)
            text = "".join(update.pieces[-1:])
        part: Part = parser.feed(text, final=output is not None)
        if self._plain and output is None and not part.calls and not part.reasoning:
            if not part.content:  # it waits for the rest of a tag
                return b""
            return text_events(self._heads[update.index], [part.content], self._tail)
        calls = [_call(call, at) for at, call in enumerate(part.calls, parser.calls - len(part.calls))]
        delta = Message(None, part.content or None, part.reasoning or None, calls or None)
        logprobs = self._logprobs(update.tokens, update.logprobs) if self._body.logprobs and update.tokens else None
        reason = None
        if output is not None:
            reason = "tool_calls" if parser.calls else output.finish_reason
        made = Delta(update.index, delta, logprobs, reason)
        if self._body.return_token_ids:
            made.token_ids = update.tokens
        return before + self._event(made)

    def _event(self, choice: Delta) -> bytes:
        more: dict[str, Any] = {"usage": None} if self._usage else {}
        return event(self._base | {"object": "chat.completion.chunk", "choices": [choice]} | more)

    def end(self, usage: Usage) -> bytes:
        """See Form."""
        if not self._usage:
            return DONE
        return event(self._base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}) + DONE

    def fail(self, error: HttpError) -> bytes:
        """See Form."""
        return failure(error)


def _call(call: Json, index: int | None = None) -> Json:
    made = {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    return made if index is None else {"index": index, **made}
