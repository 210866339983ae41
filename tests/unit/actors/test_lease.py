"""Drivers of a named cluster that come, stay, fall silent and leave. Time is injected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rayk import PagedKVCacheManager, TextContext
from rayk import messages as m
from rayk.errors import ClosedError
from rayk.scheduler import actor as scheduler_actor
from rayk.scheduler.client import LEASE_SECONDS

from .fake import FakeRuntime, manager_on, params, session_on


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
    name: str = manager._backend.calls.client  # type: ignore[attr-defined]
    return name


def held(runtime: FakeRuntime) -> list[list[str]]:
    return [sorted(runtime.actor(f"replica-{r}").core.requests) for r in range(2)]


def test_a_silent_drivers_requests_are_released_when_the_next_one_comes(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    now[0] += LEASE_SECONDS + 1
    second = attach()
    assert held(runtime) == [[], []]
    assert [second.get_num_used_pages(r) for r in range(2)] == [0, 0]
    assert second.admit([TextContext("first-0", range(6), 100)]) == [0], "the id is free again"


def test_within_its_lease_a_driver_keeps_its_requests(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    now[0] += LEASE_SECONDS - 1
    attach()
    assert held(runtime) == [["first-0"], ["first-1"]]


@pytest.mark.parametrize("how", ["renew", "a call"])
def test_a_driver_that_is_heard_of_keeps_its_lease(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach, how: str
) -> None:
    for _ in range(3):
        now[0] += LEASE_SECONDS - 1
        if how == "renew":
            runtime.actor("scheduler").call("renew", client_of(first), control=True)
        else:
            first.get_metrics_aggregated()
    attach()
    assert held(runtime) == [["first-0"], ["first-1"]]


def test_only_the_silent_drivers_requests_go(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    second = attach()
    second.admit([TextContext("second", range(6), 100)])
    now[0] += LEASE_SECONDS - 1
    second.get_metrics_aggregated()
    now[0] += 2
    attach()
    assert held(runtime) == [["second"], []]


def test_a_dead_replica_does_not_keep_a_lease_from_expiring(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    runtime.kill("replica-0")
    now[0] += LEASE_SECONDS + 1
    attach()
    assert held(runtime)[1] == []


def test_a_released_id_that_another_driver_claimed_stays_its_own(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    """A driver tells the scheduler late what it released on a replica: by then the id may belong to another one."""
    second = attach()
    first.release("first-0", 0)
    second.claim("first-0", 0)
    first.claim("other", 1)  # brings the late news
    now[0] += LEASE_SECONDS - 1
    first.get_metrics_aggregated()
    now[0] += 2  # the second driver is late, the first is not
    attach()
    assert held(runtime) == [[], ["first-1", "other"]]


def test_what_a_driver_claims_after_its_lease_ran_out_has_a_lease_again(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    """A driver may be stopped for longer than its lease, in a debugger or by a full machine, and go on."""
    now[0] += LEASE_SECONDS + 1
    attach()
    first.claim("late", 0)
    now[0] += LEASE_SECONDS + 1
    attach()
    assert held(runtime) == [[], []]


def test_a_silent_driver_is_noticed_without_a_new_one(
    runtime: FakeRuntime, first: PagedKVCacheManager, now: list[float], attach: Attach
) -> None:
    """Drivers that stay attached get a dead one's pages back, too."""
    second = attach()
    now[0] += LEASE_SECONDS + 1
    second.get_metrics_aggregated()
    now[0] += LEASE_SECONDS - 1
    second.claim("second", 1)
    assert held(runtime) == [[], ["second"]]


def test_leaving_releases_at_once(runtime: FakeRuntime, first: PagedKVCacheManager) -> None:
    first._backend.calls.scheduler.ask(m.Disconnect())  # type: ignore[attr-defined]
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
        assert not second._backend._stopped.is_set()  # type: ignore[attr-defined]
    assert second._backend._stopped.is_set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lost", ["scheduler", "replica-1"])
def test_a_named_session_can_be_closed_after_a_loss(
    runtime: FakeRuntime, first: PagedKVCacheManager, lost: str
) -> None:
    with session_on(runtime, "prod") as session:
        second = PagedKVCacheManager(params(), session, 16, **SETTINGS)
        second.claim("second", 0)
        runtime.kill(lost)
    assert held(runtime)[0] == (["first-0"] if lost == "replica-1" else ["first-0", "second"])
