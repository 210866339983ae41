"""Every message between a driver, the scheduler and the replicas: msgspec Structs, sent as msgpack.

    driver    --Envelope[SchedulerCommand]-->  scheduler  --Envelope[ReplicaCommand]-->  replica
    driver    --Envelope[ReplicaCommand]----------------------------------------------->  replica

An Envelope holds one command. `epoch` is the receiver's start, so that nobody talks to a replacement by
mistake; `seq` numbers a sender's mutations from 1 (0: the command changes nothing), so that a repeated one
is answered from memory and not done twice. Token arrays are raw little-endian int32 bytes, and page data
travels beside the message, never in it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rayk import errors
from rayk.errors import MessageError, RaykError, UnsendableError
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.params import OBJECT_STORE
from rayk.protocol.admission import AdmissionState
from rayk.transport.choice import Endpoint


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class _Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


# -- contexts ---------------------------------------------------------------------------------------


class Origin(_Part, frozen=True):
    """What never changes about a context; sent with its first tokens."""

    max_length: int
    cache_salt: str | None = None
    adapter: str | None = None
    session_id: str | None = None
    tenant: str | None = None


class ContextView(_Part, frozen=True):
    """A driver's context as a replica needs it: tokens from position `base` on, the window, draft tokens."""

    request_id: str
    base: int
    tokens: bytes
    processed: int
    end: int
    pending: int = 0
    cached_prefix: int | None = None
    to_verify: bytes = b""
    accepted: bytes = b""
    origin: Origin | None = None  # present when base is 0
    generation: int = 0  # of the sender's claim


class Traits(_Part, frozen=True):
    """What few contexts of a batch have; all defaults for the others."""

    cache_salt: str | None = None
    adapter: str | None = None
    session_id: str | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    to_verify: bytes = b""
    accepted: bytes = b""


class Contexts(_Part, frozen=True):
    """Many contexts as columns, so that a batch costs little more than its bytes; see rayk.protocol.columns.

    `numbers` is int64 [n, 7]: base, tokens sent, processed, end, max_length, placeholders, cached prefix (-1: None).
    `tokens` are the sent tokens of all, one context after the other; `traits` by row, for those that have any.
    """

    ids: list[str]
    numbers: bytes
    tokens: bytes
    traits: dict[int, Traits] = {}


class Moved(_Part, frozen=True):
    """Where alloc() left a window."""

    processed: int
    end: int
    cached_prefix: int | None


# -- to a replica ---------------------------------------------------------------------------------


# A claim has an owner, the driver `client`, and a generation: a number that the scheduler gives out once. Whatever is
# said about a request names the generation that is meant, and is refused as a whole when that is not the present one,
# so that a driver whose lease has ended cannot touch what somebody else has claimed since. 0 means none.


class Claim(_Message, frozen=True):
    request_id: str
    dummy: bool = False
    client: str = ""
    generation: int = 0


class Release(_Message, frozen=True):
    """Of each request the claim of that generation; one is that of all, and none that of claims without a number.

    With `missing_ok`, ids that are not claimed so are passed over; with `force` generations do not count, and the
    answer is Released.
    """

    request_ids: list[str]
    missing_ok: bool = False
    generations: list[int] = []
    force: bool = False


class ImportHead(_Part, frozen=True):
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


class Admit(_Message, frozen=True):
    """Allocate requests in order, after claiming them if `claim`. With `stop_on_error` none is tried after a refusal.

    `uses[i]` are the imports, in order, that context i may continue its prefix with. `handed`: they are running
    requests of another replica, see ReplicaCore.receive(). `clients` and `generations` are those of the claims that are
    to be made, or are there: one for each context, or one for all.
    """

    contexts: Contexts
    claim: bool = False
    imports: list[ImportHead] = []
    uses: dict[int, list[int]] = {}
    stop_on_error: bool = False
    handed: bool = False
    clients: list[str] = []
    generations: list[int] = []


class Lookup(_Message, frozen=True):
    """How many leading pages of each context are cached, here and in tiers, and how many could be reused.

    With `introduce` the replica says who and where it is, too.
    """

    views: list[ContextView]
    introduce: bool = False


