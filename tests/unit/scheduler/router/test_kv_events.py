"""The events' wire form, read and written as vLLM does, and the intake that applies each batch once."""

from typing import Any

import msgspec
import pytest

from rayk.errors import MessageError
from rayk.scheduler.router.kv_events import (
    AllBlocksCleared,
    Event,
    EventBatch,
    Intake,
    Layout,
    Verdict,
    decode,
    encode,
    removed,
    stored,
)
from rayk.scheduler.router.prefix_index import Best, PrefixIndex, Tier

LONG = bytes(range(32))
BATCH = EventBatch(
    12.5,
    [stored([5, 2**64 - 1], 4, 16, tokens=range(32), adapter="a"), removed([LONG], Tier.host), AllBlocksCleared()],
    3,
)


# What vLLM's consumers declare, in its older layout (structs as arrays) and its newer one (as maps).
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


class MapEvents(msgspec.Struct, omit_defaults=True):
    ts: float
    events: list[MapStored | MapRemoved | MapCleared]
    data_parallel_rank: int | None = None


@pytest.mark.parametrize(("layout", "kind"), [(Layout.array, ArrayEvents), (Layout.map, MapEvents)])
def test_consumers_of_vllm_read_what_we_write(layout: Layout, kind: Any) -> None:
    wire = encode(BATCH, layout)
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


def test_batches_are_applied_once_and_in_order() -> None:
    index = PrefixIndex(2)
    intake = Intake(index)
    assert intake.take(0, 1, 0, [stored([1, 2, 3], None, 16), stored([1], None, 16, Tier.host)]) is Verdict.applied
    assert intake.take(0, 1, 0, [removed([1])]) is Verdict.repeated
    assert intake.take(0, 1, 2, [removed([3])]) is Verdict.resync  # 1 is missing
    assert intake.take(0, 1, 3, [removed([3])]) is Verdict.resync
    assert index.best([1, 2, 3]) == Best(3, 0)  # old, and better than nothing
    assert intake.take(0, 1, 4, [AllBlocksCleared(), stored([1, 2], None, 16)]) is Verdict.applied
    assert index.best([1, 2, 3]) == Best(2, 0) and index.pages(0, Tier.host) == 0
    assert intake.take(0, 1, 5, [removed([2])]) is Verdict.applied
    assert intake.take(1, 9, 1, [stored([1, 2], None, 16)]) is Verdict.resync  # its start was missed
    assert index.best([1, 2, 3]) == Best(1, 0)


def test_a_new_epoch_starts_from_nothing() -> None:
    index = PrefixIndex(1)
    intake = Intake(index)
    intake.take(0, 1, 0, [stored([1, 2, 3], None, 16)])
    assert intake.take(0, 2, 1, [stored([1, 2], None, 16)]) is Verdict.resync
    assert intake.take(0, 2, 0, []) is Verdict.applied
    assert index.best([1]) == Best(0, -1)
    assert intake.take(0, 1, 1, [stored([1], None, 16)]) is Verdict.repeated  # late, of the replica before
    assert intake.take(0, 3, 7, [AllBlocksCleared(), stored([1], None, 16)]) is Verdict.applied
    assert index.best([1]) == Best(1, 0)
    index.check_integrity()


@pytest.mark.parametrize(
    "make", [lambda n: n, lambda n: n.to_bytes(8, "little"), lambda n: n.to_bytes(8, "little") + LONG]
)
def test_hashes_may_be_of_any_kind(make: Any) -> None:
    index = PrefixIndex(1)
    events: list[Event] = [
        stored([make(2**60 + i) for i in range(5)], None, 16),
        removed([make(2**60 + 4)]),
        stored([make(1)], None, 16, Tier.disk),
    ]
    events.append(msgspec.structs.replace(events[0], medium="TAPE"))  # type: ignore[type-var]
    wire = encode(EventBatch(0.0, events))
    assert Intake(index).take(0, 0, 0, decode(wire).events) is Verdict.applied
    assert index.best([2**60 + i for i in range(5)]) == Best(4, 0)
    assert index.pages(0, Tier.disk) == 1 and len(index) == 5
