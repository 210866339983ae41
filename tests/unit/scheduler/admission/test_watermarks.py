"""The marks of each replica: what is in use, what is promised, and when it is open again."""

from __future__ import annotations

from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.admission.watermarks import Watermarks
from rayk.scheduler.router.replica_loads import ReplicaLoads


def watermarks(replicas: int = 2, pages: int = 100, **policy: float) -> tuple[Watermarks, ReplicaLoads]:
    loads = ReplicaLoads(replicas, capacity=pages * 4)
    return Watermarks(AdmissionPolicy(**{"high": 0.9, "low": 0.5} | policy), loads, 4), loads  # type: ignore[arg-type]


def test_each_replica_has_its_own_mark() -> None:
    marks, _ = watermarks()
    marks.report(0, 1, 85)
    assert marks.open(5).tolist() == [True, True]
    assert marks.open(6).tolist() == [False, True]
    assert marks.fits(90) and not marks.fits(91)
    assert marks.most == 90


def test_above_the_high_mark_a_replica_is_closed_down_to_the_low_one() -> None:
    marks, _ = watermarks()
    marks.report(0, 1, 88)
    assert marks.open(10).tolist() == [False, True]
    for turn, used, open_ in ((2, 80, False), (3, 51, False), (4, 50, True), (5, 80, True)):
        marks.report(0, turn, used)
        assert bool(marks.open(10)[0]) == open_, used


def test_a_large_request_does_not_close_a_replica_that_is_below_its_low_mark() -> None:
    marks, _ = watermarks()
    marks.report(0, 1, 40)
    assert marks.open(60).tolist() == [False, True]
    assert marks.open(10).tolist() == [True, True]


def test_the_latest_report_counts_whoever_brings_it() -> None:
    marks, _ = watermarks()
    marks.reports([7, 0], [85, 0])
    marks.reports([6, 3, 9], [10, 90, 50])
    assert marks.pages_committed == [85, 90]


def test_what_is_promised_counts_until_the_replica_has_answered() -> None:
    marks, _ = watermarks()
    marks.promise(0, 88)
    assert marks.pages_committed == [88, 0] and marks.open(3).tolist() == [False, True]
    marks.report(0, 1, 30)  # the request shares pages with others
    marks.settle_promise(0, 88)
    assert marks.pages_committed == [30, 0] and marks.open(3).tolist() == [True, True]


def test_a_replica_that_is_not_ready_or_full_of_requests_or_of_prefill_is_closed() -> None:
    marks, loads = watermarks(4, max_running=2, max_unfilled=100)
    loads.set_ready(0, False)
    for _ in range(2):
        loads.place(1, 0, 4)
    loads.set_backlog(2, 100)
    assert marks.open(1).tolist() == [False, False, False, True]
    loads.release(1, 4)
    loads.set_backlog(2, 99)
    assert marks.open(1).tolist() == [False, True, True, True]


def test_replicas_come_and_go() -> None:
    marks, loads = watermarks(1, 10)
    assert marks.most == 9
    marks.report(0, 1, 9)
    loads.join(1, 80)
    assert marks.open(5).tolist() == [False, True] and marks.most == 18
    marks.report(1, 1, 14)
    marks.promise(1, 2)
    marks.forget(1)
    loads.set_ready(1, False)
    assert marks.pages_committed == [9, 0] and marks.most == 9
    marks.settle_promise(1, 2)
    assert marks.pages_committed == [9, 0], "an answer that comes after the end"
