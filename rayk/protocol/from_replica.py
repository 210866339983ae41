"""What a replica answers, and what it reports of its cache and its links beside the answer."""

from __future__ import annotations

from rayk.kvcache.metrics import KVCacheMetrics
from rayk.protocol.base import Failure, Message, MessagePart
from rayk.protocol.contexts import Contexts, Moved
from rayk.transport.choice import Endpoint

NOT_ASKED = -2  # for ReplicaEnvelope.known; -1 knows nothing


class CacheDelta(MessagePart, frozen=True):
    """What changed in a replica's cache in batches since + 1 .. number, in order; since -1: all that it holds.

    A change is (stored or removed, page keys of 8 bytes). `unfilled` are tokens that the replica still has to prefill
    for what it was given, `free` its free pages.
    """

    number: int
    since: int
    batches: list[list[tuple[bool, bytes]]]
    unfilled: int
    free: int


class Arrival(MessagePart, frozen=True):
    """What became of an import: pages copied and the seconds that it took; `trouble` says why its line failed."""

    pages: int
    seconds: float
    trouble: str = ""


class AdmitDone(Message, frozen=True):
    """What became of each context of an Admit: rows of columns, see rayk.protocol.columns.Outcomes; and of each import.

    `numbers` is int64 [n, 7]: processed, end, cached prefix (-1: None), and tokens reused here, copied in, from the
    host tier and from disk; a row of -1 was refused, or not tried when it has no failure. `seconds` is float64
    [n, 2]: of the claim and of the alloc.
    """

    numbers: bytes
    seconds: bytes
    failures: dict[int, Failure] = {}
    arrivals: list[Arrival] = []


class Found(Message, frozen=True):
    """Per context: pages cached, pages that alloc could reuse, and pages in tiers that follow the cached ones.

    `host` and `disk` are empty where there are no tiers. `room`: pages that Keep may take. `endpoint` is the replica as
    an end of lines, if that was asked for, and `epoch` its start.
    """

    resident: list[int]
    reusable: list[int]
    host: list[int] = []
    disk: list[int] = []
    room: int = 0
    epoch: int = 0
    endpoint: Endpoint | None = None


class Exported(Message, frozen=True):
    """Pinned pages: their hashes, ids (raw int32), and what the target's end of the link has to know; until `expires`
    at most. Without hashes nothing is cached any more, and nothing pinned. It took `seconds`."""

    export_id: int
    start: int
    hashes: list[bytes]
    pages: bytes = b""
    offer: bytes = b""
    expires: float = 0.0
    seconds: float = 0.0


class CachedPrefix(MessagePart, frozen=True):
    """As rayk.kvcache.evacuation.CachedPrefix."""

    cache_salt: str | None
    adapter: str | None
    tokens: bytes
    fresh: int


class PrefixesDone(Message, frozen=True):
    """`cached` pages are there in all."""

    prefixes: list[CachedPrefix]
    cached: int


class KeepDone(Message, frozen=True):
    """Pages that were taken for each context, what became of each import, and the seconds that all of it took."""

    kept: list[int]
    arrivals: list[Arrival]
    seconds: float


class MovedBack(Message, frozen=True):
    """Nothing was done: loads of these requests failed, and their windows are here now. Send the command again."""

    moved: dict[str, Moved]


class TickDone(Message, frozen=True):
    """`moved` and `refused` by request id, the former for windows that are not where they were sent; `value` is what fn
    returned, pickled, b'' when it did not run.

    `failure` is what ended the tick early; by then the first `released` requests were released.
    """

    moved: dict[str, Moved]
    refused: dict[str, Failure]
    value: bytes
    free: int
    used: int
    step_seconds: float
    alloc_seconds: float
    released: int
    failure: Failure | None = None
    waiting: list[str] = []


class InputsDone(Message, frozen=True):
    """Lookup table and cache lengths as raw int32, and the scalars."""

    rows: int
    width: int
    table: bytes
    lengths: bytes
    shape: tuple[int, int, int]


class Value(Message, frozen=True):
    """A pickled Python value."""

    data: bytes


class BlocksDone(Message, frozen=True):
    claimed: bool
    page_ids: list[int]
    generation: int = 0
    client: str = ""


class UsageDone(Message, frozen=True):
    total: int
    free: int
    cached: int


class Fraction(Message, frozen=True):
    value: float


class MetricsDone(Message, frozen=True):
    metrics: KVCacheMetrics


class ResetDone(Message, frozen=True):
    """Pages that are still held after a reset: at a replica; by replica index where all were asked."""

    held: int = 0
    by_replica: dict[int, int] = {}


class TiersDone(Message, frozen=True):
    """Pages; `trouble` is empty while all is well."""

    host_total: int
    host_used: int
    disk_total: int
    disk_used: int
    trouble: str


class LineState(MessagePart, frozen=True):
    """A line between two replicas that was used: what it carried, what it is taken to do, and what broke it last."""

    source: int
    target: int
    kind: str
    copies: int
    bytes: int
    latency: float  # seconds
    bandwidth: float  # bytes a second
    failures: int
    trouble: str


class ContextsDone(Message, frozen=True):
    """Requests with pages as columns, those without, and dummies; what is not claimed is in none of them."""

    contexts: Contexts
    bare: list[str]
    dummies: list[str]


class Missing(Message, frozen=True):
    """Done, but those were not claimed so. `clients` and `generations` are the claims that are there instead, '' and 0
    for none; empty where none is."""

    request_ids: list[str]
    clients: list[str] = []
    generations: list[int] = []

    @property
    def columns(self) -> tuple[list[str], list[str], list[int]]:
        """All three."""
        nobody = len(self.request_ids)
        return self.request_ids, self.clients or [""] * nobody, self.generations or [0] * nobody
