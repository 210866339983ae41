"""Errors as OpenAI's clients read them: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from rayk.errors import (
    ClosedError,
    ClusterError,
    ConfigError,
    InsufficientBlocksError,
    NoReplicaError,
    OverloadedError,
    RaykError,
    ReplicaLostError,
    SchedulerLostError,
)
from rayk.request_errors import QueueFullError, RequestCancelledError, RequestTimeoutError

GONE = 499  # the client went away; nobody sees it but the log and the metrics
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
FIELDS = frozenset({"timeout", "cache_salt", "logit_bias", "stop", "priority", "tenant", "structured_outputs"})
SOON = 1.0  # seconds, for errors that do not say when to try again


class HttpError(Exception):
    """An answer other than 200. `param` is the field of the body that is at fault; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """The `type` of OpenAI's schema."""
        if self.status in (408, 504):
            return "timeout_error"
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        """The JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """The whole answer."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, "application/json")


def http_error(error: BaseException, own_timeout: bool = False) -> HttpError:
    """What a client is told of an error. `own_timeout`: the client itself said how long it waits."""
    match error:
        case HttpError():
            return error
        case OverloadedError():
            return HttpError(429, str(error), code="overloaded", retry_after=error.retry_after)
        case QueueFullError():
            return HttpError(429, str(error), code="queue_full", retry_after=SOON)
        case RequestTimeoutError():
            return HttpError(408 if own_timeout else 504, str(error), code="timeout")
        case RequestCancelledError():
            return HttpError(GONE, str(error), code="cancelled")
        case NoReplicaError() | ReplicaLostError() | SchedulerLostError() | ClosedError() | InsufficientBlocksError():
            return HttpError(503, str(error), code="unavailable", retry_after=SOON)
        case ClusterError():
            return HttpError(503, str(error), code="unavailable", retry_after=SOON)
        case RaykError() if isinstance(error, ValueError):
            return HttpError(400, str(error), *_at_fault(error))
        case _:
            return HttpError(500, str(error) or type(error).__name__, code="internal_error")


def _at_fault(error: RaykError) -> tuple[str | None, str | None]:
    """The field and the code of a request that cannot be served. Messages of a Cluster begin with what they are about;
    the rest is about the prompt."""
    if isinstance(error, ConfigError):
        return None, None
    text = str(getattr(error, "message", ""))
    if "leaves no room" in text or "can never fit" in text:
        return "prompt", "context_length_exceeded"
    named = text.partition(" ")[0].rstrip(":")
    return {"tenant": "user"}.get(named, named if named in FIELDS else "prompt"), None
