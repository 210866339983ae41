"""What is offered to whom, and that nobody's failure keeps a replica from going."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from rayk import TextContext
from rayk import protocol as m
from rayk.errors import LineError, ReplicaLostError
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.context_sync import ContextMirrors
from rayk.replica.page_exchange import PageExchange
from rayk.scheduler.scaling import Removed
from rayk.scheduler.script import ReplicaCall, ReplicaReply
from rayk.scheduler.transfers import evacuation as offering
from rayk.scheduler.transfers.evacuation import Evacuation, SpanAssignment, assign_prefixes
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine
from rayk.transport.line import StoreLine
from rayk.transport.port import PagePort

from ...kvcache.test_page_pins import core, serve  # noqa: TID252  # tests/ is no package that has an absolute name


def prefix(tokens: list[int], salt: str | None = None) -> m.CachedPrefix:
    return m.CachedPrefix(salt, None, np.array(tokens, np.int32).tobytes(), len(tokens) // 2)


def found(room: int, *resident: int) -> m.Found:
    return m.Found([*resident], [], room=room)


def pages(name: int, count: int) -> list[int]:
    return [name] * (2 * count)


# -- who gets what ---------------------------------------------------------------------------------------


def test_a_prefix_goes_where_the_longest_part_is() -> None:
    assert assign_prefixes([prefix(pages(1, 4))], {0: found(9, 0), 1: found(5, 2), 2: found(5, 3)}, 2) == [
        SpanAssignment(0, 2, 3, 4)
    ]


def test_else_where_the_most_room_is() -> None:
    each = [prefix(pages(name, 3)) for name in (1, 2, 3)]
    have = {0: found(5, 0, 0, 0), 1: found(7, 0, 0, 0)}
    assert assign_prefixes(each, have, 2) == [
        SpanAssignment(0, 1, 0, 3),
        SpanAssignment(1, 0, 0, 3),
        SpanAssignment(2, 1, 0, 3),
    ]


def test_whole_prefixes_go_before_what_is_there() -> None:
    """A replica that has a part and no room for the rest does not get a piece of it while another takes all."""
    assert assign_prefixes([prefix(pages(1, 4))], {0: found(1, 2), 1: found(4, 0)}, 2) == [SpanAssignment(0, 1, 0, 4)]


def test_what_fits_nowhere_is_cut_and_the_hottest_comes_first() -> None:
    each = [prefix(pages(1, 5)), prefix(pages(2, 3))]
    assert assign_prefixes(each, {0: found(4, 0, 0), 1: found(1, 0, 0)}, 2) == [
        SpanAssignment(0, 0, 0, 4),
        SpanAssignment(1, 1, 0, 1),
    ]
    assert assign_prefixes(each, {0: found(0, 0, 0), 1: found(0, 4, 0)}, 2) == []


def test_a_shared_part_is_sent_to_a_replica_once() -> None:
    each = [prefix(pages(1, 3) + pages(2, 1)), prefix(pages(1, 3) + pages(3, 2)), prefix(pages(1, 3) + pages(2, 3))]
    assert assign_prefixes(each, {0: found(20, 0, 0, 0), 1: found(20, 0, 0, 0)}, 2) == [
        SpanAssignment(0, 0, 0, 4),
        SpanAssignment(1, 0, 3, 5),
        SpanAssignment(2, 0, 4, 6),
    ]


def test_other_salts_share_nothing() -> None:
    each = [prefix(pages(1, 3)), prefix(pages(1, 3), "s")]
    assert assign_prefixes(each, {0: found(9, 0, 0)}, 2) == [SpanAssignment(0, 0, 0, 3), SpanAssignment(1, 0, 0, 3)]


def test_what_somebody_has_goes_nowhere() -> None:
    assert assign_prefixes([prefix(pages(1, 3))], {0: found(9, 0), 1: found(0, 3)}, 2) == []


# -- the rounds ------------------------------------------------------------------------------------------

Change = Callable[[ReplicaCall], m.Result | None]


class Replicas:
    """Cores that answer by themselves, but for what `change` says."""

    def __init__(self, *sizes: int) -> None:
        self.cores = [core(size, replica=r) for r, size in enumerate(sizes)]
        pools = {Peer(r, 7): each.buffers for r, each in enumerate(self.cores)}
        self.exchanges = [self._exchange(each, pools) for each in self.cores]
        self.links = LinkTable(lambda: self.now)
        self.ready = list(range(len(sizes)))
        self.now = 0.0
        self.asked: list[ReplicaCall] = []

    def _exchange(self, at: ReplicaCore, pools: Any) -> PageExchange:
        lines = [DirectLine(at.buffers, pools), StoreLine(at.buffers)]
        port = PagePort(Peer(at.replica, 7), at.exports, at.params.bytes_per_page, "", lines)
        return PageExchange(at, port, partial(ContextMirrors(at.replica).context, keep=False))

    def go(self, source: int = 0, change: Change = lambda ask: None) -> Removed:
        script = Evacuation(PageTransfers(self.links, 2), lambda: self.ready, lambda: self.now).run(source)
        self.asked = []
        try:
            asks = next(script)
            while True:
                self.asked += asks
                asks = script.send([self.answer(ask, change) for ask in asks])
        except StopIteration as end:
            for each in self.cores:
                each.check_integrity()
            assert not self.cores[source].exports.tips, "everything was unpinned"
            removed: Removed = end.value
            return removed

    def answer(self, ask: ReplicaCall, change: Change) -> ReplicaReply:
        instead = change(ask)
        if instead is not None:
            return ReplicaReply(instead)
        try:
            return ReplicaReply(*self.exchanges[ask.replica].answer(ask.command, ask.attached))  # type: ignore[arg-type]  # those
        except LineError as error:
            return ReplicaReply(m.failure(error))

    def have(self, replica: int, *names: int) -> list[int]:
        """Pages that a replica has of those prefixes."""
        return [self.cores[replica].cached_pages(TextContext("q", [*pages(n, 50)], 999)) for n in names]


def filled(count: int, *sizes: int, length: int = 2) -> Replicas:
    """Prefixes 1 .. count of replica 0, of which the last is the hottest."""
    replicas = Replicas(*sizes)
    for name in range(1, count + 1):
        serve(replicas.cores[0], f"r{name}", [*pages(name, length), 0])
    return replicas


def test_nothing_stays_pinned_for_one_that_is_interrupted() -> None:
    replicas = filled(3, 16, 8)

    def interrupt(ask: ReplicaCall) -> None:
        if isinstance(ask.command, m.Keep):
            raise KeyboardInterrupt

    def play() -> None:
        script = Evacuation(PageTransfers(replicas.links, 2), lambda: replicas.ready, lambda: 0.0).run(0)
        asks = next(script)
        while True:
            try:
                replies = [replicas.answer(ask, interrupt) for ask in asks]
            except KeyboardInterrupt as error:
                assert replicas.cores[0].exports.tips
                asks = script.throw(error)
            else:
                asks = script.send(replies)

    with pytest.raises(KeyboardInterrupt):
        play()
    assert not replicas.cores[0].exports.tips


def test_all_goes_to_those_that_are_ready() -> None:
    replicas = filled(4, 16, 8, 8, 8)
    replicas.ready = [0, 1, 3]
    assert replicas.go() == Removed(8, 0, 8)
    assert [replicas.have(r, 4, 3, 2, 1) for r in (1, 2, 3)] == [[2, 0, 2, 0], [0, 0, 0, 0], [0, 2, 0, 2]]
    assert replicas.go() == Removed(8, 8, 0), "they have it now"


def test_what_others_know_is_counted_once() -> None:
    replicas = Replicas(16, 16)
    for tail in (2, 3):
        serve(replicas.cores[0], f"r{tail}", [*pages(1, 3), *pages(tail, 1), 0])
    serve(replicas.cores[1], "own", [*pages(1, 2), 0])
    assert replicas.go() == Removed(5, 2, 3)


def test_the_hottest_find_room_and_nothing_is_evicted_for_them() -> None:
    replicas = filled(4, 16, 6)
    serve(replicas.cores[1], "own", [*pages(9, 1), 0])
    assert replicas.go() == Removed(8, 0, 5)
    assert replicas.have(1, 1, 2, 3, 4, 9) == [0, 1, 2, 2, 1]
    assert replicas.cores[1].metrics.evicted_blocks == 0


def test_the_hottest_stay_longest_however_many_rounds_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offering, "PREFIXES", 2)
    monkeypatch.setattr(offering, "TOKEN_BYTES", 40)
    monkeypatch.setattr(offering, "ROUND_BYTES", 1)
    replicas = filled(5, 16, 10)
    assert replicas.go() == Removed(10, 0, 10)
    keeps = [ask.command for ask in replicas.asked if isinstance(ask.command, m.Keep)]
    assert [len(each.views) for each in keeps if each.imports] == [1] * 10, "a page at a time"
    target = replicas.cores[1]
    target.claim("eater")
    target.alloc(TextContext("eater", [0] * 12, 99))
    assert replicas.have(1, 1, 2, 3, 4, 5) == [0, 0, 0, 2, 2]


def test_without_room_it_ends_at_once() -> None:
    replicas = filled(3, 16, 2)
    serve(replicas.cores[1], "own", [*pages(9, 1), 0], keep=True)
    assert replicas.go() == Removed(6, 0, 0)
    assert [type(ask.command) for ask in replicas.asked] == [m.GetPrefixes, m.Lookup, m.Lookup]
    replicas.ready = [0]
    assert replicas.go() == Removed() and replicas.asked == []


def test_time_is_up() -> None:
    replicas = filled(3, 16, 8)

    def slow(ask: ReplicaCall) -> None:
        replicas.now += 20.0

    assert replicas.go(change=slow).taken == 0


LOST = m.failure(ReplicaLostError(1, 7, [], "it died"))
BROKEN = m.failure(LineError("shared-memory", 1, "a fault"))


@pytest.mark.parametrize("what", [m.Lookup, m.Keep])
@pytest.mark.parametrize("after", [0, 1])
def test_a_target_that_fails_is_passed_over(what: type, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offering, "PREFIXES", 1)
    replicas = filled(4, 16, 20, 8)
    seen = []

    def fails(ask: ReplicaCall) -> m.Result | None:
        if ask.replica == 1 and isinstance(ask.command, what):
            seen.append(ask)
            return LOST if len(seen) > after else None
        return None

    removed = replicas.go(change=fails)
    lost = 2 if what is m.Keep else 0  # what was on its way when it failed
    assert removed == Removed(8, 0, 8 - lost)
    assert len(seen) == after + 1


@pytest.mark.parametrize("what", [m.GetPrefixes, m.Export, m.Acknowledge])
@pytest.mark.parametrize("after", [0, 1])
def test_a_source_that_fails_ends_it(what: type, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offering, "PREFIXES", 1)
    replicas = filled(4, 16, 20)
    seen = []

    def fails(ask: ReplicaCall) -> m.Result | None:
        if seen or (ask.replica == 0 and isinstance(ask.command, what)):
            seen.append(ask)
        if ask.replica == 0 and len(seen) > after:
            replicas.exchanges[0].answer(m.Acknowledge(list(range(99))))  # it died: its pins are nobody's
            return LOST
        return None

    removed = replicas.go(change=fails)
    assert removed.taken in (0, 2, 4) and replicas.cores[1].usage.cached == removed.taken


@pytest.mark.parametrize("where", ["offer", "fetch"])
def test_a_line_that_breaks_is_replaced(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DirectLine, *given: Any) -> Any:
        raise LineError("shared-memory", 1, "a fault")

    monkeypatch.setattr(DirectLine, where, broken)
    replicas = filled(3, 16, 8)
    assert replicas.go() == Removed(6, 0, 6)
    assert [each.kind for each in replicas.links.table() if each.failures] == ["shared-memory"]
    assert [each.copies for each in replicas.links.table() if each.kind == "object-store"] != [0]


def test_when_no_line_works_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *given: Any) -> Any:
        raise LineError("any", 1, "a fault")

    for line in (DirectLine, StoreLine):
        monkeypatch.setattr(line, "fetch", broken)
    assert filled(3, 16, 8).go() == Removed(6, 0, 0)


def test_what_a_target_cannot_verify_it_does_not_take() -> None:
    replicas = filled(2, 16, 8)

    def forged(ask: ReplicaCall) -> m.Result | None:
        if isinstance(ask.command, m.Export):
            done, _ = replicas.exchanges[0].answer(ask.command)
            assert isinstance(done, m.Exported)
            return m.Exported(done.export_id, done.start, [b"x" * 32 for _ in done.hashes], done.pages, done.offer)
        return None

    assert replicas.go(change=forged) == Removed(4, 0, 0)
