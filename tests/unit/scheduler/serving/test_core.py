"""The scheduler of a Cluster with several drivers: turns, ids, and replicas of which a driver hears nothing."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from rayk.errors import ConfigError, OverloadedError
from rayk.protocol.admission import AdmissionPolicy, TenantQuota
from rayk.protocol.engine import Cancel, Ended, HandOver, Report
from rayk.protocol.engine_reports import MOVED
from rayk.protocol.serving import DRIVER_SHIFT, PlaceRequest, driver_of
from rayk.request_errors import RequestTimeoutError
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.serving.core import ServingCore

ONE, TWO = (driver << DRIVER_SHIFT for driver in (1, 2))


class Served:
    """A core with a clock, what it posted, and where tickets were placed."""

    def __init__(self, replicas: int = 1, limit: int | None = 2, **more: Any) -> None:
        self.now, self.posted = 0.0, list[tuple[int, Any]]()
        settings = RouterSettings("cost", (100,) * replicas, 4, limit=limit, reports_backlog=False, **more)
        self.core = ServingCore(lambda *sent: self.posted.append(sent), settings, lambda: self.now)
        self.placed: list[int] = []
        self.where: dict[int, int] = {}
        self.refused: dict[int, Exception] = {}

    def take(self) -> None:
        placed, refused = self.core.take()
        self.placed += [each.ticket for each in placed]
        self.where |= {each.ticket: each.replica for each in placed}
        self.refused |= {each.ticket: each.error for each in refused}

    def ask(self, driver: int, tickets: range, **more: Any) -> None:
        self.core.place([PlaceRequest(driver + t, f"r{t}", 3, 5, **more) for t in tickets])
        self.take()

    def end(self, *tickets: int, reason: str = "length") -> None:
        for replica in {self.where[ticket] for ticket in tickets}:
            here = [Ended(ticket, reason) for ticket in tickets if self.where[ticket] == replica]
            self.core.on_report(replica, Report(ended=here), [])
        self.take()

    def run(self) -> list[int]:
        """Let one after the other end; the order in which they were placed."""
        for at in count():
            if at >= len(self.placed):
                return self.placed
            self.end(self.placed[at])
        raise AssertionError


def test_drivers_take_turns_and_so_do_their_calls() -> None:
    served = Served()
    served.ask(ONE, range(1, 9), call=1)
    served.ask(ONE, range(9, 12), call=2)
    served.ask(TWO, range(1, 4), call=1)
    order = served.run()[2:]
    assert [driver_of(ticket) for ticket in order[:6]] == [1, 2, 1, 2, 1, 2], "whoever asks more"
    mine = [ticket - ONE for ticket in order if driver_of(ticket) == 1]
    assert mine[:6] == [3, 9, 4, 10, 5, 11] and len(order) == 12


def test_ids_of_two_drivers_are_two() -> None:
    served = Served(limit=None)
    served.ask(ONE, range(1, 2))
    served.ask(TWO, range(1, 2))
    assert served.core.explain("1/r1").replica == served.core.explain("2/r1").replica == 0
    with pytest.raises(ConfigError):
        served.core.explain("r1")
    served.core.drop([ONE + 1])
    assert served.core.ids_on(0) == ["r1"] and served.core.tickets == [TWO + 1]


def test_who_lost_its_place_goes_first_with_another_ticket() -> None:
    served = Served(replicas=2, limit=1)
    served.ask(ONE, range(1, 4))
    lost = served.placed[0]
    served.core.drain(served.where[lost])
    served.core.hand_over(served.where[lost])
    assert served.posted == [(served.where[lost], HandOver(True))]
    served.end(lost, reason=MOVED)
    served.core.place([PlaceRequest(ONE + 9, "r1", 4, 5, again=lost)])
    served.end(served.placed[1])
    assert served.placed[2] == ONE + 9 and lost not in served.core.tickets
    served.core.on_report(served.where[ONE + 9], Report(ended=[Ended(lost, "length")]), [])  # late, of an older attempt
    served.take()
    assert ONE + 9 in served.core.tickets


def test_a_replica_of_which_a_driver_hears_nothing_waits_for_its_next_report() -> None:
    served = Served(replicas=2, limit=None)
    served.core.suspect(0, 1)
    assert [str(state) for state in served.core.members.states] == ["silent", "ready"]
    served.ask(ONE, range(1, 9))
    assert set(served.where.values()) == {1}
    served.core.suspect(0, 7)  # of another start
    served.core.on_report(0, Report(), [])
    served.ask(TWO, range(1, 9))
    assert 0 in served.where.values() and served.core.members.ready == [0, 1]


def test_what_a_driver_asks_for_again_is_ended_where_it_was() -> None:
    """Should the replica run: its pages are for others, and its id may come there again."""
    served = Served(replicas=2, limit=None)
    served.ask(ONE, range(1, 2))
    there = served.where[ONE + 1]
    served.core.suspect(there, 1)
    served.core.place([PlaceRequest(ONE + 2, "r1", 4, 5, again=ONE + 1)])
    served.take()
    assert served.posted == [(there, Cancel([ONE + 1]))] and served.where[ONE + 2] == 1 - there
    served.core.on_report(there, Report(ended=[Ended(ONE + 1, "cancelled")]), [])
    assert served.core.tickets == [ONE + 2]


def test_a_driver_without_tenants_does_not_push_out_another() -> None:
    served = Served(limit=None, admission=AdmissionPolicy(max_running=1, max_waiting=6, patience=600))
    served.ask(ONE, range(1, 20))
    served.ask(TWO, range(1, 3))
    assert all(isinstance(error, OverloadedError) for error in served.refused.values())
    assert all(driver_of(ticket) == 1 for ticket in served.refused), "it is the one that fills the queue"
    assert next(iter(served.refused.values())).request_id.startswith("r")  # type: ignore[attr-defined]  # its own id
    order = [driver_of(ticket) for ticket in served.run()]
    assert order[:4].count(2) == 2 and served.core.admission is not None
    served.core.admission.check_integrity()


def test_a_tenants_quota_holds_over_all_drivers() -> None:
    policy = AdmissionPolicy(max_waiting=50, patience=600, tenants={"small": TenantQuota(max_pages=2)})
    served = Served(limit=None, admission=policy)
    served.ask(ONE, range(1, 6), tenant="small")
    served.ask(TWO, range(1, 6), tenant="small")
    served.ask(TWO, range(6, 11), tenant="other")
    assert len([ticket for ticket in served.placed if ticket - TWO < 6]) == 2
    assert {TWO + t for t in range(6, 11)} <= set(served.placed), "one's quota does not hold up the other"


def test_time_is_up_while_it_waits() -> None:
    served = Served(limit=1)
    served.ask(ONE, range(1, 2))
    served.ask(TWO, range(1, 2), timeout=3.0, left=2.0)
    served.now = 2.5
    served.core.on_report(0, Report(), [])
    served.take()
    error = served.refused[TWO + 1]
    assert isinstance(error, RequestTimeoutError) and error.args == ("r1", 3.0)


def test_what_a_scheduler_before_had_granted_joins() -> None:
    """Its driver began to start it before this one was there; what it could not start it gives up here."""
    served = Served(2)
    core = served.core
    for replica in range(2):
        core.lose(replica, "it died")
    core.give_up([1], "no model")
    core.join(0, 100, 5, None, start=7)
    assert [str(state) for state in core.members.states] == ["ready", "lost"] and core.members.epochs[0] == 7
    core.supervisor.check_integrity()
