"""What an engine adds to the page exchange that all replicas have: page data inside messages, and imports of requests
that wait. What goes wrong on a link is reported, and costs a recompute."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from rayk import protocol as m
from rayk.errors import RaykError, RemoteError
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.replica import ReplicaCore
from rayk.params import OBJECT_STORE
from rayk.protocol.context_sync import ContextMirrors
from rayk.protocol.engine import Query
from rayk.protocol.engine_reports import Answered, Arrivals
from rayk.protocol.engine_request import Imports
from rayk.replica.page_exchange import PageExchange, reported
from rayk.transport.line import PageData
from rayk.transport.port import Arrival, PagePort


class IncomingPages(NamedTuple):
    """What others have pinned for a request: alloc() copies it."""

    number: int
    imports: Sequence[PageImport]
    filled: Sequence[Arrival]

    @property
    def arrivals(self) -> Arrivals:
        """What became of it."""
        return Arrivals(self.number, reported(self.filled))


class PageSharing:
    """One engine's exchange and its port, which this object owns."""

    def __init__(self, core: ReplicaCore, port: PagePort) -> None:
        self.port = port
        self._core = core
        self._exchange = PageExchange(core, port, partial(ContextMirrors(core.replica).context, keep=False))

    def answer(self, query: Query) -> Answered:
        """What a question comes to; what goes wrong is an answer, too."""
        try:
            attached = _page_data(query.command.imports, query.data) if isinstance(query.command, m.Keep) else []
            result, data = self._exchange.answer(query.command, attached)
        except RaykError as error:
            return Answered(query.number, m.failure(error))
        except Exception as error:  # a bug in rayk: report it, stay alive
            trace, replica = "".join(traceback.format_exception(error)), self._core.replica
            return Answered(query.number, m.failure(RemoteError(replica, type(error).__name__, str(error), trace)))
        return Answered(query.number, result, [part.tobytes() for part in data])

    def incoming(self, number: int, imports: Imports) -> IncomingPages:
        """Pages that others have pinned for request `number`."""
        return IncomingPages(number, *self._exchange.imports(imports.heads, _page_data(imports.heads, imports.data)))

    def poll(self) -> None:
        """Unpin what nobody acknowledged in time."""
        self.port.unpin_late()

    def close(self) -> None:
        """Close all links."""
        self.port.close()


def _page_data(heads: Sequence[m.ImportHead], data: Sequence[Sequence[bytes]]) -> list[PageData]:
    """The page data of the imports that the object store would carry."""
    carried = [head for head in heads if head.line == OBJECT_STORE]
    return [
        [np.frombuffer(part, np.uint8).reshape(len(head.hashes), -1) for part in parts]
        for head, parts in zip(carried, data, strict=False)
    ]
