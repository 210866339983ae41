"""Drivers of a named cluster that come, stay, fall silent and leave. Time is injected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rayk import PagedKVCacheManager, TextContext
from rayk import protocol as m
from rayk.actors import scheduler as scheduler_actor
from rayk.errors import ClosedError
from rayk.manager.lease import LEASE_SECONDS
from rayk.scheduler.leases import TICK_SECONDS

from ..actors.fake import FakeRuntime, manager_on, params, session_on  # noqa: TID252  # tests/ is no package that has an absolute name


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(scheduler_actor, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def first(runtime: FakeRuntime, now: list[float]) -> Iterator[PagedKVCacheManager]:
    """The driver that started the named cluster, with one request on each replica."""
    with manager_on(runtime, name="prod", router="round-robin") as manager:
        manager.admit([TextContext(f"first-{r}", range(6), 100) for r in range(2)])
        yield manager


Attach = Callable[[], PagedKVCacheManager]
SETTINGS: dict[str, Any] = {"enable_runtime_checks": True, "router": "round-robin", "max_batch_size": 8}


@pytest.fixture
def attach(runtime: FakeRuntime, first: PagedKVCacheManager) -> Iterator[Callable[[], PagedKVCacheManager]]:
    """Another driver attaches, and stays until the end of the test."""
    with ExitStack() as stack:
        yield lambda: PagedKVCacheManager(params(), stack.enter_context(session_on(runtime, "prod")), 16, **SETTINGS)


def client_of(manager: PagedKVCacheManager) -> str:
    name: str = manager._calls.client  # type: ignore[attr-defined]
    return name


Pass = Callable[[float], None]


@pytest.fixture
def pass_(runtime: FakeRuntime, now: list[float]) -> Pass:
    """Time goes by, and the scheduler runs all the while."""

    def run(seconds: float) -> None:
        for _ in range(round(seconds / TICK_SECONDS)):
            now[0] += TICK_SECONDS
            runtime.actor("scheduler").instance.tick()

    return run


def held(runtime: FakeRuntime) -> list[list[str]]:
    return [sorted(runtime.actor(f"replica-{r}").core.requests) for r in range(2)]


def test_a_silent_drivers_requests_are_released_though_nobody_says_anything(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    pass_(LEASE_SECONDS + 1)
    assert held(runtime) == [[], []]
    second = attach()
    assert [second.get_num_used_pages(r) for r in range(2)] == [0, 0]
    assert second.admit([TextContext("first-0", range(6), 100)]) == [0], "the id is free again"


@pytest.mark.parametrize("stall", [LEASE_SECONDS + 1, 600.0])
def test_a_scheduler_that_stood_still_hears_drivers_before_it_ends_their_leases(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], pass_: Pass, attach: Attach, stall: float
) -> None:
    second, scheduler = attach(), runtime.actor("scheduler")
    second.admit([TextContext("second", range(6), 100)])
    pass_(LEASE_SECONDS / 3)  # since either was heard of
    now[0] += stall
    scheduler.instance.tick()
    assert held(runtime) == [["first-0", "second"], ["first-1"]]
    pass_(LEASE_SECONDS / 3)
    assert scheduler.call("renew", client_of(first), control=True).value is True
    pass_(LEASE_SECONDS / 2)
    assert held(runtime) == [["first-0"], ["first-1"]], "the second driver died while it stood still"


def test_a_driver_whose_lease_ended_is_told_when_it_renews(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass
) -> None:
    """Its renewing thread may have been stopped with it."""
    renew = lambda: runtime.actor("scheduler").call("renew", client_of(first), control=True).value  # noqa: E731  # short
    assert renew() is True
    pass_(LEASE_SECONDS + 1)
    assert renew() is False


def test_within_its_lease_a_driver_keeps_its_requests(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    pass_(LEASE_SECONDS - 1)
    attach()
    assert held(runtime) == [["first-0"], ["first-1"]]


@pytest.mark.parametrize("how", ["renew", "a call"])
def test_a_driver_that_is_heard_of_keeps_its_lease(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach, how: str
) -> None:
    for _ in range(3):
        pass_(LEASE_SECONDS - 1)
        if how == "renew":
            runtime.actor("scheduler").call("renew", client_of(first), control=True)
        else:
            first.get_metrics_aggregated()
    attach()
    assert held(runtime) == [["first-0"], ["first-1"]]


def test_only_the_silent_drivers_requests_go(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    second = attach()
    second.admit([TextContext("second", range(6), 100)])
    pass_(LEASE_SECONDS - 1)
    second.get_metrics_aggregated()
    pass_(2)
    attach()
    assert held(runtime) == [["second"], []]


def test_a_dead_replica_does_not_keep_a_lease_from_expiring(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    runtime.kill("replica-0")
    pass_(LEASE_SECONDS + 1)
    attach()
    assert held(runtime)[1] == []


def test_a_released_id_that_another_driver_claimed_stays_its_own(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    """A driver tells the scheduler late what it released on a replica: by then the id may belong to another one."""
    second = attach()
    first.release("first-0", 0)
    second.claim("first-0", 0)
    first.claim("other", 1)  # brings the late news
    pass_(LEASE_SECONDS - 1)
    first.get_metrics_aggregated()
    pass_(2)  # the second driver is late, the first is not
    attach()
    assert held(runtime) == [[], ["first-1", "other"]]


def test_what_a_driver_claims_after_its_lease_ran_out_has_a_lease_again(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    """A driver may be stopped for longer than its lease, in a debugger or by a full machine, and go on."""
    pass_(LEASE_SECONDS + 1)
    attach()
    first.claim("late", 0)
    pass_(LEASE_SECONDS + 1)
    attach()
    assert held(runtime) == [[], []]


def test_a_silent_driver_is_noticed_without_a_new_one(
    runtime: FakeRuntime, first: PagedKVCacheManager, pass_: Pass, attach: Attach
) -> None:
    """Drivers that stay attached get a dead one's pages back, too."""
    second = attach()
    pass_(LEASE_SECONDS + 1)
    second.get_metrics_aggregated()
    pass_(LEASE_SECONDS - 1)
    second.claim("second", 1)
    assert held(runtime) == [[], ["second"]]


