"""Offering what a replica of this process has cached to the others here, as the scheduler does it on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from rayk.errors import RaykError
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol import messages as m
from rayk.protocol.context_sync import Mirrors
from rayk.replica.page_exchange import Exchange
from rayk.scheduler.scaling import Removed
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine
from rayk.transport.port import PagePort

if TYPE_CHECKING:
    from rayk.scheduler.membership import Membership
    from rayk.scheduler.script import Ask, Told


def offer_here(cores: Sequence[ReplicaCore], source: int, members: Membership) -> Removed:
    """Offer what `source` has to those of `cores` that take requests."""
    from rayk.scheduler.transfers.evacuation import Offering
    from rayk.scheduler.transfers.links import Lines
    from rayk.scheduler.transfers.transfer import Carrier

    epochs = members.epochs
    pools = {Peer(core.replica, epochs[core.replica]): core.buffers for core in cores}
    exchanges = {}
    for core in cores:
        me, page_bytes = Peer(core.replica, epochs[core.replica]), core.params.bytes_per_page
        port = PagePort(me, core.exports, page_bytes, "", [DirectLine(core.buffers, pools)])
        exchanges[core.replica] = Exchange(core, port, partial(Mirrors(core.replica).context, keep=False))
    carrier = Carrier(Lines(monotonic), monotonic)
    script = Offering(carrier, lambda: members.ready, cores[0].page_size, monotonic).run(source)
    try:
        asks = next(script)
        while True:
            asks = script.send([_told(exchanges[ask.replica], ask) for ask in asks])
    except StopIteration as end:
        removed: Removed = end.value
        return removed


def _told(exchange: Exchange, ask: Ask) -> Told:
    from rayk.scheduler.script import Told

    try:
        return Told(*exchange.answer(ask.command, ask.attached))  # type: ignore[arg-type]  # an offer asks nothing else
    except RaykError as error:
        return Told(m.failure(error))
