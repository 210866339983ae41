"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from rayk.dispatch.output import Output, Update
from rayk.protocol.engine_reports import TokenLogprobs
from rayk.server.errors import HttpError
from rayk.server.generation import DONE, Usage, event, failure, heads, now, text_events
from rayk.server.prompts import Asked
from rayk.server.requests import CompletionBody


class Logprobs(msgspec.Struct):
    """Of a completion's tokens; None for the first of an echoed prompt. Offsets are in characters of the text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class Choice(msgspec.Struct, omit_defaults=True):
    """One answer, or a part of it in an event."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion:
    """The answers of one request. `texts` of tokens come from `tokenizer`, None without one."""

    def __init__(self, body: CompletionBody, asked: Asked, name: str, model: str, tokenizer: Any) -> None:
        self._body = body
        self._asked = asked
        self._tokenizer = tokenizer
        self._base = {"id": name, "object": "text_completion", "created": now(), "model": model}
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._heads = heads(self._base, b'"text":', range(len(asked.tokens) * asked.sampling.n))
        self._tail = b',"logprobs":null,"finish_reason":null}]' + (b',"usage":null' if self._usage else b"") + b"}\n\n"
        self._plain = body.logprobs is None and not body.return_token_ids
        self._offsets: dict[int, int] = {}  # by choice: characters so far
        self._finished: dict[int, str] = {}

    def _prompt_of(self, index: int) -> int:
        return index // self._asked.sampling.n

    def whole(self, outputs: Sequence[Output], usage: Usage) -> dict[str, Any]:
        """See Form."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return self._base | {"choices": choices, "usage": usage}

    def _choice(self, index: int, output: Output) -> Choice:
        body, prompt = self._body, self._asked.tokens[self._prompt_of(index)]
        tokens, text = output.tokens, output.text or ""
        if body.max_tokens == 0:  # only the prompt is wanted
            tokens, text = [], ""
        logprobs = None
        if body.logprobs is not None:
            logprobs = Logprobs([], [], [], [])
            if body.echo:
                self.add_logprobs(logprobs, prompt, output.prompt_logprobs or [], 0)
            self.add_logprobs(logprobs, tokens, output.logprobs or [], sum(map(len, logprobs.tokens)))
        reason = "length" if body.max_tokens == 0 else output.finish_reason
        choice = Choice(index, (self._echo(index) if body.echo else "") + text, logprobs, reason)
        if body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = tokens, prompt
        if body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, prompt, output.prompt_logprobs or [])
        return choice

    def _echo(self, index: int) -> str:
        at = self._prompt_of(index)
        text = self._asked.texts[at]
        if text is None:
            text = self._tokenizer.decode(self._asked.tokens[at]) if self._tokenizer is not None else ""
        return text

    def add_logprobs(
        self, into: Logprobs, tokens: Sequence[int], found: Sequence[TokenLogprobs | None], offset: int
    ) -> None:
        """Append those of some tokens, whose text begins at that offset."""
        for token, each in zip(tokens, found, strict=False):
            text = token_text(self._tokenizer, token)
            into.tokens.append(text)
            into.text_offset.append(offset)
            offset += len(text)
            into.token_logprobs.append(None if each is None else each.chosen)
            into.top_logprobs.append(None if each is None else self._top(text, each))

    def _top(self, chosen: str, found: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in zip(found.top_ids, found.top, strict=True):
            top.setdefault(token_text(self._tokenizer, token), logprob)
        top.setdefault(chosen, found.chosen)
        return top

    # -- events ------------------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """See Form."""
        if not self._body.echo:
            return b""
        count = len(self._asked.tokens) * self._asked.sampling.n
        return b"".join(self._event(Choice(index, self._echo(index), None, None)) for index in range(count))

    def more(self, update: Update) -> bytes:
        """See Form."""
        index, text, logprobs, before = update.index, update.text, None, b""
        if self._plain:
            if update.output is None:
                return text_events(self._heads[index], update.pieces, self._tail)
            before, text = text_events(self._heads[index], update.pieces[:-1], self._tail), "".join(update.pieces[-1:])
        if self._body.logprobs is not None and update.tokens:
            logprobs = Logprobs([], [], [], [])
            offset = self._offsets.get(index, len(self._echo(index)) if self._body.echo else 0)
            self.add_logprobs(logprobs, update.tokens, update.logprobs, offset)
            self._offsets[index] = offset + sum(map(len, logprobs.tokens))
        reason = None if update.output is None else update.output.finish_reason
        choice = Choice(index, text, logprobs, reason)
        if self._body.return_token_ids:
            choice.token_ids = update.tokens
        return before + self._event(choice)

    def _event(self, choice: Choice) -> bytes:
        more: dict[str, Any] = {"usage": None} if self._usage else {}
        return event(self._base | {"choices": [choice]} | more)

    def end(self, usage: Usage) -> bytes:
        """See Form."""
        return (event(self._base | {"choices": [], "usage": usage}) if self._usage else b"") + DONE

    def fail(self, error: HttpError) -> bytes:
        """See Form."""
        return failure(error)


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; its number without a tokenizer."""
    if tokenizer is None:
        return f"token_id:{token}"
    text = str(tokenizer.decode([token]))
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def prompt_logprobs(
    tokenizer: Any, tokens: Sequence[int], found: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """Those of a prompt as vLLM's extra field has them: by token id."""
    listed: list[dict[str, Any] | None] = []
    for token, each in zip(tokens, found, strict=False):
        if each is None:
            listed.append(None)
            continue
        ranked = dict(zip(each.top_ids, each.top, strict=True)) | {token: each.chosen}
        listed.append(
            {str(i): {"logprob": value, "decoded_token": token_text(tokenizer, i)} for i, value in ranked.items()}
        )
    return listed
