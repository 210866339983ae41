"""Random users of one directory against a list: exact LRU, nothing lost, nothing double, whoever dies."""

import hashlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rayk.tiers.directory import FULL, PRESENT, Directory
from rayk.tiers.segment import Segment

SLOTS = 6
numbers = st.integers(0, 15)
runs = st.lists(numbers, min_size=1, max_size=4, unique=True)


def keys(run: list[int]) -> list[bytes]:
    return [hashlib.sha256(b"%d" % n).digest() for n in run]


class DirectoryMachine(RuleBasedStateMachine):
    """`order` has the READY pages, least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.segment = Segment.attach(None, Directory.num_bytes(SLOTS), 1, lambda _: None)
        self.directory = Directory(self.segment, SLOTS)
        self.order: list[int] = []
        self.writing: dict[int, int] = {}  # page -> slot
        self.held: list[tuple[int, int]] = []  # (page, slot)

    def use(self, run: list[int]) -> None:
        for n in reversed(run):
            if n in self.order:
                self.order.remove(n)
                self.order.append(n)

    @rule(run=runs)
    def reserve(self, run: list[int]) -> None:
        got = self.directory.reserve(keys(run))
        present = [n in self.order or n in self.writing for n in run]
        self.use(run)
        for n, slot, there in zip(run, got, present, strict=True):
            if there:
                assert slot == PRESENT
                continue
            free = [p for p in self.order if p not in {h for h, _ in self.held}]
            full = len(self.order) + len(self.writing) == SLOTS
            if full and not free:
                assert slot == FULL
                continue
            assert slot >= 0
            if full:
                self.order.remove(free[0])
            self.writing[n] = slot

    @rule(good=st.booleans())
    def finish(self, good: bool) -> None:
        run = list(self.writing)
        slots = [self.writing.pop(n) for n in run]
        if good:
            self.directory.publish(slots)
            self.order += reversed(run)
        else:
            self.directory.abandon(slots)

    @rule(run=runs)
    def pin(self, run: list[int]) -> None:
        slots = self.directory.pin(keys(run))
        assert [s >= 0 for s in slots] == [n in self.order for n in run]
        self.held += [(n, s) for n, s in zip(run, slots, strict=True) if s >= 0]
        self.use(run)

    @rule()
    def unpin(self) -> None:
        self.directory.unpin([slot for _, slot in self.held])
        # What was held while the tier looked for its next victims is looked at again with the next search.
        self.directory._queue.clear()
        self.held = []

    @rule(run=runs)
    def touch(self, run: list[int]) -> None:
        self.directory.touch(keys(run))
        self.use(run)

    @rule()
    def someone_dies_in_a_change(self) -> None:
        self.segment.words[4] = 1
        self.directory._table[:] = 0
        self.directory._words[9] = 77

    @rule()
    def reset(self) -> None:
        slots = self.directory.seize_all()
        self.directory.abandon(slots)
        kept = {h for h, _ in self.held}
        assert len(slots) == len([n for n in self.order if n not in kept])
        self.order = [n for n in self.order if n in kept]

    @invariant()
    def agrees(self) -> None:
        self.directory.check_integrity("test")
        there = [n for n in range(16) if self.directory.contains(*keys([n]))]
        assert there == sorted(self.order)
        assert self.directory.used == len(self.order) + len(self.writing)

    def teardown(self) -> None:
        self.segment.close()


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=60, stateful_step_count=40)
