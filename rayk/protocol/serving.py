"""What drivers and the scheduler of a Cluster tell each other. It knows requests by number, length and the keys of
their pages, never their prompts or tokens.

A *ticket* is the number of one attempt to serve a request: one that lost its replica asks for a place with another
ticket, so that nothing late is taken for news. Tickets are unique among all drivers of a Cluster: the upper bits are
the driver's number, 0 where there is only one.
"""

from __future__ import annotations

import msgspec

from rayk.protocol.base import Failure, MessagePart

DRIVER_SHIFT = 40  # a driver may number 2**40 attempts, and 2**23 drivers may come and go


def driver_of(ticket: int) -> int:
    """The number of the driver that made the ticket."""
    return ticket >> DRIVER_SHIFT


class PlaceRequest(MessagePart, frozen=True, omit_defaults=True, gc=False):
    """A request that wants a place. `tokens`: of its prompt and its answer so far; `left` seconds of its `timeout`.

    `keys` of its prompt's pages, 8 bytes each, where its driver makes them. `call` says with which others it came.
    `again`: the ticket with which it had a place that it lost; it goes before all others. `beside`: that of another
    answer to the same prompt, whose pages it shares where that one is.
    """

    ticket: int
    request_id: str
    tokens: int
    new_tokens: int
    call: int = 0
    keys: bytes = b""
    session: str | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    timeout: float | None = None
    left: float | None = None
    again: int = 0
    beside: int = 0


class Standing(MessagePart, frozen=True, gc=False):
    """A request that has its place already, said to a scheduler that may not know; `begun`: and tokens from there."""

    want: PlaceRequest
    replica: int
    begun: bool


class LineNews(MessagePart, frozen=True, gc=False):
    """What became of a copy of pages from one replica (of that epoch) to another: `trouble`, or `pages` in so many
    seconds."""

    source: int
    epoch: int
    target: int
    kind: str
    pages: int = 0
    seconds: float = 0.0
    trouble: str = ""


class DriverNews(MessagePart, frozen=True, omit_defaults=True):
    """From a driver, since the last: requests that want places, tickets of those that are over before a replica had
    them, replicas (with their start) that it hears nothing of any more, and what became of copies. Also all requests
    that have places, to a scheduler that may not know them; `told`: for that time now it knows all."""

    wants: list[PlaceRequest] = []
    dropped: list[int] = []
    unheard: list[tuple[int, int]] = []
    lines: list[LineNews] = []
    standing: list[Standing] = []
    told: int = 0


class Placed(MessagePart, frozen=True, omit_defaults=True):
    """The request with that ticket goes to `replica`; parts of its prefix are copied there first: source, first page
    and the one after the last."""

    ticket: int
    replica: int
    spans: list[tuple[int, int, int]] = []


class Refused(MessagePart, frozen=True):
    """The request with that ticket gets no place any more."""

    ticket: int
    why: Failure


class SchedulerNews(MessagePart, frozen=True, omit_defaults=True):
    """To a driver, the `number`th since it came. `roster`: the version of the roster by which this was decided. Without
    anything else it says that the scheduler lives."""

    number: int
    roster: int
    placed: list[Placed] = []
    refused: list[Refused] = []


_encoder = msgspec.msgpack.Encoder()
_driver_news = msgspec.msgpack.Decoder(DriverNews)
_scheduler_news = msgspec.msgpack.Decoder(SchedulerNews)


def encode_news(news: DriverNews | SchedulerNews) -> bytes:
    """As msgpack."""
    return _encoder.encode(news)


def decode_driver_news(wire: bytes) -> DriverNews:
    """msgspec.ValidationError for what is none."""
    return _driver_news.decode(wire)


def decode_scheduler_news(wire: bytes) -> SchedulerNews:
    """msgspec.ValidationError for what is none."""
    return _scheduler_news.decode(wire)
