"""Several drivers at one scheduler with an admission policy: whatever they do, in whatever order their messages are
worked on, every request is settled once, no mark or quota is passed, and nobody is overtaken by more than promised."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayk import TextContext
from rayk import protocol as m
from rayk.errors import OverloadedError
from rayk.protocol.admission import AdmissionPolicy, TenantQuota
from rayk.protocol.columns import PackedContexts
from rayk.protocol.context_sync import ContextSender
from rayk.scheduler.admission.queue import QueueEntry
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaCall, ReplicaReply

PAGE, PAGES, REPLICAS, DRIVERS = 4, 20, 2, 3
WEIGHTS = {"a": 1.0, "b": 2.0, "q": 1.0}
QUOTA = 12
POLICY = AdmissionPolicy(
    max_waiting=12,
    patience=20.0,
    boost=2.0,
    high=0.9,
    low=0.7,
    max_running=6,
    tenants={name: TenantQuota(weight, QUOTA if name == "q" else None) for name, weight in WEIGHTS.items()},
)


def pages_of(tokens: int) -> int:
    return -(-(tokens + 1) // PAGE)


@dataclass
class _OnWay:
    """A message to a replica, and its answer."""

    ask: ReplicaCall
    told: ReplicaReply | None = None


class Cluster(RuleBasedStateMachine):
    """Drivers offer, look, release, leave; scripts go on one round at a time, in any order."""

    @initialize(router=st.sampled_from(["least-loaded", "round-robin", "cost"]))
    def start(self, router: str) -> None:
        self.now = 100.0
        settings = RouterSettings(router, (PAGES,) * REPLICAS, PAGE, caching=False, admission=POLICY)
        self.core = SchedulerCore(list(range(REPLICAS)), settings, False, lambda: self.now)
        assert self.core.controller is not None
        self.controller = self.core.controller
        self.held: list[dict[str, int]] = [{} for _ in range(REPLICAS)]  # pages of each request on each replica
        self.turn = 0
        self.scripts: list[tuple[Any, str, list[_OnWay]]] = []
        self.lanes: list[list[_OnWay]] = [[] for _ in range(REPLICAS)]  # messages to each, which it takes in order
        self.offered: dict[str, tuple[str, str, int, int, float]] = {}  # driver, tenant, pages, priority, when
        self.settled: dict[str, bool] = {}  # whether it was placed
        self.where: dict[str, tuple[str, int]] = {}  # placed and not released: driver, replica
        self.claims: dict[str, int] = {}  # the generation of each that was placed
        self.untold: dict[str, dict[str, int]] = defaultdict(dict)  # released, and the scheduler does not know
        self.log: list[tuple[str, int, str]] = []  # let in, in order
        self.came_at: dict[str, int] = {}  # how long the log was when it came into the queue
        self.gone: set[str] = set()
        self.number = 0
        queue, take, offer = self.controller.queue, self.controller.queue.take, self.controller.queue.offer

        def logged(fits: Any) -> QueueEntry | None:
            ticket = take(fits)
            if ticket is not None:
                self.log.append((ticket.tenant, ticket.pages, ticket.request_id))
            return ticket

        def noted(request_id: str, *traits: Any, **more: Any) -> QueueEntry:
            self.came_at[request_id] = len(self.log)
            return offer(request_id, *traits, **more)

        queue.take, queue.offer = logged, noted  # type: ignore[method-assign]  # to see the order

    # -- messages ----------------------------------------------------------------------------------

    def _answer(self, ask: ReplicaCall) -> m.Result:
        held, result = self.held[ask.replica], m.Done()
        match ask.command:
            case m.Admit(contexts):
                batch = PackedContexts(contexts)
                for request_id, tokens in zip(batch.ids, batch.lengths, strict=True):
                    held[request_id] = pages_of(tokens)
                rows = np.zeros((len(batch.ids), 7), np.int64)
                result = m.AdmitDone(rows.tobytes(), bytes(16 * len(batch.ids)))  # type: ignore[assignment]
            case m.Release(request_ids):
                for request_id in request_ids:
                    held.pop(request_id, None)
            case m.Blocks(request_id):
                return m.BlocksDone(request_id in held, [])
        self.turn += 1
        self.controller.watermarks.report(ask.replica, self.turn, sum(held.values()))
        return result

    def _send(self, driver: str, command: Any) -> None:
        script = self.core.handle(driver, command)
        self._go_on(script, driver, None)

    def _go_on(self, script: Any, driver: str, told: list[ReplicaReply] | None) -> None:
        try:
            sent = [_OnWay(ask) for ask in (next(script) if told is None else script.send(told))]
            for each in sent:
                self.lanes[each.ask.replica].append(each)
            self.scripts.append((script, driver, sent))
        except StopIteration as end:
            if isinstance(end.value, m.EnterDone):
                self._hear(driver, end.value)

    def _hear(self, driver: str, done: m.EnterDone) -> None:
        for at, (request_id, replica) in enumerate(zip(done.ids, done.replicas, strict=True)):
            assert request_id not in self.settled, "each is settled once"
            assert self.offered[request_id][0] == driver, "and told to its own driver"
            placed = at not in done.failures
            self.settled[request_id] = placed
            if placed:
                assert request_id in self.held[replica]
                self.where[request_id] = (driver, replica)
                self.claims[request_id] = done.generations[at]
            else:
                assert done.failures[at].kind == "OverloadedError", done.failures[at]
                assert isinstance(m.to_error(done.failures[at]), OverloadedError)

    def _enter(self, driver: str, ctxs: list[TextContext], **more: Any) -> None:
        released, self.untold[driver] = self.untold[driver], {}
        self._send(driver, m.Enter(ContextSender().pack(ctxs, whole=True), released=released, **more))

    # -- what drivers do -----------------------------------------------------------------------------

    @rule(
        driver=st.integers(0, DRIVERS - 1),
        requests=st.lists(
            st.tuples(
                st.sampled_from(sorted(WEIGHTS)),
                st.integers(1, 40),
                st.integers(0, 2),
                st.sampled_from([None, None, 3.0, 30.0]),
            ),
            min_size=1,
            max_size=6,
        ),
    )
    def offer(self, driver: int, requests: list[tuple[str, int, int, float | None]]) -> None:
        name = f"d{driver}"
        if name in self.gone:
            return
        ctxs = []
        for tenant, tokens, priority, deadline in requests:
            self.number += 1
            request_id = f"r{self.number}"
            self.offered[request_id] = (name, tenant, pages_of(tokens), priority, self.now)
            ctxs.append(TextContext(request_id, [1] * tokens, 99, tenant=tenant, priority=priority, deadline=deadline))
        self._enter(name, ctxs)

    @rule(driver=st.integers(0, DRIVERS - 1), hear=st.booleans())
    def look(self, driver: int, hear: bool) -> None:
        if f"d{driver}" not in self.gone:
            self._enter(f"d{driver}", [], hear=hear)

    @precondition(lambda self: self.scripts)
    @rule(which=st.integers(0, 1000))
    def work(self, which: int) -> None:
        script, driver, sent = self.scripts.pop(which % len(self.scripts))
        for each in sent:
            lane = self.lanes[each.ask.replica]
            while each.told is None:
                first = lane.pop(0)
                first.told = ReplicaReply(self._answer(first.ask))
        self._go_on(script, driver, [each.told for each in sent if each.told is not None])

    @precondition(lambda self: self.where)
    @rule(which=st.integers(0, 1000), told=st.booleans())
    def release(self, which: int, told: bool) -> None:
        request_id = sorted(self.where)[which % len(self.where)]
        driver, replica = self.where.pop(request_id)
        self._answer(ReplicaCall(replica, m.Release([request_id])))
        self.untold[driver][request_id] = self.claims[request_id]
        if told:
            self._enter(driver, [])

    @rule(driver=st.integers(0, DRIVERS - 1), which=st.integers(0, 1000))
    def give_up(self, driver: int, which: int) -> None:
        mine = sorted(i for i, o in self.offered.items() if o[0] == f"d{driver}" and i not in self.settled)
        if mine and f"d{driver}" not in self.gone:
            self._enter(f"d{driver}", [], given_up=[mine[which % len(mine)]])

    @rule(seconds=st.sampled_from([0.01, 0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: not self.gone)
    @rule(driver=st.integers(0, DRIVERS - 1))
    def leave(self, driver: int) -> None:
        name = f"d{driver}"
        self.gone.add(name)
        self.where = {i: (d, r) for i, (d, r) in self.where.items() if d != name}
        self._send(name, m.Disconnect())

    # -- what must be true -----------------------------------------------------------------------------

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "controller"):
            self.controller.check_integrity()

    @invariant()
    def no_mark_is_passed(self) -> None:
        for held in getattr(self, "held", ()):
            assert sum(held.values()) <= POLICY.high * PAGES
            assert len(held) <= (POLICY.max_running or 0)

    @invariant()
    def no_quota_is_passed(self) -> None:
        if hasattr(self, "held"):
            mine = [p for held in self.held for i, p in held.items() if self.offered[i][1] == "q"]
            assert sum(mine) <= QUOTA

    @invariant()
    def the_queue_is_bounded(self) -> None:
        if hasattr(self, "controller"):
            assert len(self.controller.queue) <= POLICY.max_waiting

    def teardown(self) -> None:
        if not hasattr(self, "controller"):
            return
        for _ in range(400):
            while self.scripts:
                self.work(0)
            for request_id in sorted(self.where):
                driver, replica = self.where.pop(request_id)
                self._answer(ReplicaCall(replica, m.Release([request_id])))
                self.untold[driver][request_id] = self.claims[request_id]
            for driver in range(DRIVERS):
                self.look(driver, True)
            if not self.scripts and not self.where and not len(self.controller.queue):
                break
        assert not self.scripts and not len(self.controller.queue), "all came to an end"
        left = [i for i, offer in self.offered.items() if offer[0] not in self.gone and i not in self.settled]
        assert not left, "everybody heard"
        assert not any(self.held), "nothing is left behind"
        assert self.controller.queue.held == 0 and not self.controller._open and not self.controller._fates
        self._check_order()

    def _check_order(self) -> None:
        largest = {t: max((p for name, p, _ in self.log if name == t), default=0) for t in WEIGHTS}
        for at, (tenant, _, request_id) in enumerate(self.log):
            _, _, _, priority, when = self.offered[request_id]
            got: dict[str, int] = defaultdict(int)
            for name, pages, other in self.log[self.came_at[request_id] : at]:
                got[name] += pages
                if name == tenant:
                    _, _, _, above, later = self.offered[other]
                    assert later - when <= POLICY.patience + POLICY.boost * (above - priority)
            for name, weight in WEIGHTS.items():
                if name != tenant and tenant != "q":  # one at its quota waits for itself
                    bound = weight / WEIGHTS[tenant] * (got[tenant] + largest[tenant]) + largest[name]
                    assert got[name] <= bound, (request_id, name, got)


MACHINES = settings.get_profile("rayk-machines")
TestSeveralDrivers = Cluster.TestCase
TestSeveralDrivers.settings = settings(MACHINES, max_examples=2 * MACHINES.max_examples)
