"""Requests of a Cluster as its scheduler knows them: by number, length and the keys of their pages, never by prompts or
tokens.

A *ticket* is the number of one attempt to serve a request: one that lost its replica asks for a place with another
ticket, so that nothing late is taken for news. Tickets are unique among all drivers of a Cluster: the upper bits are
the driver's number, 0 where there is only one.
"""

from __future__ import annotations

from rayk.protocol.base import MessagePart

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
