"""How the scheduler's scripts talk: questions for replicas, and the answers to them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from rayk import protocol as m

QUESTIONS = (
    m.Lookup,
    m.Export,
    m.Acknowledge,
    m.DropLines,
    m.StartCacheEvents,
    m.GetPrefixes,
    m.Blocks,
    m.GetUsage,
    m.GetCacheDelta,
)
ORDERS = (m.Release, m.Acknowledge, m.DropLines, m.StartCacheEvents, m.ResetMetrics, m.ResetPrefixCache)


class ReplicaCall(NamedTuple):
    """One message to a replica; `attached` are references to page data, `with_data` asks for one back.

    `late` says what to send when the answer comes after nobody waits for it any more. `wanted`: a driver asked for it,
    so a replica that is busy is waited for.
    """

    replica: int
    command: m.ReplicaCommand
    attached: tuple[Any, ...] = ()
    with_data: bool = False
    late: Callable[[m.Result], list[ReplicaCall]] | None = None
    wanted: bool = False

    @property
    def patient(self) -> bool:
        """Whether a replica that is busy is waited for; see rayk.actors.replica_calls."""
        return self.wanted or not isinstance(self.command, QUESTIONS)

    @property
    def order(self) -> bool:
        """Whether it is sent to a replica that does not answer, too."""
        return isinstance(self.command, ORDERS)

    @property
    def undo(self) -> m.ReplicaCommand | None:
        """What takes back what it did, if it was done when nobody waited for the answer any more."""
        match self.command:
            case m.Admit(contexts, claim=True, generations=generations):
                return m.Release(contexts.ids, True, generations)
            case m.Claim(request_id, generation=generation):
                return m.Release([request_id], True, [generation])
        return None


class ReplicaReply(NamedTuple):
    """The answer to an Ask; a dead or silent replica answers with a Failure."""

    result: m.Result
    data: Any = None


Script = Generator[list[ReplicaCall], list[ReplicaReply], m.Result]
Part = Generator[list[ReplicaCall], list[ReplicaReply], None]
