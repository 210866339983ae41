"""Commands that a replica takes, from drivers and from the scheduler."""

from __future__ import annotations

from rayk.params import OBJECT_STORE
from rayk.protocol.base import Message, MessagePart
from rayk.protocol.contexts import Contexts, ContextView


class Claim(Message, frozen=True):
    request_id: str
    dummy: bool = False
    client: str = ""
    generation: int = 0


class Release(Message, frozen=True):
    """Of each request the claim of that generation; one is that of all, and none that of claims without a number.

    With `missing_ok`, ids that are not claimed so are passed over; with `force` generations do not count, and the
    answer is Released.
    """

    request_ids: list[str]
    missing_ok: bool = False
    generations: list[int] = []
    force: bool = False


class ImportHead(MessagePart, frozen=True):
    """Exported pages of a prefix, from page `start` on, one hash each, and how the target gets them.

    `line` is a kind of rayk.transport.choice. Only the object store's pages are attached to the message; for the others
    `pages` (raw int32), `offer` and `expires` are what the source `source` of that epoch answered, see Exported.
    """

    start: int
    hashes: list[bytes]
    line: str = OBJECT_STORE
    source: int = -1
    epoch: int = 0
    export_id: int = 0
    pages: bytes = b""
    offer: bytes = b""
    expires: float = 0.0


class Admit(Message, frozen=True):
    """Allocate requests in order, after claiming them if `claim`. With `stop_on_error` none is tried after a refusal.

    `uses[i]` are the imports, in order, that context i may continue its prefix with. `handed`: they are running
    requests of another replica, see ReplicaCore.accept_handover(). `clients` and `generations` are those of the claims
    that are to be made, or are there: one for each context, or one for all.
    """

    contexts: Contexts
    claim: bool = False
    imports: list[ImportHead] = []
    uses: dict[int, list[int]] = {}
    stop_on_error: bool = False
    handed: bool = False
    clients: list[str] = []
    generations: list[int] = []


class Lookup(Message, frozen=True):
    """How many leading pages of each context are cached, here and in tiers, and how many could be reused.

    With `introduce` the replica says who and where it is, too.
    """

    views: list[ContextView]
    introduce: bool = False


class Export(Message, frozen=True):
    """Pin cached pages start .. stop until Acknowledge, and make them ready for replica `to` on that kind of line."""

    view: ContextView
    start: int
    stop: int
    line: str = OBJECT_STORE
    to: int = -1
    to_epoch: int = 0


class Acknowledge(Message, frozen=True):
    export_ids: list[int]


class DropLines(Message, frozen=True):
    """These replicas are gone or replaced: close what is open to them."""

    replicas: list[int]


class GetPrefixes(Message, frozen=True):
    """What is cached, last released first; see rayk.kvcache.evacuation.list_prefixes()."""

    skip: int
    count: int
    size: int


class Keep(Message, frozen=True):
    """Cache the prefixes of these contexts, in order, as far as their pages are here or among the imports that `uses`
    names as in Admit; see rayk.kvcache.evacuation.adopt_pages()."""

    views: list[ContextView]
    imports: list[ImportHead] = []
    uses: dict[int, list[int]] = {}


class RunTick(Message, frozen=True):
    """One iteration; the lists index `views`. `fn` is a pickled forward, b'' for none. `generations` are those of the
    claims to be released."""

    views: list[ContextView]
    step: list[int] = []
    release: list[str] = []
    alloc: list[int] = []
    execute: list[int] = []
    fn: bytes = b""
    generations: list[int] = []


class Inputs(Message, frozen=True):
    views: list[ContextView]
    max_cache_length: int | None = None
    characteristics: tuple[int, int, int] | None = None


class Execute(Message, frozen=True):
    views: list[ContextView]
    fn: bytes


class Step(Message, frozen=True):
    views: list[ContextView]


class Blocks(Message, frozen=True):
    """Page ids of a request, and whether it is claimed."""

    request_id: str


class GetUsage(Message, frozen=True):
    pass


class GetCacheDelta(Message, frozen=True):
    """For the news that come with the answer."""


class UsedFraction(Message, frozen=True):
    view: ContextView


class GetMetrics(Message, frozen=True):
    pass


class ResetMetrics(Message, frozen=True):
    pass


class ResetPrefixCache(Message, frozen=True):
    """See ReplicaCore.reset_prefix_cache(), and join_after_reset() for one that `joins`."""

    token: bytes | None = None
    joins: bool = False


class ReadPages(Message, frozen=True):
    page_ids: list[int]


class CheckIntegrity(Message, frozen=True):
    pass


class GetTiers(Message, frozen=True):
    """Occupancy and health of the node's host and disk tier."""


class PollTransfers(Message, frozen=True):
    pass


class Drain(Message, frozen=True):
    """Answer when nothing is on its way to or from a tier."""


class GetContexts(Message, frozen=True):
    """The contexts of claimed requests, as they were sent last; claims of other generations count as none."""

    request_ids: list[str]
    generations: list[int] = []


class StartCacheEvents(Message, frozen=True):
    """Note from now on which pages are cached, for a router that goes by that; what is cached already counts."""


ExchangeCommand = Lookup | Export | Acknowledge | DropLines | GetPrefixes | Keep  # see rayk.replica.page_exchange


ReplicaCommand = (
    Claim
    | Release
    | Admit
    | Lookup
    | Export
    | Acknowledge
    | DropLines
    | GetPrefixes
    | Keep
    | RunTick
    | Inputs
    | Execute
    | Step
    | Blocks
    | GetUsage
    | GetCacheDelta
    | UsedFraction
    | GetMetrics
    | ResetMetrics
    | ResetPrefixCache
    | ReadPages
    | CheckIntegrity
    | GetTiers
    | PollTransfers
    | Drain
    | GetContexts
    | StartCacheEvents
)
