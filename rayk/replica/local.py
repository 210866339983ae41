"""A replica in the process of its driver: the contexts are the driver's own, so nothing is mirrored or encoded."""

from __future__ import annotations

from collections.abc import Sequence

from rayk import protocol as m
from rayk.context import TextContext
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.prefix_tree import PageListener
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.columns import ContextRows, LocalRows, LocalView, local_contexts
from rayk.protocol.context_sync import ContextMirrors
from rayk.replica.cache_events import PrefillBacklog
from rayk.replica.service import ReplicaService
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine


class LocalReplica(ReplicaService):
    """`pools` has the buffers of all replicas of the process, `events` is told of cached pages once that is wanted."""

    def __init__(self, core: ReplicaCore, epoch: int, pools: dict[Peer, PageBuffers], events: PageListener) -> None:
        lines = [DirectLine(core.buffers, pools)]
        super().__init__(core, epoch, lines=lines, mirrors=_OwnContexts(core), events=events)
        self._unfilled = _NoBacklog()
        self._pools = pools
        pools[self.port.me] = core.buffers

    def shutdown(self) -> None:
        """Let go of tiers, exports and pages."""
        self.port.close()
        del self._pools[self.port.me]
        self.core.shutdown()


class _OwnContexts(ContextMirrors):
    """The contexts themselves, which the core has."""

    def __init__(self, core: ReplicaCore) -> None:
        super().__init__(core.replica)
        self._core = core

    def row(self, batch: ContextRows, row: int, keep: bool = True) -> TextContext:
        return batch.held[row] if isinstance(batch, LocalRows) else super().row(batch, row, keep)

    def context(self, view: m.ContextView, keep: bool = True) -> TextContext:
        return view.held if isinstance(view, LocalView) else super().context(view, keep)

    def keep(self, ctx: TextContext) -> None:
        pass

    def get(self, request_id: str) -> TextContext | None:
        """A snapshot of the request's context as it is now."""
        self._core.publish()
        ctx = self._core.requests[request_id].ctx
        return ctx.snapshot() if ctx is not None else None

    def pack(self, ctxs: Sequence[TextContext]) -> m.Contexts:
        return local_contexts(ctxs)


class _NoBacklog(PrefillBacklog):
    """Contexts are asked themselves what is left to prefill."""

    def now(self, request_id: str, left: int) -> None:
        pass
