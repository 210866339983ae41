"""What changed in replicas' caches, as numbered batches: the wire format, and the intake that keeps the index true.

The format is that of vLLM's KV events (vllm/distributed/kv_events.py), so that what consumes those can consume ours:
msgpack of an EventBatch, each event tagged with its class name. vLLM wrote structs as arrays first and as maps later
on; `encode` writes either, `decode` reads both, nested either way. Fields that rayk has no use for are kept.

Batches of one replica are numbered from 0 on within its epoch. Applied out of order they would leave pages in the index
that are gone, so the intake applies a batch only when it is the next one, and otherwise asks for a resync: the
replica's whole content as one batch that starts with AllBlocksCleared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final

import msgspec

from rayk.errors import MessageError
from rayk.scheduler.router.prefix_index import PrefixIndex, Tier, short_keys

Hash = int | bytes

MEDIA: Final[dict[Tier, str]] = {Tier.device: "GPU", Tier.host: "CPU", Tier.disk: "DISK"}
"""What the tiers are called on the wire; no medium means the device's memory."""

_TIERS: Final[dict[str | None, Tier]] = {None: Tier.device, **{name: tier for tier, name in MEDIA.items()}}


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Pages of one sequence that are cached now, in order. `parent_block_hash` is that of the page before the first.

    `token_ids` are the tokens of all the pages; empty where the sender does not tell.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Pages that are not cached any more in that medium."""

    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """Nothing is cached any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True):
    """Events of one replica, in order. `ts` is seconds since the epoch, `data_parallel_rank` the replica's index."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


def stored(
    keys: Sequence[Hash],
    parent: Hash | None,
    page_size: int,
    tier: Tier = Tier.device,
    tokens: Sequence[int] = (),
    adapter: str | None = None,
) -> BlockStored:
    """The event of pages that were cached in `tier` after the page `parent`."""
    return BlockStored(
        block_hashes=list(keys),
        parent_block_hash=parent,
        token_ids=list(tokens),
        block_size=page_size,
        lora_id=None,
        medium=MEDIA[tier],
        lora_name=adapter,
    )


def removed(keys: Sequence[Hash], tier: Tier = Tier.device) -> BlockRemoved:
    """The event of pages that went out of `tier`."""
    return BlockRemoved(block_hashes=list(keys), medium=MEDIA[tier])


class Layout(Enum):
    """How a struct is written: vLLM before and after it moved from arrays to maps."""

    array = "array"
    map = "map"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()
_EVENTS: Final[dict[str, type[Event]]] = {each.__name__: each for each in (BlockStored, BlockRemoved, AllBlocksCleared)}


def encode(batch: EventBatch, layout: Layout = Layout.array) -> bytes:
    """The wire form of a batch; trailing fields that say nothing are left out, as vLLM does."""
    if layout is Layout.map:
        return _encoder.encode(batch)
    return _encoder.encode([batch.ts, [_row(event) for event in batch.events], batch.data_parallel_rank])


def _row(event: Event) -> list[Any]:
    kind = type(event)
    row = [getattr(event, name) for name in kind.__struct_fields__]
    optional = len(kind.__struct_defaults__)
    while optional and row and row[-1] is None:
        row.pop()
        optional -= 1
    return [kind.__name__, *row]


def decode(wire: bytes) -> EventBatch:
    """A batch in either layout, with hashes as numbers or bytes. MessageError for anything else."""
    try:
        raw = _decoder.decode(wire)
        fields = raw if isinstance(raw, dict) else _named(EventBatch.__struct_fields__, raw)
        fields = {**fields, "events": [_event(each) for each in fields["events"]]}
        return msgspec.convert(fields, EventBatch)
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise MessageError(f"not a batch of cache events: {error}") from None


def _event(raw: Any) -> dict[str, Any]:
    """One event as a map with its tag. Older senders leave out what they do not know: then it is None."""
    if not isinstance(raw, dict):
        tag, *rest = raw
        raw = {"type": tag, **_named(_EVENTS[tag].__struct_fields__, rest)}
    kind = _EVENTS[raw["type"]]
    required = kind.__struct_fields__[: len(kind.__struct_fields__) - len(kind.__struct_defaults__)]
    may_miss = {name: None for name in required if name in ("lora_id", "medium", "lora_name")}
    return {**may_miss, **raw}


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, values, strict=False))  # newer senders may have more fields than we know


class Verdict(Enum):
    """What the intake made of a batch."""

    applied = "applied"
    repeated = "repeated"  # it was applied before; nothing was done
    resync = "resync"  # something is missing; nothing was done, and the replica has to send all it has


class Intake:
    """Puts the batches of replicas into an index, each once and in order."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._epoch: dict[int, int] = {}
        self._next: dict[int, int] = {}

    def take(self, replica: int, epoch: int, number: int, events: Sequence[Event]) -> Verdict:
        """Batch `number` of the replica's start `epoch`.

        Batch 0 begins an epoch: what the index had of the replica before is dropped. After a gap, and for an epoch
        whose start was missed, nothing is applied until a batch comes that starts with AllBlocksCleared; old entries
        stay meanwhile, since a stale one costs a miss and none at all costs every hit.
        """
        whole = bool(events) and isinstance(events[0], AllBlocksCleared)
        known = self._epoch.get(replica)
        if known is not None and epoch < known:
            return Verdict.repeated
        if epoch != known:
            if number and not whole:
                return Verdict.resync
            self._index.cleared(replica)
        elif number < self._next[replica]:
            return Verdict.repeated
        elif number > self._next[replica] and not whole:
            return Verdict.resync
        self._epoch[replica], self._next[replica] = epoch, number + 1
        for event in events:
            self._apply(replica, event)
        return Verdict.applied

    def _apply(self, replica: int, event: Event) -> None:
        match event:
            case AllBlocksCleared():
                self._index.cleared(replica)
            case BlockStored(block_hashes=hashes, medium=medium):
                self._change(self._index.stored, replica, hashes, medium)
            case BlockRemoved(block_hashes=hashes, medium=medium):
                self._change(self._index.removed, replica, hashes, medium)

    @staticmethod
    def _change(change: Callable[..., None], replica: int, hashes: Sequence[Hash], medium: str | None) -> None:
        tier = _TIERS.get(medium if medium is None else medium.upper())
        if tier is not None:  # a tier that we know nothing of is no place to route to
            change(replica, short_keys(hashes), tier)
