"""The admission queue: its bounds and its order, against arrivals at random and a clock that stands still."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.errors import ConfigError, OverloadedError
from rayk.protocol.admission import AdmissionPolicy, TenantQuota
from rayk.scheduler.admission.queue import AdmissionQueue, QueueEntry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class House(AdmissionQueue):
    """The queue to one place of so many pages."""

    def __init__(self, policy: AdmissionPolicy, pages: int, clock: Clock) -> None:
        super().__init__(policy, clock)
        self.pages = pages

    def fits(self, pages: int) -> bool:
        return self.held + pages <= self.pages

    def come(self, request_id: str, pages: int, *traits: Any, **more: Any) -> QueueEntry:
        return self.offer(request_id, pages, *traits, **more, most=self.pages, room=self.fits(pages))

    def let_in(self) -> QueueEntry | None:
        return self.take(self.fits)


def queue(pages: int = 100, **policy: Any) -> tuple[House, Clock]:
    clock = Clock()
    return House(AdmissionPolicy(**policy), pages, clock), clock


def drain(waiting: House) -> list[str]:
    """Admit one after the other, each leaving before the next."""
    out = []
    while (ticket := waiting.let_in()) is not None:
        out.append(ticket.request_id)
        waiting.left(ticket.request_id)
    return out


def test_what_fits_goes_and_the_rest_waits_for_room() -> None:
    waiting, _ = queue(10)
    for i in range(3):
        waiting.come(f"r{i}", 4)
    assert [t.request_id for t in (waiting.let_in(), waiting.let_in()) if t] == ["r0", "r1"]
    assert waiting.let_in() is None and len(waiting) == 1
    waiting.left("r0")
    ticket = waiting.let_in()
    assert ticket is not None and ticket.request_id == "r2"
    waiting.check_integrity()


def test_nothing_small_overtakes_what_is_first() -> None:
    waiting, _ = queue(10)
    for name, pages in (("a", 6), ("big", 9), ("small", 1)):
        waiting.come(name, pages)
    assert waiting.let_in() is not None and waiting.let_in() is None
    waiting.left("a")
    assert drain(waiting) == ["big", "small"]


def test_too_many_are_turned_away_with_a_time() -> None:
    waiting, clock = queue(10, max_waiting=2)
    waiting.come("running", 10)
    assert waiting.let_in() is not None
    clock.now += 2.0
    waiting.left("running")
    waiting.come("next", 10)
    assert waiting.let_in() is not None
    for i in range(2):
        waiting.come(f"r{i}", 10)
    with pytest.raises(OverloadedError, match="2 requests wait already") as caught:
        waiting.come("late", 10)
    assert caught.value.retry_after == pytest.approx(4.0), "two of 2 s each are before it"
    with pytest.raises(OverloadedError, match="ever"):
        waiting.come("huge", 11)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_or_when_it_shows() -> None:
    waiting, clock = queue(10)
    waiting.come("first", 10)
    waiting.let_in()
    clock.now += 1.0
    waiting.left("first")  # requests take a second, or more with what they may vary
    waiting.come("second", 10)
    waiting.let_in()
    with pytest.raises(OverloadedError, match=r"its deadline is 1\.50 s"):
        waiting.come("hasty", 10, deadline=1.5)
    patient = waiting.come("patient", 10, deadline=8.0)
    clock.now += 7.0
    [(ticket, error)] = waiting.expire()
    assert ticket is patient and isinstance(error, OverloadedError) and len(waiting) == 0
    waiting.come("waits", 10)
    clock.now += 31.0
    assert [t.request_id for t, _ in waiting.expire()] == ["waits"]
    waiting.check_integrity()


def test_priority_is_worth_seconds_not_everything() -> None:
    waiting, clock = queue(10, boost=5.0)
    waiting.come("low", 10)
    clock.now += 4.0
    waiting.come("soon", 10, priority=1)
    clock.now += 2.0
    waiting.come("late", 10, priority=1)
    assert drain(waiting) == ["soon", "low", "late"]


def test_a_quota_holds_its_tenant_and_nobody_else() -> None:
    waiting, _ = queue(100, tenants={"small": TenantQuota(max_pages=10)})
    for i in range(3):
        waiting.come(f"s{i}", 6, "small")
    waiting.come("other", 50, "big")
    admitted = [t.request_id for t in iter(waiting.let_in, None) if t is not None]
    assert admitted == ["s0", "other"]
    waiting.left("s0")
    ticket = waiting.let_in()
    assert ticket is not None and ticket.request_id == "s1"


def test_what_a_replica_refused_is_first_again() -> None:
    waiting, _ = queue(10)
    waiting.come("a", 5)
    waiting.come("b", 5)
    ticket = waiting.let_in()
    assert ticket is not None
    waiting.returned(ticket)
    waiting.check_integrity()
    assert drain(waiting) == ["a", "b"]


def test_a_full_queue_has_room_for_a_tenant_with_a_smaller_part() -> None:
    waiting, _ = queue(10, max_waiting=4, tenants={"gold": TenantQuota(3.0)})
    waiting.come("running", 10)
    waiting.let_in()
    for i in range(4):
        waiting.come(f"f{i}", 2, "flood")
    with pytest.raises(OverloadedError, match="4 requests wait already"):
        waiting.come("f4", 2, "flood")
    waiting.come("p0", 2, "polite")
    [(lost, error)] = waiting.expire()
    assert lost.request_id == "f3" and "its tenant has most" in error.reason and error.retry_after > 0
    waiting.come("p1", 2, "polite")
    assert [t.request_id for t, _ in waiting.expire()] == ["f2"]
    with pytest.raises(OverloadedError):
        waiting.come("p2", 2, "polite")
    for i in range(2):
        waiting.come(f"g{i}", 2, "gold")
    assert len(waiting.expire()) == 2 and len(waiting) == 4
    waiting.check_integrity()


def serve(waiting: House, clock: Clock, seconds: float, count: int, deadline: float | None = None) -> int:
    """Requests one after the other that stay so long; how many were let in."""
    served = 0
    for i in range(count):
        with suppress(OverloadedError):
            waiting.come(f"{clock.now}-{i}", 5, deadline=deadline)
        waiting.expire()
        if (ticket := waiting.let_in()) is not None:
            clock.now += seconds
            waiting.left(ticket.request_id)
            served += 1
        clock.now += 0.01
    return served


def test_what_was_usual_once_keeps_nobody_out_for_ever() -> None:
    waiting, clock = queue(10)
    serve(waiting, clock, 10.0, 20)
    assert serve(waiting, clock, 0.5, 50, deadline=1.0) == 50, "nobody is there: one is let in to see how it goes"


def test_a_deadline_that_is_often_missed_is_given_more_room() -> None:
    waiting, clock = queue(10)
    serve(waiting, clock, 1.0, 30)
    before = waiting.stay.margin
    waiting.come("there", 1)
    waiting.let_in()
    late = waiting.come("late", 4, deadline=5.0)
    assert waiting.let_in() is late
    clock.now += 6.0
    waiting.left("late")
    assert waiting.stay.margin > before


def answer(
    waiting: House, clock: Clock, count: int, output: Callable[[int], int], seconds: Callable[[int], float]
) -> None:
    """Requests one after the other that may generate output(i) tokens and stay seconds(i)."""
    for i in range(count):
        waiting.come(f"{clock.now}-{i}", 5, output=output(i))
        ticket = waiting.let_in()
        assert ticket is not None
        clock.now += seconds(i)
        waiting.left(ticket.request_id)


def test_a_short_answer_may_wait_longer_than_a_long_one() -> None:
    waiting, clock = queue(10)
    answer(waiting, clock, 100, lambda i: 10 + 90 * (i % 2), lambda i: 1.0 + 9.0 * (i % 2))
    assert waiting.stay.expected(10) == pytest.approx(1.0, abs=0.5)
    assert waiting.stay.expected(100) == pytest.approx(10.0, abs=0.5)
    waiting.come("there", 10)
    waiting.let_in()
    waiting.come("short", 5, deadline=6.0, output=10)
    with pytest.raises(OverloadedError, match="its deadline is 6"):
        waiting.come("long", 5, deadline=6.0, output=100)


def test_short_answers_do_not_keep_a_queue_that_no_long_one_can_join() -> None:
    waiting, clock = queue(10)
    answer(waiting, clock, 100, lambda i: 10 + 90 * (i % 2), lambda i: 1.0 + 9.0 * (i % 2))
    waiting.come("there", 10)
    waiting.let_in()
    for i in range(3):
        waiting.come(f"short{i}", 2, "a", deadline=11.0, output=10)
    with pytest.raises(OverloadedError):
        waiting.come("short3", 2, "a", deadline=11.0, output=10)
    waiting.come("short4", 2, "b", deadline=11.0, output=10)  # its own queue is short


def test_lengths_that_say_nothing_change_nothing() -> None:
    waiting, clock = queue(10)
    draw = random.Random(0)
    answer(waiting, clock, 400, lambda i: 1 << 20 if i % 3 else draw.randint(1, 500), lambda i: draw.uniform(1.0, 2.0))
    for output in (1, 500, 1 << 20):
        assert waiting.stay.expected(output) == pytest.approx(1.5, abs=0.25)
    assert waiting.stay.within(10, 1) < 1.5 + 10 * 0.4


def test_the_wait_of_one_with_a_share_is_not_that_of_the_crowd() -> None:
    waiting, clock = queue(10)
    serve(waiting, clock, 1.0, 5)
    waiting.come("running", 10)
    waiting.let_in()
    for i in range(20):
        waiting.come(f"f{i}", 5, "flood")
    crowd, mine = waiting.expected_wait(5, "flood"), waiting.expected_wait(5, "polite")
    assert crowd == pytest.approx(105 / 10, rel=0.01), "ten pages a second"
    assert mine <= 1.1


def test_giving_up() -> None:
    waiting, _ = queue(10)
    a, _b = waiting.come("a", 5), waiting.come("b", 5)
    assert waiting.give_up(a) and not waiting.give_up(a)
    assert drain(waiting) == ["b"]


@pytest.mark.parametrize("wrong", [{"high": 0.5, "low": 0.6}, {"patience": 0.0}, {"max_waiting": -1}, {"high": 1.5}])
def test_policies_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdmissionPolicy(**wrong)


ARRIVALS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 20), st.integers(0, 3), st.floats(0, 3)), min_size=1, max_size=60
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(ARRIVALS)
def test_nobody_of_a_tenant_is_overtaken_from_further_behind_than_promised(arrivals: list[Any]) -> None:
    waiting, clock = queue(20, patience=4.0, boost=2.0, max_waiting=1000)
    tickets: dict[str, tuple[QueueEntry, int]] = {}
    for i, (tenant, pages, priority, later) in enumerate(arrivals):
        clock.now += later
        tickets[f"r{i}"] = (waiting.come(f"r{i}", pages, tenant, priority), priority)
    order = drain(waiting)
    assert sorted(order) == sorted(tickets), "everybody had a turn"
    for at, name in enumerate(order):
        ticket, priority = tickets[name]
        for earlier in order[:at]:
            other, above = tickets[earlier]
            if other.tenant == ticket.tenant:
                assert other.came - ticket.came <= 4.0 + 2.0 * (above - priority)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(1, 10), min_size=20, max_size=80),
    st.lists(st.integers(1, 10), min_size=20, max_size=80),
    st.sampled_from([(1, 1), (1, 3), (2, 5)]),
)
def test_tenants_that_wait_share_by_weight(of_a: list[int], of_b: list[int], weights: tuple[int, int]) -> None:
    quotas = {"a": TenantQuota(weights[0]), "b": TenantQuota(weights[1])}
    waiting, _ = queue(10, tenants=quotas, max_waiting=1000)
    for tenant, sizes in (("a", of_a), ("b", of_b)):
        for i, pages in enumerate(sizes):
            waiting.come(f"{tenant}{i}", pages, tenant)
    got, left = {"a": 0.0, "b": 0.0}, {"a": len(of_a), "b": len(of_b)}
    while left["a"] and left["b"]:
        ticket = waiting.let_in()
        assert ticket is not None
        waiting.left(ticket.request_id)
        got[ticket.tenant] += ticket.pages / quotas[ticket.tenant].weight
        left[ticket.tenant] -= 1
        if left["a"] and left["b"]:
            assert abs(got["a"] - got["b"]) <= 10 / weights[0] + 10 / weights[1]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["offer", "take", "leave", "return", "expire", "wait"]), st.integers(0, 99))))
def test_counts_agree_whatever_happens(steps: list[tuple[str, int]]) -> None:
    waiting, clock = queue(50, high=0.9, low=0.7, max_waiting=8, tenants={"t1": TenantQuota(2.0, 20)})
    admitted: list[QueueEntry] = []
    for number, (step, n) in enumerate(steps):
        if step == "offer":
            with suppress(OverloadedError):
                waiting.come(f"r{number}", 1 + n % 25, f"t{n % 3}", n % 4, None if n % 2 else 5.0)
            assert 0 < waiting.retry_after() <= 60
        elif step == "take" and (ticket := waiting.let_in()) is not None:
            admitted.append(ticket)
        elif step == "leave" and admitted:
            waiting.left(admitted.pop(n % len(admitted)).request_id)
        elif step == "return" and admitted:
            waiting.returned(admitted.pop())
        elif step == "expire":
            waiting.expire()
        elif step == "wait":
            clock.now += n / 10
        waiting.check_integrity()


class Served:
    """A cluster of 64 pages in time that is only counted: requests of 1 to 3 pages stay for a second, more or less."""

    def __init__(self, load: float, seconds: float, deadline: float | None, seed: int = 1) -> None:
        self.waiting, self.clock = queue(64, max_waiting=500, tenants={"gold": TenantQuota(3.0)})
        self.finished: list[float] = []  # seconds from arrival to end, of those that were let in
        self.refused = self.longest = 0
        self.by_tenant = {"gold": 0, "tin": 0}
        self._leave: list[tuple[float, QueueEntry]] = []
        self._draw = random.Random(seed)
        number, end = 0, self.clock.now + seconds
        while self.clock.now < end:
            arrival = self.clock.now + self._draw.expovariate(load * 32)  # 32 a second of 2 pages fill it
            self._until(arrival)
            with suppress(OverloadedError):
                self.refused += 1
                tenant = self._draw.choice(sorted(self.by_tenant))
                self.waiting.come(f"r{number}", self._draw.randint(1, 3), tenant, deadline=deadline)
                self.refused -= 1
            number += 1
            self._let_in()
        self.seconds, self.offered = seconds, number
        self._until(float("inf"))

    def _until(self, when: float) -> None:
        while self._leave and self._leave[0][0] <= when:
            self.clock.now, ticket = heapq.heappop(self._leave)
            self.waiting.left(ticket.request_id)
            self.finished.append(self.clock.now - ticket.came)
            self._let_in()
        if when < float("inf"):
            self.clock.now = when

    def _let_in(self) -> None:
        self.refused += len(self.waiting.expire())
        while (ticket := self.waiting.let_in()) is not None:
            self.by_tenant[ticket.tenant] += ticket.pages
            heapq.heappush(self._leave, (self.clock.now + self._draw.uniform(0.7, 1.3), ticket))
        self.longest = max(self.longest, len(self.waiting))
        self.waiting.check_integrity()


def test_five_times_what_fits_for_a_minute() -> None:
    alone, even = Served(0.1, 60, None), Served(1.0, 60, None)
    deadline = 5 * sorted(alone.finished)[len(alone.finished) // 2]
    over = Served(5.0, 60, deadline)
    assert over.longest <= 500 and over.refused + len(over.finished) == over.offered
    assert sum(seconds <= deadline for seconds in over.finished) >= 0.99 * len(over.finished)
    assert len(over.finished) >= 0.9 * len(even.finished)
    assert over.by_tenant["gold"] == pytest.approx(3 * over.by_tenant["tin"], rel=0.15), "shared by weight"
