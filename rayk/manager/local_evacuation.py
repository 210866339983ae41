"""Offering what a replica of this process has cached to the others here, as the scheduler does it on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from rayk import protocol as m
from rayk.errors import RaykError
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.context_sync import ContextMirrors
from rayk.replica.page_exchange import PageExchange
from rayk.scheduler.scaling import Removed
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine
from rayk.transport.port import PagePort

if TYPE_CHECKING:
    from rayk.scheduler.membership import Membership
    from rayk.scheduler.script import ReplicaCall, ReplicaReply


def offer_here(cores: Sequence[ReplicaCore], source: int, members: Membership) -> Removed:
    """Offer what `source` has to those of `cores` that take requests."""
    from rayk.scheduler.transfers.evacuation import Evacuation
    from rayk.scheduler.transfers.links import LinkTable
    from rayk.scheduler.transfers.transfer import PageTransfers

    epochs = members.epochs
    pools = {Peer(core.replica, epochs[core.replica]): core.buffers for core in cores}
    exchanges = {}
    for core in cores:
        me, page_bytes = Peer(core.replica, epochs[core.replica]), core.params.bytes_per_page
        port = PagePort(me, core.exports, page_bytes, "", [DirectLine(core.buffers, pools)])
        exchanges[core.replica] = PageExchange(core, port, partial(ContextMirrors(core.replica).context, keep=False))
    transfers = PageTransfers(LinkTable(monotonic), cores[0].page_size)
    script = Evacuation(transfers, lambda: members.ready, monotonic).run(source)
    try:
        asks = next(script)
        while True:
            asks = script.send([_told(exchanges[ask.replica], ask) for ask in asks])
    except StopIteration as end:
        removed: Removed = end.value
        return removed


def _told(exchange: PageExchange, ask: ReplicaCall) -> ReplicaReply:
    from rayk.scheduler.script import ReplicaReply

    try:
        return ReplicaReply(*exchange.answer(ask.command, ask.attached))  # type: ignore[arg-type]  # an offer asks nothing else
    except RaykError as error:
        return ReplicaReply(m.failure(error))
