"""The sequences of an engine, and where each is: waiting, in its prefill, decoding, or paused while it decoded."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence
from itertools import chain

from rayk.engine.decode_batch import DecodeBatch
from rayk.engine.sequence import SequenceState


class SequenceTable:
    """Sequences in `prefill` (by order), in the decode `batch` and `parked` have pages; those `waiting`, a heap by
    order, have none. `deadlines` is a heap of times and numbers, and may have finished ones."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, SequenceState]] = []
        self.prefill: list[SequenceState] = []
        self.batch = DecodeBatch()
        self.parked: list[SequenceState] = []
        self.deadlines: list[tuple[float, int]] = []
        self._all: dict[int, SequenceState] = {}  # by number
        self._ids: set[str] = set()
        self._paused: set[int] = set()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def numbers(self) -> list[int]:
        """Of all sequences, as they were submitted."""
        return list(self._all)

    @property
    def running(self) -> int:
        """Sequences with pages."""
        return len(self.batch) + len(self.prefill) + len(self.parked)

    @property
    def active(self) -> bool:
        """Whether any of them is not paused."""
        return len(self._all) > len(self._paused) or bool(self.batch)

    @property
    def newest(self) -> SequenceState:
        """Of those with pages, the one that was submitted last."""
        return max(chain(self.batch.sequences, self.prefill, self.parked), key=lambda each: each.order)

    def get(self, number: int) -> SequenceState | None:
        """The request of that number, until it is finished."""
        return self._all.get(number)

    def in_use(self, number: int, request_id: str) -> bool:
        """Whether a request has that number or id."""
        return number in self._all or request_id in self._ids

    def add(self, sequence: SequenceState) -> None:
        """A new request, which waits."""
        self._all[sequence.number] = sequence
        self._ids.add(sequence.request_id)
        self.wait(sequence)
        if sequence.deadline is not None:
            heapq.heappush(self.deadlines, (sequence.deadline, sequence.number))

    def wait(self, sequence: SequenceState) -> None:
        """It waits, in its order."""
        heapq.heappush(self.waiting, (sequence.order, sequence))

    def take_first(self) -> SequenceState:
        """The first of those that wait, which does no more."""
        return heapq.heappop(self.waiting)[1]

    def prefill_next(self, sequence: SequenceState) -> None:
        """It has pages, and its prompt is computed from the next step on."""
        insort(self.prefill, sequence, key=lambda each: each.order)

    def decode_next(self, sequences: Sequence[SequenceState]) -> None:
        """Their prompts are computed."""
        self.prefill = [each for each in self.prefill if each not in sequences]
        self.batch.add(sequences)

    def withdraw(self, sequence: SequenceState) -> bool:
        """Take a sequence from where it is; whether it has pages."""
        for place in (self.prefill, self.parked):
            if sequence in place:
                place.remove(sequence)
                return True
        if sequence in self.batch.sequences:
            self.batch.drop([self.batch.sequences.index(sequence)])
            return True
        self.waiting = [entry for entry in self.waiting if entry[1] is not sequence]
        heapq.heapify(self.waiting)
        return False

    def forget(self, sequence: SequenceState) -> None:
        """It is finished, and was withdrawn."""
        del self._all[sequence.number]
        self._ids.discard(sequence.request_id)
        self._paused.discard(sequence.number)

    def pause(self, number: int) -> None:
        """A request gets no more tokens until resume()."""
        sequence = self._all.get(number)
        if sequence is None or sequence.paused:
            return
        sequence.paused = True
        self._paused.add(number)
        if sequence in self.batch.sequences:
            self.withdraw(sequence)
            self.parked.append(sequence)

    def resume(self, number: int) -> None:
        """Take back pause()."""
        sequence = self._all.get(number)
        if sequence is None or not sequence.paused:
            return
        sequence.paused = False
        self._paused.discard(number)
        if sequence in self.parked:
            self.parked.remove(sequence)
            self.batch.add([sequence])

    def take_late(self, now: float) -> list[SequenceState]:
        """Those whose time is up by now; each is returned once."""
        late = list[SequenceState]()
        while self.deadlines and self.deadlines[0][0] <= now:
            sequence = self._all.get(heapq.heappop(self.deadlines)[1])
            if sequence is not None and sequence.deadline is not None and sequence.deadline <= now:
                late.append(sequence)
        return late