class Export(_Message, frozen=True):
    """Pin cached pages start .. stop until Acknowledge, and make them ready for replica `to` on that kind of line."""

    view: ContextView
    start: int
    stop: int
    line: str = OBJECT_STORE
    to: int = -1
    to_epoch: int = 0


class Acknowledge(_Message, frozen=True):
    export_ids: list[int]


class DropLines(_Message, frozen=True):
    """These replicas are gone or replaced: close what is open to them."""

    replicas: list[int]


class GetPrefixes(_Message, frozen=True):
    """What is cached, last released first; see rayk.kvcache.evacuation.prefixes()."""

    skip: int
    count: int
    size: int


class Keep(_Message, frozen=True):
    """Cache the prefixes of these contexts, in order, as far as their pages are here or among the imports that `uses`
    names as in Admit; see rayk.kvcache.evacuation.keep()."""

    views: list[ContextView]
    imports: list[ImportHead] = []
    uses: dict[int, list[int]] = {}


class RunTick(_Message, frozen=True):
    """One iteration; the lists index `views`. `fn` is a pickled forward, b'' for none. `generations` are those of the
    claims to be released."""

    views: list[ContextView]
    step: list[int] = []
    release: list[str] = []
    alloc: list[int] = []
    execute: list[int] = []
    fn: bytes = b""
    generations: list[int] = []


class Inputs(_Message, frozen=True):
    views: list[ContextView]
    max_cache_length: int | None = None
    characteristics: tuple[int, int, int] | None = None


class Execute(_Message, frozen=True):
    views: list[ContextView]
    fn: bytes


class Step(_Message, frozen=True):
    views: list[ContextView]


class Blocks(_Message, frozen=True):
    """Page ids of a request, and whether it is claimed."""

    request_id: str


class GetUsage(_Message, frozen=True):
    pass


class GetCacheDelta(_Message, frozen=True):
    """For the news that come with the answer."""


class UsedFraction(_Message, frozen=True):
    view: ContextView


class GetMetrics(_Message, frozen=True):
    pass


class ResetMetrics(_Message, frozen=True):
    pass


class ResetPrefixCache(_Message, frozen=True):
    """See ReplicaCore.reset_prefix_cache(), and join_after_reset() for one that `joins`."""

    token: bytes | None = None
    joins: bool = False


class ReadPages(_Message, frozen=True):
    page_ids: list[int]


class CheckIntegrity(_Message, frozen=True):
    pass


class GetTiers(_Message, frozen=True):
    """Occupancy and health of the node's host and disk tier."""


class PollTransfers(_Message, frozen=True):
    pass


class Drain(_Message, frozen=True):
    """Answer when nothing is on its way to or from a tier."""


class GetContexts(_Message, frozen=True):
    """The contexts of claimed requests, as they were sent last; claims of other generations count as none."""

    request_ids: list[str]
    generations: list[int] = []


class StartCacheEvents(_Message, frozen=True):
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


# -- to the scheduler ---------------------------------------------------------------------------------


class PlaceMany(_Message, frozen=True):
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


class Enter(_Message, frozen=True):
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


class ClaimOne(_Message, frozen=True):
    request_id: str
    replica: int
    dummy: bool = False
    released: dict[str, int] = {}


class HitCountsOf(_Message, frozen=True):
    view: ContextView


class EveryReplica(_Message, frozen=True):
    """The same question or order for all replicas; metrics come back added up, pages held after a reset by replica. See
    SchedulerCore for what becomes of it when some are lost or silent."""

    command: GetMetrics | ResetMetrics | ResetPrefixCache | CheckIntegrity | PollTransfers | Drain


class Connect(_Message, frozen=True):
    """A driver introduces itself; with a lease it must renew, or its requests are released. `owner`: it started the
    cluster, which is its own until it leaves or its lease ends."""

    lease_seconds: float | None = None
    owner: bool = False


class Disconnect(_Message, frozen=True):
    """A driver leaves: what it still has claimed is released."""


class Describe(_Message, frozen=True):
    """What is where; `released` as in PlaceMany."""

    released: dict[str, int] = {}


