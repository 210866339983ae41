"""Pages that an engine gives to its peers, and those that come from them: every call of its port is here."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import numpy as np

from rayk import protocol as m
from rayk.context import TextContext
from rayk.errors import LineError, RaykError, RemoteError
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.replica import ReplicaCore
from rayk.params import OBJECT_STORE
from rayk.protocol.context_sync import ContextMirrors
from rayk.protocol.engine import Query, Ship
from rayk.protocol.engine_reports import Answered, Arrived, Shipped
from rayk.replica.page_exchange import PageExchange
from rayk.transport.choice import Peer
from rayk.transport.line import PageData, PageExportRef
from rayk.transport.port import Arrival, PagePort
from rayk.values import printable


class IncomingPages:
    """What a peer has pinned for a request: alloc() copies it."""

    def __init__(self, number: int, kind: str, port: PagePort, shipped: Shipped) -> None:
        pages = np.frombuffer(shipped.pages, np.int32)
        source = Peer(shipped.source, shipped.epoch)
        data = [np.frombuffer(part, np.uint8).reshape(len(pages), -1) for part in shipped.data]
        parcel = PageExportRef(source, shipped.export_id, pages, shipped.offer, shipped.expires, data)
        part, self._arrival = port.incoming(kind, parcel, shipped.start, shipped.hashes)
        self.imports: Sequence[PageImport] = [part]
        self._number = number

    @property
    def arrived(self) -> Arrived:
        """What became of it."""
        arrival: Arrival = self._arrival
        return Arrived(self._number, arrival.pages, arrival.seconds, arrival.trouble)


class PageSharing:
    """One engine's port, which this object owns. What goes wrong on a line is told, and costs a recompute."""

    def __init__(self, port: PagePort) -> None:
        self._port = port
        self.station = port.station
        self.epoch = port.me.epoch

    def ship(self, order: Ship) -> Shipped:
        """Pin pages for a peer: as many as are cached, maybe none."""
        me, began = self._port.me, perf_counter()
        tokens = np.frombuffer(order.tokens, np.int32)
        ctx = TextContext(f"shipped-{order.number}", tokens, len(tokens), order.cache_salt)
        try:
            shipment = self._port.ship(ctx, order.start, order.stop, Peer(order.replica, order.epoch), order.kind)
        except Exception as error:  # whatever it is, the request it was for is computed
            trouble = error.reason if isinstance(error, LineError) else f"{type(error).__name__}: {error}"
            return Shipped(order.number, me.replica, me.epoch, order.kind, trouble=printable(trouble))
        export = shipment.export
        if not len(export.pages):
            self._port.end([export.export_id])
            return Shipped(order.number, me.replica, me.epoch, order.kind)
        return Shipped(
            order.number,
            me.replica,
            me.epoch,
            order.kind,
            export.export_id,
            export.start,
            export.hashes,
            export.pages.astype(np.int32).tobytes(),
            shipment.offer,
            shipment.expires,
            [part.tobytes() for part in shipment.data],
            perf_counter() - began,
        )

    def answer(self, core: ReplicaCore, query: Query) -> Answered:
        """What a question comes to; what goes wrong is an answer, too."""
        exchange = PageExchange(core, self._port, partial(ContextMirrors(core.replica).context, keep=False))
        try:
            result, data = exchange.answer(query.command, _attached(query))
        except RaykError as error:
            return Answered(query.number, m.failure(error))
        except Exception as error:  # a bug in rayk: report it, stay alive
            trace = "".join(traceback.format_exception(error))
            return Answered(query.number, m.failure(RemoteError(core.replica, type(error).__name__, str(error), trace)))
        return Answered(query.number, result, [part.tobytes() for part in data])

    def coming(self, number: int, shipped: Shipped) -> IncomingPages:
        """Pages that a peer has pinned, for request `number`."""
        return IncomingPages(number, shipped.kind, self._port, shipped)

    def unpin(self, export_ids: Sequence[int]) -> None:
        """Take pages back; unknown numbers are ignored."""
        self._port.end(export_ids)

    def farewell(self, replicas: Sequence[int]) -> None:
        """Close the lines to peers that are gone."""
        for replica in replicas:
            self._port.drop(replica)

    def poll(self) -> None:
        """Take back what nobody acknowledged in time."""
        self._port.end_late()

    def close(self) -> None:
        """Close all lines."""
        self._port.close()


def _attached(query: Query) -> list[PageData]:
    """The page data of the imports that the object store would carry."""
    if not isinstance(query.command, m.Keep):
        return []
    heads = [head for head in query.command.imports if head.line == OBJECT_STORE]
    return [
        [np.frombuffer(part, np.uint8).reshape(len(head.hashes), -1) for part in parts]
        for head, parts in zip(heads, query.data, strict=False)
    ]
