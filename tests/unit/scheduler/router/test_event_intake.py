"""The intake of cache events, which applies each batch once and in order."""

from typing import Any

import msgspec
import pytest

from rayk.protocol.kv_events import AllBlocksCleared, Event, EventBatch, decode, encode, removed, stored
from rayk.scheduler.router.event_intake import Intake, Verdict
from rayk.scheduler.router.prefix_index import Best, PrefixIndex, Tier

LONG = bytes(range(32))


def test_batches_are_applied_once_and_in_order() -> None:
    index = PrefixIndex(2)
    intake = Intake(index)
    assert intake.take(0, 1, 0, [stored([1, 2, 3], None, 16), stored([1], None, 16, medium="CPU")]) is Verdict.applied
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
        stored([make(1)], None, 16, medium="DISK"),
    ]
    events.append(msgspec.structs.replace(events[0], medium="TAPE"))  # type: ignore[type-var]
    wire = encode(EventBatch(0.0, events))
    assert Intake(index).take(0, 0, 0, decode(wire).events) is Verdict.applied
    assert index.best([2**60 + i for i in range(5)]) == Best(4, 0)
    assert index.pages(0, Tier.disk) == 1 and len(index) == 5
