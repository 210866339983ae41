"""The wire format of cache events, which is vLLM's (vllm/distributed/kv_events.py), and where replicas publish them.

A batch is msgpack: an array of its time, its events and the replica's index. An event is a map with the name of its
class under "type"; vLLM wrote events as arrays before, some consumers know only these, and `encode` writes either.
`decode` reads maps and arrays, nested either way, and passes over fields that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from rayk.errors import MessageError
from rayk.params import require, require_at_least

Hash = int | bytes
GPU: Final = "GPU"
"""The medium of pages in the memory of a replica's device, which may be a CPU."""


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Pages of one sequence that are cached now, in order. `parent_block_hash` is that of the page before the first,
    None for the first page of a sequence.

    `token_ids` are the tokens of all the pages; empty where the sender does not tell. `extra_keys` has for each page
    what it is told by beside its tokens: the adapter, and in the first page of a sequence the salt.
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
    cache_salt: str | None = None  # as SGLang has it, for those to whom a key alone says too little; maps only


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Pages that are not cached any more in that medium."""

    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """Nothing is cached any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events of one replica, in order. `ts` is seconds since the epoch, `data_parallel_rank` the replica's index.

    `publisher_id` is another one for each start of the replica; only those that serve snapshots have it.
    """

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None
    publisher_id: bytes | None = None


def stored(
    keys: Sequence[Hash],
    parent: Hash | None,
    page_size: int,
    tokens: Sequence[int] = (),
    adapter: str | None = None,
    salt: str | None = None,
    medium: str = GPU,
) -> BlockStored:
    """The event of pages that were cached after the page `parent`."""
    salted = salt is not None and parent is None
    extra: list[Any] | None = None
    if adapter is not None or salted:
        extra = [None if adapter is None else [adapter]] * len(keys)
        if salted:
            extra[0] = [*(extra[0] or ()), salt]
    return BlockStored(
        block_hashes=list(keys),
        parent_block_hash=parent,
        token_ids=list(tokens),
        block_size=page_size,
        lora_id=None,
        medium=medium,
        lora_name=adapter,
        extra_keys=extra,
        cache_salt=salt,
    )


def removed(keys: Sequence[Hash], medium: str = GPU) -> BlockRemoved:
    """The event of pages that are gone."""
    return BlockRemoved(block_hashes=list(keys), medium=medium)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()
_EVENTS: Final[dict[str, type[Event]]] = {each.__name__: each for each in (BlockStored, BlockRemoved, AllBlocksCleared)}


def encode(batch: EventBatch, arrays: bool = False) -> bytes:
    """The wire form of a batch, with events as maps or as arrays; trailing fields that say nothing are left out."""
    events = [_row(event) for event in batch.events] if arrays else batch.events
    last = () if batch.publisher_id is None else (batch.publisher_id,)
    return _encoder.encode([batch.ts, events, batch.data_parallel_rank, *last])


def _row(event: Event) -> list[Any]:
    kind = type(event)
    row = [getattr(event, name) if name != "cache_salt" else None for name in kind.__struct_fields__]
    optional = len(kind.__struct_defaults__)
    while optional and row and row[-1] is None:
        row.pop()
        optional -= 1
    return [kind.__name__, *row]


def decode(wire: bytes) -> EventBatch:
    """A batch in any layout, with hashes as numbers or bytes. MessageError for anything else."""
    try:
        raw = _decoder.decode(wire)
        fields = raw if isinstance(raw, dict) else _named(EventBatch.__struct_fields__, raw)
        events = [_event(each) for each in fields["events"]]
        return msgspec.convert([fields["ts"], events, fields.get("data_parallel_rank")], EventBatch)
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


_ENDPOINT: Final = re.compile(r"tcp://(?:[^:/\[\]]+|\[[^\]]+\]):(?P<port>\d{1,5})|(?:ipc|inproc)://.+")


@dataclass(frozen=True)
class KVEventsConfig:
    """Where replicas publish what they cache: ZeroMQ endpoints to bind, such as tcp://127.0.0.1:5557 or tcp://*:5557.

    They are those of replica 0, others take as many ports further on as their index says (an ipc or inproc name ends in
    _dp1 and so on). `replay_endpoint` is where subscribers ask for batches that they missed: the last `buffer_steps`
    are kept. `snapshot_endpoint` is where those that come late ask for all that is cached. `arrays`: events as vLLM
    wrote them before they became maps.
    """

    endpoint: str
    replay_endpoint: str | None = None
    snapshot_endpoint: str | None = None
    topic: str = "kv-events"
    buffer_steps: int = 10_000
    arrays: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, buffer_steps=self.buffer_steps)
        for name, endpoint in self._endpoints():
            found = _ENDPOINT.fullmatch(endpoint) if isinstance(endpoint, str) else None
            right = found is not None and (found["port"] is None or 0 < int(found["port"]) < 1 << 16)
            require(right, f"kv_events {name} {endpoint!r} is no address to bind; write it like tcp://127.0.0.1:5557")

    def _endpoints(self) -> list[tuple[str, str]]:
        names = ("endpoint", "replay_endpoint", "snapshot_endpoint")
        return [(name, getattr(self, name)) for name in names if name == "endpoint" or getattr(self, name) is not None]

    def check_replicas(self, replicas: int) -> None:
        """ConfigError when so many replicas would take each other's ports."""
        taken: dict[str, str] = {}
        for name, endpoint in self._endpoints():
            for at in [endpoint_of(endpoint, replica) for replica in range(replicas)]:
                other = taken.setdefault(at, name)
                require(
                    other == name,
                    f"kv_events: {at} would be the {other} of one replica and the {name} of another; "
                    f"{replicas} replicas take that many ports from each endpoint on, so name endpoints further apart",
                )


def endpoint_of(endpoint: str, replica: int) -> str:
    """Where replica `replica` binds when replica 0 binds `endpoint`."""
    if endpoint.startswith("tcp://"):
        host, _, port = endpoint.rpartition(":")
        return f"{host}:{int(port) + replica}"
    return endpoint if not replica else f"{endpoint}_dp{replica}"
