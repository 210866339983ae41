"""Page transfers without replicas: what is planned, what is asked for again, and whom an acknowledgement is for."""

from __future__ import annotations

from typing import Any

import pytest

from rayk import protocol as m
from rayk.errors import LineError, ReplicaLostError
from rayk.params import GROUP, OBJECT_STORE, SHARED_MEMORY
from rayk.scheduler.script import ReplicaCall, ReplicaReply
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import Copies, CopyOrder, PageTransfers
from rayk.transport.choice import Endpoint

VIEW = m.ContextView("copy", 0, bytes(64), 0, 16, origin=m.Origin(17))
REFUSED = m.failure(LineError(SHARED_MEMORY, 1, "no room"))


@pytest.fixture
def transfers() -> PageTransfers:
    links = LinkTable(lambda: 0.0)
    for replica in range(3):
        links.joined(replica, 10 + replica, Endpoint("a", "", [SHARED_MEMORY, GROUP, OBJECT_STORE], 1 << 20))
    return PageTransfers(links, 4)


def orders(*spans: Span) -> list[CopyOrder]:
    return [CopyOrder(7, 1, VIEW, span) for span in spans]


def exported(transfers: PageTransfers, *rounds: list[m.Result]) -> Copies:
    """What comes of orders from replicas 0 and 2, with these results of each round."""
    script = transfers.export(orders(Span(0, 0, 2), Span(2, 2, 4)))
    calls = next(script)
    try:
        for results in rounds:
            assert len(calls) == len(results)
            calls = script.send([ReplicaReply(result) for result in results])
    except StopIteration as end:
        found: Copies = end.value
        return found
    raise AssertionError(calls)


def pinned(number: int, start: int, stop: int) -> m.Exported:
    return m.Exported(number, start, [b"h"] * (stop - start), bytes(4 * (stop - start)), seconds=0.25)


def told(calls: list[ReplicaCall]) -> list[tuple[int, Any]]:
    return [(call.replica, call.command) for call in calls]


def test_a_refused_link_is_followed_by_the_next_best(transfers: PageTransfers) -> None:
    [parts] = exported(transfers, [REFUSED, pinned(5, 2, 4)], [pinned(6, 0, 2)]).values()
    assert [(part.source, part.kind, part.export.export_id) for part in parts] == [
        ((0, 10), GROUP, 6),
        ((2, 12), SHARED_MEMORY, 5),
    ], "in the order of their pages"
    assert transfers.links.kind(0, 1) == GROUP
    imports, uses, data = transfers.import_descriptors([[], parts])
    assert [(d.start, d.line, d.source, d.epoch, d.export_id) for d in imports] == [
        (0, GROUP, 0, 10, 6),
        (2, SHARED_MEMORY, 2, 12, 5),
    ]
    assert uses == {1: [0, 1]} and data == []


def test_what_is_not_there_any_more_is_neither_imported_nor_acknowledged(transfers: PageTransfers) -> None:
    lost = m.failure(ReplicaLostError(2, 12, [], "it died"))
    copies = exported(transfers, [m.Exported(5, 0, []), lost])
    assert copies == {} and list(transfers.acknowledge(copies)) == []


def test_what_links_carried_is_measured_and_those_that_broke_are_closed(transfers: PageTransfers) -> None:
    copies = exported(transfers, [pinned(5, 0, 2), pinned(6, 2, 4)])
    broken = transfers.arrived(copies[7], [m.Arrival(2, 0.75), m.Arrival(0, 0.0, "torn")])
    [good, bad] = transfers.links.table()
    assert (good.source, good.copies, good.bytes, good.failures) == (0, 1, 2 << 20, 0)
    assert (bad.source, bad.copies, bad.trouble) == (2, 0, "torn")
    assert transfers.links.seconds(0, 1, 2) == pytest.approx(1.0, rel=0.1), "with the time that pinning took"
    [calls] = transfers.acknowledge(copies, broken)
    assert told(calls) == [(0, m.Acknowledge([5])), (2, m.Acknowledge([6])), (2, m.DropLines([1]))]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_source_that_is_gone_is_told_nothing_and_its_links_blamed_for_nothing(
    transfers: PageTransfers, replaced: bool
) -> None:
    """The one in its place has exports of the same numbers, which are others' pages."""
    copies = exported(transfers, [pinned(5, 0, 2), pinned(6, 2, 4)])
    transfers.links.left(0)
    if replaced:
        transfers.links.joined(0, 99, Endpoint("a", "", [SHARED_MEMORY], 1 << 20))
    assert transfers.arrived(copies[7], [m.Arrival(0, 0.0, "torn"), m.Arrival(2, 0.5)]) == []
    assert [state.source for state in transfers.links.table()] == [2]
    [calls] = transfers.acknowledge(copies)
    assert told(calls) == [(2, m.Acknowledge([6]))]


def test_without_a_rate_all_is_copied_and_with_one_what_pays(transfers: PageTransfers) -> None:
    assert transfers.plan(1, [4, 0, 9], 2, 8, None) == [Span(0, 2, 4), Span(2, 4, 8)]
    assert transfers.plan(1, [4, 0, 9], 9, 9, None) == []
    assert transfers.plan(1, [4, 0, 9], 2, 8, 1e9) == [], "computing is quicker"
    for _ in range(20):
        transfers.links.carried(0, 1, SHARED_MEMORY, 2, 5.0)
    assert transfers.plan(1, [4, 0, 9], 2, 8, 100.0) == [Span(2, 2, 8)], "over the quicker link"
