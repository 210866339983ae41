"""One HTTP request for tokens, from its submission to its last byte: as one body, or as server-sent events."""

from __future__ import annotations

import asyncio
import logging
import secrets
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Awaitable, Coroutine, Generator, Sequence
from functools import partial
from random import Random
from time import monotonic, time
from types import coroutine
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

_encode = msgspec.json.Encoder().encode
_random = Random(secrets.randbits(128))  # asks the system once: each such call lets an engine's thread go first

HEARTBEAT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
RAW = "rayk.send"  # in a scope: `send` without what wraps it further in, for events of a stream that has begun
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


def heads(base: dict[str, Any], name: bytes, choices: range) -> list[bytes]:
    """What the most frequent events begin with, for each choice."""
    head = b"data: " + msgspec.json.encode(base)[:-1]
    return [b'%b,"choices":[{"index":%d,%b' % (head, index, name) for index in choices]


def text_events(head: bytes, pieces: Sequence[str], tail: bytes) -> bytes:
    """The most frequent events, which say nothing but more text of one choice, without a detour over objects: one for
    each token's text."""
    return b"".join([head + _encode(piece) + tail for piece in pieces])


def failure(error: HttpError) -> bytes:
    """The events of an error in streams of completions."""
    return event(msgspec.Raw(error.body())) + DONE


def new_id(kind: str) -> str:
    """An id that nobody has."""
    return f"{kind}-{_random.getrandbits(96):024x}"


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
                await self._stream(answers, scope, send)
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
        """Hand the prompts over."""
        body, service = self._body, self._service
        more = {"cache_salt": self._salt, "priority": body.priority or 0, "tenant": body.user}
        prompts = [
            {"id": f"{self._name}-{at}", "tokens": tokens, **more} for at, tokens in enumerate(self._asked.tokens)
        ]
        timeout = service.timeout(body.timeout)
        on_news = answers.tell if streams else None
        submit = service.cluster.submit_all
        try:
            handles = await service.submit(
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

    async def _stream(self, answers: Answers, scope: Scope, send: Send) -> None:
        stream = EventStream(self, answers, self._form, send, scope.get(RAW, send))
        await self._submit(answers, streams=True)
        await stream.run(self._service.settings.heartbeat)

    def events(self, update: Update) -> bytes:
        """What a stream says of an update. HttpError where it is the end of one that failed."""
        if self._first_at is None and update.tokens:
            self._first_at = monotonic()
        if update.output is not None:
            if update.output.error is not None:
                raise self._failed(update.output.error)
            self._count(update.output, self._asked.sampling.n)
        return self._form.more(update)


class EventStream:
    """Events of one request on their way to its client. The pass of the event loop that brings news writes them itself,
    in the name of the request's task, which goes on only when there is something to wait for: a client that reads
    slowly, or the end."""

    def __init__(self, generation: Generation, answers: Answers, form: Form, start: Send, send: Send) -> None:
        self._generation = generation
        self._answers = answers
        self._form = form
        self._start = start
        self._send = send
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._begun = form.begin()  # not sent yet
        self._started = self._ended = False
        self._left: Awaitable[None] | None = None  # of a write that has to wait
        self._error: BaseException | None = None

    async def run(self, heartbeat: float) -> None:
        """To the end. HttpError for what went wrong before the first byte, or when the client is gone."""
        answers = self._answers
        answers.on_news = self._write
        while True:
            if self._left is not None:
                left, self._left = self._left, None
                await left
            elif self._error is not None:
                raise self._error
            elif self._ended:
                return
            elif answers.ready or answers.stopped is not None:
                if data := self._events():
                    await self._put(data)
            elif not await answers.wait(heartbeat):
                await self._put(self._begun or HEARTBEAT)

    def _write(self) -> bool:
        """Send what is new; whether the task has to go on."""
        assert self._task is not None
        _enter_task(self._loop, self._task)
        try:
            if data := self._events():
                writing = self._put(data)
                self._left = _resumed(writing, writing.send(None))
                return True
        except StopIteration:  # it is written
            pass
        except BaseException as error:
            self._error = error
            return True
        finally:
            _leave_task(self._loop, self._task)
        return self._ended

    def _events(self) -> bytes:
        """Of all that is new. The last of them end it."""
        answers, data = self._answers, b""
        try:
            for update in answers.take():
                data += self._generation.events(update)
            if answers.over:
                data += self._form.end(self._generation.usage())
                self._ended = True
        except HttpError as error:
            if not self._started or error.status == GONE:
                raise
            data += self._form.fail(error)
            self._ended = True
        return self._begun + data if self._begun and data else data

    async def _put(self, data: bytes) -> None:
        if not self._started:
            self._started, self._begun = True, b""
            await self._start({"type": "http.response.start", "status": 200, "headers": SSE})
        await self._send({"type": "http.response.body", "body": data, "more_body": not self._ended})


@coroutine
def _resumed(begun: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine that somebody else began and that waits for something."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:
            go_on = partial(begun.throw, error)
        else:
            go_on = partial(begun.send, sent)
        try:
            waits_for = go_on()
        except StopIteration:
            return


async def _gone(receive: Receive, answers: Answers) -> None:
    """Wait for the client to go away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answers.stop(HttpError(GONE, "the client closed the connection"))
