"""The routes, as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayk import __version__
from rayk.cluster import Cluster
from rayk.errors import RaykError
from rayk.server.chat import ChatCompletion
from rayk.server.completion import Completion
from rayk.server.errors import GONE, HttpError, http_error
from rayk.server.generation import RAW, Generation, new_id, now
from rayk.server.openapi import openapi
from rayk.server.parsing import WHOLE, parsers
from rayk.server.prompts import SHORT, Asked, chat_prompt, completion_prompts, sampling_of, structure_of, tokenize
from rayk.server.requests import ChatBody, CompletionBody, DetokenizeBody, ResponsesBody, TokenizeBody, read
from rayk.server.responses import Responses, as_chat
from rayk.server.service import Service
from rayk.server.settings import ServerSettings
from rayk.server.tools import forced_call

OPEN = frozenset({"/health", "/ready", "/version", "/metrics", "/openapi.json"})  # that need no key
REST = 16  # tokens of a completion that does not say how many, as OpenAI has it

Endpoint = Callable[[Request], Awaitable[ASGIApp]]


def application(cluster: Cluster, settings: ServerSettings) -> Starlette:
    """Serves `cluster` by OpenAI's API; `.state.service` is what its routes share."""
    service = Service(cluster, settings)
    started = now()

    async def models(request: Request) -> Response:
        listed = [
            {"id": name, "object": "model", "created": started, "owned_by": "rayk", "max_model_len": cluster.longest}
            for name in settings.models
        ]
        if (name := request.path_params.get("model")) is not None:
            service.check_model(name)
            return _json(next(each for each in listed if each["id"] == name))
        return _json({"object": "list", "data": listed})

    async def completions(request: Request) -> ASGIApp:
        service.check_open()
        body = read(CompletionBody, await _body(request, service))
        model, name = service.check_model(body.model), new_id("cmpl")
        if body.suffix:
            raise HttpError(400, "suffix: this model does not fill in text before a suffix", "suffix")
        more: dict[str, Any] = {}
        if body.max_tokens == 0:
            if not body.echo:
                raise HttpError(400, "max_tokens: 0 needs echo, or nothing would be asked for", "max_tokens")
            more = {"max_new_tokens": 1}
        if body.logprobs is not None:
            more["logprobs"] = body.logprobs
            if body.echo:
                more["prompt_logprobs"] = body.logprobs
        sampling = sampling_of(body, REST, settings.limits, **more)
        if body.stream and body.echo and body.logprobs is not None:
            raise HttpError(400, "stream: with echo and logprobs an answer comes as a whole only", "stream")
        tokens, texts = [], []
        for prompt in completion_prompts(body, settings.limits):
            texts.append(prompt if isinstance(prompt, str) else None)
            if isinstance(prompt, str):
                prompt = await _in_thread_if(len(prompt), partial(tokenize, cluster, prompt, body.add_special_tokens))
            tokens.append(prompt)
        asked = Asked(tokens, texts, sampling)
        _check_size(service, asked, "prompt")
        form = Completion(body, asked, name, model, service.tokenizer)
        return Generation(service, body, asked, form, name)

    async def chat(request: Request) -> ASGIApp:
        service.check_open()
        body, name = read(ChatBody, await _body(request, service)), new_id("chatcmpl")
        asked, parser = await answer_chat(body)
        form = ChatCompletion(body, asked, name, service.check_model(body.model), service.tokenizer, parser)
        return Generation(service, body, asked, form, name)

    async def responses(request: Request) -> ASGIApp:
        service.check_open()
        body, name = read(ResponsesBody, await _body(request, service)), new_id("resp")
        asked, parser = await answer_chat(as_chat(body))
        form = Responses(body, name, service.check_model(body.model), parser)
        return Generation(service, body, asked, form, name)

    async def answer_chat(body: ChatBody) -> tuple[Asked, Any]:
        service.check_model(body.model)
        size = sum(len(str(message.get("content"))) for message in body.messages)
        effort = body.reasoning_effort
        if body.tool_choice == "none":
            body.tools = None
        forced = forced_call(body)
        tokens = await _in_thread_if(size, partial(chat_prompt, cluster, body, effort))
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        more: dict[str, Any] = {}
        if body.logprobs:
            more["logprobs"] = body.top_logprobs or 0
        elif body.top_logprobs:
            raise HttpError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
        if forced is not None:
            if structure_of(body, settings.limits) is not None:
                raise HttpError(400, "tool_choice: it says already what the answer must be", "tool_choice")
            more["structured_outputs"] = {"json": forced}
        sampling = sampling_of(body, max(1, cluster.longest - len(tokens)), settings.limits, **more)
        asked = Asked([tokens], [None], sampling)
        _check_size(service, asked, "messages")
        if forced is not None:
            return asked, parsers(WHOLE, None)
        return asked, service.parser if body.tools else service.plain_parser

    async def tokenized(request: Request) -> Response:
        body = read(TokenizeBody, await _body(request, service))
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise HttpError(400, "prompt: give either a prompt or messages", "prompt")
        if body.prompt is not None:
            call = partial(tokenize, cluster, body.prompt, body.add_special_tokens)
        else:
            call = partial(chat_prompt, cluster, body)
        tokens = await _in_thread_if(SHORT, call)
        made: dict[str, Any] = {"count": len(tokens), "max_model_len": cluster.longest, "tokens": tokens}
        if body.return_token_strs:
            made["token_strs"] = cluster.tokenizer.convert_ids_to_tokens(tokens)
        return _json(made)

    async def detokenized(request: Request) -> Response:
        body = read(DetokenizeBody, await _body(request, service))
        service.check_model(body.model)
        size = cluster.facts[0].vocab_size
        wrong = [token for token in body.tokens if not 0 <= token < size]
        if wrong:
            raise HttpError(400, f"tokens: {wrong[0]} is outside the vocabulary of {size} tokens", "tokens")
        text = await _in_thread_if(len(body.tokens), partial(cluster.tokenizer.decode, body.tokens))
        return _json({"prompt": text.encode("utf-8", "replace").decode()})

    async def health(request: Request) -> Response:
        return _json({"status": "alive"})

    async def ready(request: Request) -> Response:
        states = await asyncio.to_thread(cluster.replica_states)
        found = service.ready
        headers = {} if found else {"retry-after": "1"}
        body = {"ready": found, "draining": service.draining, "replicas": states}
        return Response(msgspec.json.encode(body), 200 if found else 503, headers, "application/json")

    async def version(request: Request) -> Response:
        return _json({"version": __version__})

    async def metrics(request: Request) -> Response:
        own = service.metrics.read(len(service.streams))
        text = await asyncio.to_thread(service.metrics.text, cluster, own)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def schema(request: Request) -> Response:
        return _json(openapi(__version__))

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
        Route("/tokenize", tokenized, methods=["POST"]),
        Route("/detokenize", detokenized, methods=["POST"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
        Route("/metrics", metrics),
        Route("/openapi.json", schema),
    ]
    handlers: dict[Any, Any] = {
        HttpError: _answer,
        RaykError: _answer,
        HTTPException: _refused,
        ClientDisconnect: _disconnected,
        Exception: _answer,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = service
    app.add_middleware(Authentication, service=service)
    return app


class Authentication:
    """What holds for every request: a key, and an id that its answer bears, the client's own or a new one."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._settings = service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = headers.get("x-request-id", "")
        if not (0 < len(name) <= 128 and name.isascii() and name.isprintable()):
            name = new_id("req")

        scope[RAW] = send

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        if self._settings.keys and scope["path"] not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._settings.knows(key.strip()):
                error = HttpError(401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key")
                await error.response()(scope, receive, named)
                return
        await self._app(scope, receive, named)


async def _body(request: Request, service: Service) -> bytes:
    """The body, as far as it may go. HttpError 413 beyond that."""
    limit = service.settings.limits.body_bytes
    too_long = HttpError(413, f"the body is longer than {limit} bytes", code="body_too_long")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_long
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
    return b"".join(parts)


async def _in_thread_if(size: int, call: Callable[[], Any]) -> Any:
    """Do it here if it is little, so that nobody waits for what is much."""
    return call() if size < SHORT else await asyncio.to_thread(call)


def _check_size(service: Service, asked: Asked, field: str) -> None:
    most = service.settings.limits.choices
    if asked.sampling.n > most:
        raise HttpError(400, f"n is {asked.sampling.n}, it must be at most {most}", "n")
    for tokens in asked.tokens:
        if len(tokens) >= service.cluster.longest:
            raise HttpError(
                400,
                f"the prompt has {len(tokens)} tokens, and prompt and answer may have {service.cluster.longest}",
                field,
                "context_length_exceeded",
            )


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


async def _answer(request: Request, error: Exception) -> Response:
    return http_error(error).response()


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _refused(request: Request, error: HTTPException) -> Response:
    """Unknown paths and methods."""
    found = HttpError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
    found.headers.update(error.headers or {})
    return found
