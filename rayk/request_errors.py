"""What can go wrong with one request of an engine; none of these concerns another request.

RaykError
├── RequestError (ValueError)             a request that cannot be served as it is
├── QueueFullError                        the engine has as many requests as it takes; try again later
├── RequestTimeoutError (TimeoutError)    its time was up; what was generated until then is kept
├── RequestCancelledError                 its sender cancelled it, or the engine was closed
└── ForwardError (RuntimeError)           the model raised, or gave numbers that are none
"""

from __future__ import annotations

from typing import ClassVar

from rayk.errors import RaykError


class RequestError(RaykError, ValueError):
    """A request that cannot be served as it is. Nothing was changed."""

    request_id: str
    message: str
    text: ClassVar[str] = "request {request_id!r}: {message}"


class QueueFullError(RaykError):
    """The engine holds as many requests as it takes. Nothing was changed."""

    request_id: str
    limit: int
    text: ClassVar[str] = "request {request_id!r} was not taken: {limit} requests wait or run; send it again later"


class RequestTimeoutError(RaykError, TimeoutError):
    """The request's time was up; its output has what was generated until then."""

    # Two fields and no more: TimeoutError is an OSError, which cuts longer arguments.
    request_id: str
    seconds: float
    text: ClassVar[str] = (
        "request {request_id!r} was not finished within {seconds:g} s; give it more time, or ask for fewer tokens"
    )


class RequestCancelledError(RaykError):
    """The request was cancelled after `generated` tokens."""

    request_id: str
    generated: int
    text: ClassVar[str] = "request {request_id!r} was cancelled after {generated} token(s)"


class ForwardError(RaykError, RuntimeError):
    """The model failed on this request, and on it alone: the rest of its batch went on."""

    request_id: str
    replica: int
    kind: str
    message: str
    text: ClassVar[str] = "the model failed on request {request_id!r} (replica {replica}): {kind}: {message}"
