"""Commands that the scheduler takes, from drivers."""

from __future__ import annotations

from rayk.protocol.base import Message
from rayk.protocol.contexts import Contexts, ContextView
from rayk.protocol.to_replica import (
    CheckIntegrity,
    Drain,
    GetMetrics,
    PollTransfers,
    ResetMetrics,
    ResetPrefixCache,
)


class PlaceMany(Message, frozen=True):
    """Route, claim (unless they are claimed already) and allocate.

    `replicas[i]` is where context i has to go; empty: the router says. `peers`: other replicas may hold more of a
    prefix; at a known `prefill_rate` (tokens a second) what is quicker to compute is not copied. `released` are claims,
    by id and generation, that were released on replicas directly, `seen` and `unfilled` what the sender last saw in the
    answers of each, as of the join of number `joined`: what it was told is done counts in the choice.
    `handed` is the scheduler's own, as in Admit. `keys` are those of the contexts' pages
    (rayk.kvcache.page_hash.PageKeys), one context after the other; b"" where the sender made none. `generations` are
    those of the claims, where they are made already.
    """

    contexts: Contexts
    replicas: list[int] = []
    claim: bool = True
    peers: bool = False
    released: dict[str, int] = {}
    stop_on_error: bool = False
    seen: list[int] = []
    unfilled: list[int] = []
    joined: int = 1
    handed: bool = False
    prefill_rate: float | None = None
    keys: bytes = b""
    generations: list[int] = []


class Enter(Message, frozen=True):
    """Offer requests to a cluster with an admission policy, and hear what became of those that wait.

    `given_up` are ids that are not wanted any more, as far as they still wait. `released`, `seen`, `unfilled`, `keys`
    and `prefill_rate` as in PlaceMany, as of `joined` there; `turns` and `used` are what the sender heard last of each
    replica's pages, 0 where it heard nothing. Without `hear` what is settled waits for the next message.
    """

    contexts: Contexts
    peers: bool = False
    released: dict[str, int] = {}
    given_up: list[str] = []
    seen: list[int] = []
    unfilled: list[int] = []
    turns: list[int] = []
    used: list[int] = []
    hear: bool = True
    joined: int = 1
    keys: bytes = b""
    prefill_rate: float | None = None


class ClaimOne(Message, frozen=True):
    request_id: str
    replica: int
    dummy: bool = False
    released: dict[str, int] = {}


class HitCountsOf(Message, frozen=True):
    view: ContextView


class EveryReplica(Message, frozen=True):
    """The same question or order for all replicas; metrics come back added up, pages held after a reset by replica. See
    SchedulerCore for what becomes of it when some are lost or silent."""

    command: GetMetrics | ResetMetrics | ResetPrefixCache | CheckIntegrity | PollTransfers | Drain


class Connect(Message, frozen=True):
    """A driver introduces itself; with a lease it must renew, or its requests are released. `owner`: it started the
    cluster, which is its own until it leaves or its lease ends."""

    lease_seconds: float | None = None
    owner: bool = False


class Rejoin(Message, frozen=True):
    """A driver goes on with a scheduler that began anew: what it has claimed, by id, replica and generation; the rest
    as in Connect. The answer is Located."""

    ids: list[str]
    replicas: list[int]
    generations: list[int]
    lease_seconds: float | None = None
    owner: bool = False


class Disconnect(Message, frozen=True):
    """A driver leaves: what it still has claimed is released."""


class Describe(Message, frozen=True):
    """What is where; `released` as in PlaceMany."""

    released: dict[str, int] = {}


class Explain(Message, frozen=True):
    """Why a request went where it went."""

    request_id: str


class Enlist(Message, frozen=True):
    """Take indices for `count` replicas that the sender is going to start, for `driver`: when that is gone, they are
    free again."""

    count: int
    driver: str = ""


class Replace(Message, frozen=True):
    """The same for replicas that were lost and are to be replaced now, if nobody is about it."""

    driver: str = ""


class Starting(Message, frozen=True):
    """The replica has a place, and its process comes up."""

    replica: int


class Join(Message, frozen=True):
    """The replica has answered and may be given requests; its ReplicaHandle (rayk.actors.deployment) travels beside."""

    replica: int
    epoch: int
    pages: int


class GiveUp(Message, frozen=True):
    """The replica could not be started, for that reason; `placeless`: there is no place for it now."""

    replica: int
    reason: str = ""
    placeless: bool = False


class DrainReplica(Message, frozen=True):
    """Give the replica no new requests, and with `handover` move those that it has to others. `released` as in
    PlaceMany. Without `leaving` another is to take its place."""

    replica: int
    released: dict[str, int] = {}
    handover: bool = False
    leaving: bool = True


class ResumeReplica(Message, frozen=True):
    """Let a draining replica take requests again."""

    replica: int


class RemoveReplica(Message, frozen=True):
    """Forget a replica on which nothing is placed, or a lost one; the sender ends its process."""

    replica: int


class GetRoster(Message, frozen=True):
    """For the Deployment (rayk.actors.deployment) that comes beside the answer. `gone` did not answer the sender."""

    gone: list[int] = []


class Locate(Message, frozen=True):
    """Where requests of the sender are now."""

    request_ids: list[str]


SchedulerCommand = (
    PlaceMany
    | Enter
    | ClaimOne
    | HitCountsOf
    | EveryReplica
    | Connect
    | Rejoin
    | Disconnect
    | Describe
    | Explain
    | Enlist
    | Replace
    | Starting
    | Join
    | GiveUp
    | DrainReplica
    | ResumeReplica
    | RemoveReplica
    | GetRoster
    | Locate
)