class Explain(_Message, frozen=True):
    """Why a request went where it went."""

    request_id: str


class Enlist(_Message, frozen=True):
    """Take indices for `count` replicas that the sender is going to start."""

    count: int


class Starting(_Message, frozen=True):
    """The replica has a place, and its process comes up."""

    replica: int


class Join(_Message, frozen=True):
    """The replica has answered and may be given requests; its seat (rayk.actors.launch) travels beside."""

    replica: int
    epoch: int
    pages: int


class GiveUp(_Message, frozen=True):
    """The replica could not be started."""

    replica: int


class DrainReplica(_Message, frozen=True):
    """Give the replica no new requests, and with `handover` move those that it has to others. `released` as in
    PlaceMany."""

    replica: int
    released: dict[str, int] = {}
    handover: bool = False


class ResumeReplica(_Message, frozen=True):
    """Let a draining replica take requests again."""

    replica: int


class RemoveReplica(_Message, frozen=True):
    """Forget a replica on which nothing is placed, or a lost one; the sender ends its process."""

    replica: int


class GetRoster(_Message, frozen=True):
    """For the Cluster (rayk.actors.launch) that comes beside the answer. `gone` did not answer the sender."""

    gone: list[int] = []


class Locate(_Message, frozen=True):
    """Where requests of the sender are now."""

    request_ids: list[str]


SchedulerCommand = (
    PlaceMany
    | Enter
    | ClaimOne
    | HitCountsOf
    | EveryReplica
    | Connect
    | Disconnect
    | Describe
    | Explain
    | Enlist
    | Starting
    | Join
    | GiveUp
    | DrainReplica
    | ResumeReplica
    | RemoveReplica
    | GetRoster
    | Locate
)
READ_ONLY = (
    Lookup,
    GetPrefixes,
    Inputs,
    Blocks,
    GetUsage,
    GetCacheDelta,
    UsedFraction,
    GetMetrics,
    ReadPages,
    CheckIntegrity,
    GetTiers,
    GetContexts,
    GetRoster,
    Locate,
)


NOT_ASKED = -2  # for ReplicaEnvelope.known; -1 knows nothing


class CacheDelta(_Part, frozen=True):
    """What changed in a replica's cache in batches since + 1 .. number, in order; since -1: all that it holds.

    A change is (stored or removed, page keys of 8 bytes). `unfilled` are tokens that the replica still has to prefill
    for what it was given, `free` its free pages.
    """

    number: int
    since: int
    batches: list[list[tuple[bool, bytes]]]
    unfilled: int
    free: int


# -- answers --------------------------------------------------------------------------------------


class Done(_Message, frozen=True):
    pass


class Failure(_Message, frozen=True):
    """An error by name and fields; see failure() and to_error()."""

    kind: str
    fields: list[Any]


class Arrival(_Part, frozen=True):
    """What became of an import: pages copied and the seconds that it took; `trouble` says why its line failed."""

    pages: int
    seconds: float
    trouble: str = ""


class AdmitDone(_Message, frozen=True):
    """What became of each context of an Admit: rows of columns, see rayk.protocol.columns.Outcomes; and of each import.

    `numbers` is int64 [n, 7]: processed, end, cached prefix (-1: None), and tokens reused here, copied in, from the
    host tier and from disk; a row of -1 was refused, or not tried when it has no failure. `seconds` is float64
    [n, 2]: of the claim and of the alloc.
    """

    numbers: bytes
    seconds: bytes
    failures: dict[int, Failure] = {}
    arrivals: list[Arrival] = []


class PlaceDone(_Message, frozen=True):
    """`replicas[i]` is where context i went (-1: nowhere); the rest as in AdmitDone. `generations` are those of the
    claims that were made."""

    replicas: list[int]
    numbers: bytes
    seconds: bytes
    failures: dict[int, Failure] = {}
    generations: list[int] = []


class EnterDone(_Message, frozen=True):
    """What became of the requests in `ids`, offered now or before; the rest as in PlaceDone, with a generation each. Of
    `open` more of the sender's it is not known yet."""

    ids: list[str]
    replicas: list[int]
    numbers: bytes
    seconds: bytes
    failures: dict[int, Failure] = {}
    open: int = 0
    generations: list[int] = []


