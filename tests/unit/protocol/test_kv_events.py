"""The events' wire form, read and written as vLLM does, and where they are published."""

from typing import Any

import msgspec
import pytest

from rayk.errors import ConfigError, MessageError
from rayk.protocol.kv_events import (
    AllBlocksCleared,
    EventBatch,
    KVEventsConfig,
    decode,
    encode,
    endpoint_of,
    removed,
    stored,
)

LONG = bytes(range(32))
BATCH = EventBatch(
    12.5,
    [stored([5, 2**64 - 1], 4, 16, tokens=range(32), adapter="a"), removed([LONG], "CPU"), AllBlocksCleared()],
    3,
)


# What vLLM's consumers declare, in its older layout (events as arrays) and its newer one (as maps).
class ArrayBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class ArrayStored(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


class ArrayRemoved(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None


class ArrayCleared(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="AllBlocksCleared"):
    pass


class ArrayEvents(ArrayBatch):
    events: list[ArrayStored | ArrayRemoved | ArrayCleared]


class MapStored(msgspec.Struct, omit_defaults=True, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class MapRemoved(msgspec.Struct, omit_defaults=True, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class MapCleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class MapEvents(ArrayBatch):
    events: list[MapStored | MapRemoved | MapCleared]


class AllMaps(msgspec.Struct, omit_defaults=True):  # for a while batches were maps, too
    ts: float
    events: list[MapStored | MapRemoved | MapCleared]
    data_parallel_rank: int | None = None


@pytest.mark.parametrize(("arrays", "kind"), [(True, ArrayEvents), (False, MapEvents)])
def test_consumers_of_vllm_read_what_we_write(arrays: bool, kind: Any) -> None:
    wire = encode(BATCH, arrays)
    assert len(msgspec.msgpack.decode(wire)) == 3  # some count them
    read = msgspec.msgpack.decode(wire, type=kind)
    one, two, three = read.events
    assert (read.ts, read.data_parallel_rank) == (12.5, 3)
    assert one.block_hashes == [5, 2**64 - 1] and one.parent_block_hash == 4 and one.token_ids == list(range(32))
    assert one.block_size == 16 and one.medium == "GPU" and two.medium == "CPU" and two.block_hashes == [LONG]
    assert type(three).__name__.endswith("Cleared")
    assert decode(wire) == BATCH


@pytest.mark.parametrize(
    "raw",
    [
        ArrayEvents(1.0, [ArrayStored([1], None, [], 16, None, None), ArrayRemoved([b"x"], "GPU"), ArrayCleared()]),
        [1.0, [["BlockStored", [1], None, [], 16, None], ["BlockRemoved", [b"x"]], ["AllBlocksCleared"]]],
        MapEvents(1.0, [MapStored([1], None, [], 16, None, None, None), MapRemoved([b"x"], "GPU"), MapCleared()], 2),
        AllMaps(1.0, [MapStored([1], None, [], 16, None, None, None), MapRemoved([b"x"], "GPU"), MapCleared()], 2),
        {"ts": 1, "events": [{"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [],
                              "block_size": 16, "new": 1}, {"type": "BlockRemoved", "block_hashes": [b"x"]},
                             {"type": "AllBlocksCleared"}]},
        [1.0, [{"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [],
                "block_size": 16, "medium": "GPU"}, ["BlockRemoved", [b"x"], "GPU", 0, "newer"],
               ["AllBlocksCleared"]], None, "newer"],
    ],
)  # fmt: skip
def test_what_vllm_wrote_and_writes_is_read(raw: Any) -> None:
    batch = decode(msgspec.msgpack.encode(raw))
    one, two, three = batch.events
    assert (one.block_hashes, one.block_size) == ([1], 16)  # type: ignore[union-attr]
    assert two.block_hashes == [b"x"] and three == AllBlocksCleared()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", *map(msgspec.msgpack.encode, [7, [], {}, [1.0, [["Nonsense"]]], [1.0, [[]]], [1.0, [5]],
     [1.0, [["BlockStored", "x", None, [], 16]]], {"ts": "soon", "events": []}, [1.0, [{"type": "BlockStored"}]]])],
)  # fmt: skip
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(MessageError, match="not a batch of cache events"):
        decode(raw)


def test_what_tells_pages_apart_beside_their_tokens_is_written_down() -> None:
    assert stored([1, 2], None, 16).extra_keys is None
    assert stored([1, 2], None, 16, salt="s").extra_keys == [["s"], None]
    assert stored([1, 2], 7, 16, salt="s").extra_keys is None  # those before have it
    assert stored([1, 2], 7, 16, adapter="a", salt="s").extra_keys == [["a"], ["a"]]
    assert stored([1, 2], None, 16, adapter="a", salt="s").extra_keys == [["a", "s"], ["a"]]


def test_ports_follow_the_replica() -> None:
    assert endpoint_of("tcp://*:5557", 0) == "tcp://*:5557" and endpoint_of("tcp://*:5557", 3) == "tcp://*:5560"
    assert endpoint_of("inproc://x", 2) == "inproc://x_dp2" and endpoint_of("ipc:///tmp/x", 0) == "ipc:///tmp/x"


@pytest.mark.parametrize("name", ["endpoint", "replay_endpoint", "snapshot_endpoint"])
@pytest.mark.parametrize(
    "wrong",
    [
        "tcp://somewhere",
        "tcp://:1",
        "tcp://a:b",
        "tcp://a:0",
        "tcp://a:65536",
        "tcp://a:1/b",
        "a:5557",
        "ipc://",
        "",
        5557,
    ],
)
def test_what_cannot_be_bound_is_no_endpoint(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"kv_events {name} .*no address to bind; write it like tcp://127"):
        KVEventsConfig(**{"endpoint": "tcp://127.0.0.1:5557", name: wrong})


def test_replicas_do_not_take_each_others_ports() -> None:
    right = KVEventsConfig("tcp://*:5557", "tcp://*:5559", "ipc:///tmp/x")
    right.check_replicas(2)
    with pytest.raises(
        ConfigError, match=r"tcp://\*:5559 would be the endpoint of one replica and the replay_endpoint"
    ):
        right.check_replicas(3)
