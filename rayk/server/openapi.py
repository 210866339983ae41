"""openapi.json, from the Structs that bodies are read as."""

from __future__ import annotations

from typing import Any

import msgspec

from rayk.server.requests import ChatBody, CompletionBody, DetokenizeBody, ResponsesBody, TokenizeBody

POSTS: dict[str, tuple[type, str]] = {
    "/v1/completions": (CompletionBody, "Complete a prompt."),
    "/v1/chat/completions": (ChatBody, "Answer a chat."),
    "/v1/responses": (ResponsesBody, "Answer an input."),
    "/tokenize": (TokenizeBody, "Token ids of a prompt or a chat."),
    "/detokenize": (DetokenizeBody, "The text of token ids."),
}
GETS = {
    "/v1/models": "The models that are served.",
    "/health": "Whether the process lives.",
    "/ready": "Whether requests are taken.",
    "/version": "The version of rayk.",
    "/metrics": "Prometheus' text form.",
}
REFUSALS = {
    400: "What is wrong, and which field.",
    401: "No valid key.",
    404: "No such model.",
    408: "Its own timeout.",
    413: "The body is too long.",
    429: "Too many; see Retry-After.",
    499: "The client went away.",
    503: "No replica, or stopping; see Retry-After.",
    504: "The server's timeout.",
}


def openapi(version: str) -> dict[str, Any]:
    """The document."""
    kinds = [kind for kind, _ in POSTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    refusals = {
        str(status): {"description": said, "content": {"application/json": {"schema": error}}}
        for status, said in REFUSALS.items()
    }
    fine = {"200": {"description": "Done."}}
    paths: dict[str, Any] = {
        path: {"get": {"summary": said, "responses": fine | refusals}} for path, said in GETS.items()
    }
    for (path, (_, said)), schema in zip(POSTS.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": said, "requestBody": body, "responses": fine | refusals}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rayk", "version": version},
        "paths": paths,
        "components": {"schemas": components},
    }
