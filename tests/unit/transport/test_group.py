"""The line over the network, both ends in this process: what arrives, what does not, and that nobody waits for ever."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from rayk.errors import LineError
from rayk.transport import group
from rayk.transport.choice import Peer
from rayk.transport.group import GroupLine
from rayk.transport.line import PageExportRef

from ...patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .ends import FOREVER, SOURCE, TARGET, blank, buffers, content, exported, ids


@pytest.fixture(params=[2 << 20, 1], ids=["several pages a message", "one page a message"])
def ends(request, monkeypatch):
    monkeypatch.setattr(group, "MESSAGE_BYTES", request.param)
    source, target = buffers(), blank()
    out, into = GroupLine(source.all_bytes), GroupLine(target.all_bytes)
    yield source, target, out, into
    out.close()
    into.close()


def test_pages_arrive_where_they_are_wanted(ends) -> None:
    _, target, out, into = ends
    into.fetch(exported(out, [4, 5, 2, 7], 1), 0, ids([1, 2, 0, 3]))
    assert content(target) == [3, 5, 6, 8, 0, 0, 0, 0, 0]
    into.fetch(exported(out, [4, 5, 6, 7, 0], 2), 1, ids([5, 6, 7]))  # the middle of an export
    assert content(target) == [3, 5, 6, 8, 0, 6, 7, 8, 0]
    into.fetch(exported(out, [0, 1, 2], 3), 2, ids([4]))
    assert content(target)[4] == 3
    assert len(out._out) == len(into._in) == 1


def test_parcels_that_nobody_fetched_are_not_in_the_way(ends) -> None:
    source, target, out, into = ends
    into.fetch(exported(out, [0], 1), 0, ids([0]))
    for export_id in (2, 3, 4):
        exported(out, [1, 2], export_id)
        out.end(export_id)
    for raw in source.all_bytes:
        raw[1:3] = 99  # unpinned, and refilled
    into.fetch(exported(out, [5, 6], 5), 0, ids([1, 2]))
    assert content(target)[:3] == [1, 6, 7]


def test_a_parcel_that_was_taken_back_does_not_arrive(ends, monkeypatch) -> None:
    monkeypatch.setattr(group, "SLOWEST", 1e12)
    source, target, out, into = ends
    into._seconds = 0.2
    into.fetch(exported(out, [0], 1), 0, ids([0]))
    sent = exported(out, [4, 5], 2)
    out.end(2)
    for raw in source.all_bytes:
        raw.fill_(99)
    began = time.monotonic()
    with pytest.raises(LineError):
        into.fetch(sent, 0, ids([1, 2]))
    assert time.monotonic() - began < 5
    assert content(target) == [1] + [0] * 8
    for raw in source.all_bytes:
        raw.fill_(3)
    into._seconds = 5.0
    out.drop(TARGET.replica)  # as it is told when a copy failed
    into.fetch(exported(out, [4, 5], 3), 0, ids([1, 2]))  # over a new line
    assert content(target)[:4] == [1, 3, 3, 0]


def test_both_directions_at_once(ends) -> None:
    """Each end posts before either fetches, as two replicas do that answer one round each."""
    _, target, out, into = ends
    sent = exported(out, [1, 2], 1)
    back = PageExportRef(TARGET, 1, ids([6, 7]), into.offer(SOURCE, 1, ids([6, 7])), FOREVER)
    for raw in target.all_bytes:
        raw[6:8] = 42
    failures = []

    def fetch(line, which, pages) -> None:
        try:
            line.fetch(which, 0, pages)
        except LineError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=fetch, args=(into, sent, ids([0, 1]))),
        threading.Thread(target=fetch, args=(out, back, ids([4, 5]))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert failures == []
    assert content(target)[:2] == [2, 3]
    assert content(ends[0])[4:6] == [42, 42]


def test_a_source_that_is_not_there_is_not_waited_for_long(ends) -> None:
    _, target, out, into = ends
    sent = exported(out, [1], 1)
    out.close()
    into._seconds = 0.2
    began = time.monotonic()
    with pytest.raises(LineError):
        into.fetch(sent, 0, ids([0]))
    assert time.monotonic() - began < 5
    assert content(target) == [0] * 9


def test_a_target_that_never_comes_is_forgotten(ends) -> None:
    _, target, out, into = ends
    out._seconds = 0.2
    exported(out, [1], 1)
    [waiting] = out._out.values()
    until(lambda: waiting.broken, 10)  # its thread has no other sign
    out._seconds = 5.0
    into.fetch(exported(out, [1], 2), 0, ids([0]))
    assert content(target)[0] == 2


def test_a_replica_that_was_replaced_gets_a_line_of_its_own(ends) -> None:
    _, target, out, into = ends
    into.fetch(exported(out, [1], 1), 0, ids([0]))
    [first] = out._out.values()
    offer = out.offer(Peer(1, 999), 2, ids([2]))
    [second] = out._out.values()
    assert first is not second and first.broken
    into.fetch(PageExportRef(SOURCE, 2, ids([2]), offer, FOREVER), 0, ids([1]))
    assert content(target)[:2] == [2, 3]


def test_other_layouts_and_offers_are_refused(ends) -> None:
    _, _, out, _ = ends
    other = GroupLine(blank(heads=2).all_bytes)
    with pytest.raises(LineError, match="buffers of"):
        other.fetch(exported(out, [1], 1), 0, ids([0]))
    with pytest.raises(LineError):
        other.fetch(PageExportRef(SOURCE, 1, ids([1]), b"nonsense", FOREVER), 0, ids([0]))
    with pytest.raises(LineError, match="no port"):
        GroupLine(blank().all_bytes, "192.0.2.1").offer(TARGET, 1, ids([0]))


def test_only_the_address_that_was_given_is_listened_at(ends) -> None:
    _, _, out, _ = ends
    told = group.msgspec.msgpack.decode(exported(out, [1], 1).offer, type=group._Offer)
    assert told.address == "127.0.0.1"
    with socket.socket() as elsewhere:  # the same port of another address of this machine is free
        elsewhere.bind(("127.0.0.2", told.port))
