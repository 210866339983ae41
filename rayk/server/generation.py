"""One HTTP request for tokens, from its submission to its last byte: as one body, or as server-sent events."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rayk.dispatch.output import Output, Update
from rayk.request_errors import RequestCancelledError
from rayk.server.answers import Answers
from rayk.server.errors import GONE, HttpError, http_error
from rayk.server.prompts import Asked
from rayk.server.requests import GenerationBody

if TYPE_CHECKING:
    from rayk.server.service import Service

log = logging.getLogger("rayk.server")

HEARTBEAT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # of a proxy
]


class Usage(msgspec.Struct):
    """Tokens of a request; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Form(Protocol):
    """How answers are written: as one body, or as events."""

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Any:
        """The body, for msgspec."""
        ...

    def begin(self) -> bytes:
        """Events before any token."""
        ...

    def more(self, update: Update) -> bytes:
        """Events of an update."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The last events."""
        ...

    def fail(self, error: HttpError) -> bytes:
        """The last events where it goes wrong after the first."""
        ...


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def text_event(head: bytes, index: int, name: bytes, text: str, tail: bytes) -> bytes:
    """The most frequent event, which says nothing but more text of one choice, without a detour over objects."""
    return b'%b{"index":%d,%b:%b%b' % (head, index, name, msgspec.json.encode(text), tail)


def failure(error: HttpError) -> bytes:
    """The events of an error in streams of completions."""
    return event(msgspec.Raw(error.body())) + DONE


def new_id(kind: str) -> str:
    """An id that nobody has."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time())


class Generation:
    """An ASGI application for one request. Its client going away cancels what it asked for."""

    def __init__(self, service: Service, body: GenerationBody, asked: Asked, form: Form, name: str) -> None:
        self._service = service
        self._body = body
        self._asked = asked
        self._form = form
        self._name = name
        self._prompt_tokens = sum(map(len, asked.tokens))
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._first_at: float | None = None
        self._salt: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, began, status = self._service, monotonic(), 200
        given = Headers(scope=scope).get("authorization", "")
        self._salt = service.settings.salt_of(given, self._body.cache_salt)
        answers = Answers(service.mailbox())
        service.streams.add(answers)
        watch = asyncio.ensure_future(_gone(receive, answers))
        try:
            if self._body.stream:
                await self._stream(answers, send)
            else:
                await self._whole(answers, scope, receive, send)
        except HttpError as error:
            status = error.status
            if status != GONE:
                await error.response()(scope, receive, send)
        except asyncio.CancelledError:
            answers.stop(HttpError(GONE, "the connection was closed"))
            raise
        finally:
            watch.cancel()
            answers.close()
            if not answers.over:
                answers.stop(HttpError(GONE, "nobody waits any more"))
            service.streams.discard(answers)
            service.metrics.ended(
                status, monotonic() - began, self._first_at and self._first_at - began,
                self._prompt_tokens, self._cached_tokens, self._completion_tokens,
            )  # fmt: skip

    async def _submit(self, answers: Answers, streams: bool) -> None:
        """Hand the prompts over. Not in the event loop: what is behind a Cluster may be another process."""
        body, service = self._body, self._service
        more = {"cache_salt": self._salt, "priority": body.priority or 0, "tenant": body.user}
        prompts = [
            {"id": f"{self._name}-{at}", "tokens": tokens, **more} for at, tokens in enumerate(self._asked.tokens)
        ]
        timeout = service.timeout(body.timeout)
        on_news = answers.tell if streams else None
        submit = service.cluster.submit_all
        try:
            handles = await service.in_thread(
                lambda: submit(prompts, self._asked.sampling, timeout=timeout, on_news=on_news)
            )
        except Exception as error:
            raise self._failed(error) from error
        answers.follow(handles)

    def _failed(self, error: BaseException) -> HttpError:
        found = http_error(error, own_timeout=self._body.timeout is not None)
        if isinstance(error, RequestCancelledError) and self._service.draining:
            return self._service.unavailable()
        if found.status >= 500:
            log.error("request %s failed: %s", self._name, error)
        return found

    def _count(self, output: Output, choices: int) -> None:
        self._completion_tokens += len(output.tokens)
        if output.id.count("/") == 0:  # the first answer to its prompt
            self._cached_tokens += output.cached_tokens

    def usage(self) -> Usage:
        """So far."""
        total = self._prompt_tokens + self._completion_tokens
        details = {"cached_tokens": self._cached_tokens}
        return Usage(self._prompt_tokens, self._completion_tokens, total, details)

    async def _whole(self, answers: Answers, scope: Scope, receive: Receive, send: Send) -> None:
        await self._submit(answers, streams=False)
        outputs = await answers.outputs()
        for output in outputs:
            if output.error is not None:
                raise self._failed(output.error)
            self._count(output, self._asked.sampling.n)
        first = [output.ttft for output in outputs if output.ttft is not None]
        self._first_at = monotonic() - outputs[0].seconds + min(first) if first else None
        whole = self._form.whole(outputs, self.usage())
        await Response(msgspec.json.encode(whole), media_type="application/json")(scope, receive, send)

    async def _stream(self, answers: Answers, send: Send) -> None:
        await self._submit(answers, streams=True)
        service, form, pending = self._service, self._form, self._form.begin()
        started = False
        while not answers.over:
            parts, pending = [pending], b""
            try:
                updates = await answers.next(service.settings.heartbeat)
                told = bool(updates)
                for update in updates:
                    parts.append(self._more(update, form))
            except HttpError as error:
                if not started or error.status == GONE:
                    raise
                await send({"type": "http.response.body", "body": b"".join([*parts, form.fail(error)])})
                return
            data = b"".join(parts)
            if not data:
                if told:
                    continue
                data = HEARTBEAT
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": SSE})
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": form.end(self.usage())})

    def _more(self, update: Update, form: Form) -> bytes:
        if self._first_at is None and update.tokens:
            self._first_at = monotonic()
        if update.output is not None:
            if update.output.error is not None:
                raise self._failed(update.output.error)
            self._count(update.output, self._asked.sampling.n)
        return form.more(update)


async def _gone(receive: Receive, answers: Answers) -> None:
    """Wait for the client to go away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answers.stop(HttpError(GONE, "the client closed the connection"))