def test_leaving_releases_at_once(runtime: FakeRuntime, first: PagedKVCacheManager) -> None:
    first._calls.scheduler.ask(m.Disconnect())  # type: ignore[attr-defined]
    assert held(runtime) == [[], []]


def test_closing_a_named_session_releases_its_requests(runtime: FakeRuntime, first: PagedKVCacheManager) -> None:
    """The cluster stays; what this driver had claimed on it does not."""
    with session_on(runtime, "prod") as session:
        second = PagedKVCacheManager(params(), session, 16, **SETTINGS)
        second.claim("second", 1)
    assert held(runtime) == [["first-0"], ["first-1"]]
    assert runtime.running == ["replica-0", "replica-1", "scheduler"]
    with pytest.raises(ClosedError):
        second.claim("more", 1)


def test_closing_a_named_session_ends_its_renewals(runtime: FakeRuntime, first: PagedKVCacheManager) -> None:
    """A thread that went on calling would do so on a Ray that the session disconnected from."""
    with session_on(runtime, "prod") as session:
        second = PagedKVCacheManager(params(), session, 16, **SETTINGS)
        assert not second._calls.lease.ended.is_set()  # type: ignore[attr-defined]
    assert second._calls.lease.ended.is_set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lost", ["scheduler", "replica-1"])
def test_a_named_session_can_be_closed_after_a_loss(
    runtime: FakeRuntime, first: PagedKVCacheManager, lost: str
) -> None:
    with session_on(runtime, "prod") as session:
        second = PagedKVCacheManager(params(), session, 16, **SETTINGS)
        second.claim("second", 0)
        runtime.kill(lost)
    assert held(runtime)[0] == (["first-0"] if lost == "replica-1" else ["first-0", "second"])