class Found(_Message, frozen=True):
    """Per context: pages cached, pages that alloc could reuse, and pages in tiers that follow the cached ones.

    `host` and `disk` are empty where there are no tiers. `room`: pages that Keep may take. `station` is the replica as
    an end of lines, if that was asked for, and `epoch` its start.
    """

    resident: list[int]
    reusable: list[int]
    host: list[int] = []
    disk: list[int] = []
    room: int = 0
    epoch: int = 0
    station: Endpoint | None = None


class Exported(_Message, frozen=True):
    """Pinned pages: their hashes, ids (raw int32), and what the line has to be told; until `expires` at most."""

    export_id: int
    start: int
    hashes: list[bytes]
    pages: bytes = b""
    offer: bytes = b""
    expires: float = 0.0


class CachedPrefix(_Part, frozen=True):
    """As rayk.kvcache.evacuation.CachedPrefix."""

    cache_salt: str | None
    adapter: str | None
    tokens: bytes
    fresh: int


class PrefixesDone(_Message, frozen=True):
    """`cached` pages are there in all."""

    prefixes: list[CachedPrefix]
    cached: int


class KeepDone(_Message, frozen=True):
    """Pages that were taken for each context, what became of each import, and the seconds that all of it took."""

    kept: list[int]
    arrivals: list[Arrival]
    seconds: float


class MovedBack(_Message, frozen=True):
    """Nothing was done: loads of these requests failed, and their windows are here now. Send the command again."""

    moved: dict[str, Moved]


class TickDone(_Message, frozen=True):
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


class InputsDone(_Message, frozen=True):
    """Lookup table and cache lengths as raw int32, and the scalars."""

    rows: int
    width: int
    table: bytes
    lengths: bytes
    shape: tuple[int, int, int]


class Value(_Message, frozen=True):
    """A pickled Python value."""

    data: bytes


class BlocksDone(_Message, frozen=True):
    claimed: bool
    page_ids: list[int]
    generation: int = 0
    client: str = ""


class Claimed(_Message, frozen=True):
    """The claim was made, with that number."""

    generation: int


class Released(_Message, frozen=True):
    """The claims that were released by force."""

    generations: list[int]


class UsageDone(_Message, frozen=True):
    total: int
    free: int
    cached: int


class Fraction(_Message, frozen=True):
    value: float


class MetricsDone(_Message, frozen=True):
    metrics: KVCacheMetrics


class ResetDone(_Message, frozen=True):
    """Pages that are still held after a reset: at a replica; by replica index where all were asked."""

    held: int = 0
    by_replica: dict[int, int] = {}


class TiersDone(_Message, frozen=True):
    """Pages; `trouble` is empty while all is well."""

    host_total: int
    host_used: int
    disk_total: int
    disk_used: int
    trouble: str


class Counts(_Message, frozen=True):
    """Leading pages of each replica, and after them, where there are tiers, pages in its host and disk tier."""

    counts: list[int]
    host: list[int] = []
    disk: list[int] = []


class RemoveDone(_Message, frozen=True):
    """See rayk.scheduler.scaling.Removed."""

    cached: int = 0
    known: int = 0
    taken: int = 0


class LineState(_Part, frozen=True):
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


class Description(_Message, frozen=True):
    """What the scheduler knows, by replica: how it stands, its start, requests and tokens that are placed there, tokens
    that wait to be prefilled, tokens that the pages of what runs there hold and that all its pages would. And who
    waits, where there is an admission policy; then `levels` are pages in use or promised. `transport` is the kind of
    line that was asked for, and `removed` what became of the pages of those that were removed."""

    epochs: list[int]
    requests: list[int]
    tokens: list[int]
    clients: int
    states: list[str]
    waiting: list[int]
    held: list[int]
    capacity: list[int]
    transport: str = "auto"
    lines: list[LineState] = []
    admission: AdmissionState | None = None
    levels: list[int] = []
    removed: dict[int, RemoveDone] = {}


class ContextsDone(_Message, frozen=True):
    """Requests with pages as columns, those without, and dummies; what is not claimed is in none of them."""

    contexts: Contexts
    bare: list[str]
    dummies: list[str]


class Missing(_Message, frozen=True):
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


class Unasked(_Message, frozen=True):
    """Done by all replicas but those, which are lost or silent."""

    replicas: list[int]


class Drained(_Message, frozen=True):
    """Requests that are still there, with the reason, and where those went that were moved."""

    left: dict[str, str]
    moved: dict[str, int]


class Enlisted(_Message, frozen=True):
    """The indices that were taken."""

    replicas: list[int]


class Located(_Message, frozen=True):
    """The replica of each request, -1 for those that the sender has no claim of."""

    replicas: list[int]


class Explained(_Message, frozen=True):
    """A choice of the router: `candidates` by cost, each the values of `names`; empty when it does not reckon so."""

    router: str
    replica: int
    tokens: int
    seconds_ago: float
    names: list[str]
    candidates: list[list[float]]


Result = (
    Done
    | Failure
    | AdmitDone
    | PlaceDone
    | EnterDone
    | Found
    | Exported
    | PrefixesDone
    | KeepDone
    | MovedBack
    | TickDone
    | InputsDone
    | Value
    | BlocksDone
    | Claimed
    | Released
    | UsageDone
    | Fraction
    | MetricsDone
    | ResetDone
    | TiersDone
    | Counts
    | Description
    | Explained
    | Enlisted
    | Located
    | ContextsDone
    | Missing
    | Unasked
    | Drained
    | RemoveDone
)


# -- envelopes and codecs -----------------------------------------------------------------------------


class ReplicaEnvelope(_Message, frozen=True):
    """`known`: the sender wants to hear what the replica's cache changed after that batch; see
    rayk.replica.cache_events. `pages`: it wants to hear how many are in use."""

    client: str
    epoch: int
    seq: int
    command: ReplicaCommand
    known: int = NOT_ASKED
    pages: bool = False


class SchedulerEnvelope(_Message, frozen=True):
    client: str
    epoch: int
    seq: int
    command: SchedulerCommand


class Reply(_Message, frozen=True):
    """A replica numbers what it changed so far, and has so many tokens to prefill; `news` is what was asked for, and
    so are the pages in use, after a number that grows with every answer, also of those that take its place.

    A scheduler says in `roster` which version of its roster is the latest.
    """

    epoch: int
    seq: int
    result: Result
    seen: int = 0
    unfilled: int = 0
    news: CacheDelta | None = None
    pages: tuple[int, int] | None = None
    roster: int = 0


Envelope = ReplicaEnvelope | SchedulerEnvelope

_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Envelope | Reply) -> bytes:
    """One message as msgpack. UnsendableError for a value that none can carry, such as a field of a context that was
    set to one after the context was made."""
    try:
        return _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        what = message.command if isinstance(message, Envelope) else message.result
        raise UnsendableError(f"{type(what).__name__} holds what no message can carry: {error}") from None


def decode_envelope(wire: bytes) -> Envelope:
    """MessageError says what is malformed or unknown."""
    envelope: Envelope = _decode(_envelopes, wire, "command")
    return envelope


def decode_reply(wire: bytes) -> Reply:
    """MessageError says what is malformed or unknown."""
    reply: Reply = _decode(_replies, wire, "reply")
    return reply


def _decode(decoder: Any, wire: bytes, what: str) -> Any:
    try:
        return decoder.decode(wire)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(
            f"{len(wire)} bytes are no {what} of this version of rayk: {error}; use the same version everywhere"
        ) from error


def failure(error: RaykError) -> Failure:
    """The error as a message; its arguments are its fields."""
    return Failure(type(error).__name__, list(error.args))


def to_error(message: Failure) -> RaykError:
    """The error that failure() was made from; an unknown kind becomes a MessageError that quotes it."""
    cls = errors.by_name(message.kind)
    if cls is None or len(cls.fields) != len(message.fields):
        return MessageError(f"a replica reported an unknown error {message.kind} {message.fields}")
    return cls(*message.fields)
