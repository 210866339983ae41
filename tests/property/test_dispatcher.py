"""Random histories of replicas that come, drain, leave and die: what was streamed never changes, and all of it comes.

The dispatcher, the router and the engines are real; there are no threads, so that each history can be repeated. A
replica's commands lie in its inbox until its next turn, and what it does is reported in one piece, over the wire.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayk.dispatch.dispatcher import Dispatcher
from rayk.dispatch.output import Handle
from rayk.engine.page_sharing import PageSharing
from rayk.errors import DrainError, NoReplicaError, OverloadedError, ReplicaLostError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.engine import (
    Cancel,
    Command,
    HandOver,
    Query,
    Report,
    Submit,
    decode_command,
    decode_report,
    encode,
)
from rayk.protocol.engine_reports import MOVED, Event, Finished
from rayk.sampling import SamplingParams
from rayk.scheduler.membership import State
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.transfers.indexed_copies import CopyPlanner
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine
from rayk.transport.port import PagePort

from ..unit.engine.fake import Bench, PageModel, Shelf, Tokenizer, expected  # noqa: TID252  # tests/ is no package

HEADS = (tuple(range(20)), tuple(range(10)), (1, 2), ())
SEED = bytes(range(32))
PAGES, PAGE = 12, 4  # the longest request needs 47 slots


@cache
def answer(prompt: tuple[int, ...], count: int) -> list[int]:
    return expected(prompt, count)


class Replica:
    """An engine with its boxes; `shelf` is the tier that it shares with all others, if there is one, `pools` the pages
    of all that live."""

    def __init__(self, shelf: Shelf | None, me: Peer, pools: dict[Peer, PageBuffers]) -> None:
        own = None
        if shelf is not None:  # each has device pages of its own, all have one tier
            own = Shelf()
            own.pages = shelf.pages

        def peers(core: ReplicaCore) -> PageSharing:
            pools[me] = core.buffers
            lines = [DirectLine(core.buffers, pools)]
            return PageSharing(core, PagePort(me, core.exports, core.params.bytes_per_page, "", lines))

        more = {"report_pages": True, "hash_seed": SEED, "shelf": own, "peers": peers}
        self.bench = Bench(PAGES, PAGE, rows=3, chunk_size=12, model=PageModel(tokenizer=Tokenizer()), **more)
        self.inbox: list[bytes] = []
        self.letting_go = False

    def turn(self, steps: int) -> Report:
        engine, events = self.bench.engine, list[Event]()
        for wire in self.inbox:
            match decode_command(wire):
                case Submit(asks) if self.letting_go:
                    events += [Finished(ask.number, MOVED) for ask in asks]
                case Submit(asks):
                    for ask in asks:
                        engine.submit(ask.request())
                case Cancel(numbers):
                    for number in numbers:
                        engine.cancel(number)
                case HandOver(on):
                    self.letting_go = on
                    for number in engine.numbers if on else ():
                        engine.hand_over(number)
                case Query() as query:
                    engine.query(query)
        self.inbox.clear()
        for _ in range(steps):
            events += engine.step()
            self.bench.core.check_integrity()
        return decode_report(encode(Report.of(events, engine.steps, used_pages=self.bench.core.usage.used)))


class Clusters(RuleBasedStateMachine):
    @initialize(
        replicas=st.integers(1, 3),
        router=st.sampled_from(["cost", "round-robin"]),
        tiers=st.booleans(),
        policy=st.sampled_from([None, None, AdmissionPolicy(max_running=4), AdmissionPolicy(max_waiting=3)]),
    )
    def start(self, replicas: int, router: str, tiers: bool, policy: AdmissionPolicy | None) -> None:
        self.policy, self.now = policy, 0.0
        limit = None if policy is not None else 4
        self.shelf = Shelf() if tiers else None
        self.pools: dict[Peer, PageBuffers] = {}
        self.starts = 0
        self.replicas: dict[int, Replica] = {}
        settings = RouterSettings(
            router,
            (PAGES,) * replicas,
            PAGE,
            seed=SEED,
            admission=policy,
            limit=limit,
            plans_copies=True,
            reports_backlog=False,
        )
        self.dispatcher = Dispatcher(self.post, settings, 2, lambda: self.now)
        chosen = self.dispatcher.router
        chosen.fetching = CopyPlanner(chosen.index, PageTransfers(LinkTable(lambda: 0.0), PAGE), False)
        for replica in range(replicas):
            self.begin(replica)
            self.dispatcher.meet(replica, *self.end_of(replica))
        self.handles: list[tuple[Handle, tuple[int, ...], int]] = []
        self.seen: list[list[int]] = []
        self.text: list[str] = []
        self.cancelled: set[int] = set()

    def begin(self, replica: int) -> None:
        self.starts += 1
        self.replicas[replica] = Replica(self.shelf, Peer(replica, self.starts), self.pools)

    def end_of(self, replica: int) -> tuple[int, Any]:
        return self.starts, self.replicas[replica].bench.engine.peers.port.endpoint

    def end(self, replica: int) -> None:
        for me in [me for me in self.pools if me.replica == replica]:
            del self.pools[me]

    def post(self, replica: int, command: Command) -> None:
        if replica in self.replicas:  # else it is dead, and nobody knows yet
            self.replicas[replica].inbox.append(encode(command))

    @rule(
        head=st.sampled_from(HEADS),
        tails=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5),
        count=st.integers(1, 16),
    )
    def submit(self, head: tuple[int, ...], tails: list[list[int]], count: int) -> None:
        new = []
        for tail in tails:
            prompt, number = (*head, *tail), len(self.handles)
            sampling = SamplingParams(max_new_tokens=count, seed=1, stop=("never",))
            handle = Handle(number, number, f"r{number}", np.array(prompt, np.int32), sampling, stream_text=True)
            self.handles.append((handle, prompt, count))
            self.seen.append([])
            self.text.append("")
            new.append(handle)
        self.dispatcher.submit(new)

    def draw(self, data: st.DataObject, *wanted: State) -> int | None:
        found = [r for r, each in enumerate(self.dispatcher.states) if each in wanted]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(data=st.data(), steps=st.integers(0, 6))
    def turn(self, data: st.DataObject, steps: int) -> None:
        replica = self.draw(data, State.ready, State.draining)
        if replica is not None:
            self.dispatcher.on_report(replica, self.replicas[replica].turn(steps))

    @rule(data=st.data(), reported=st.booleans(), steps=st.integers(0, 4))
    def die(self, data: st.DataObject, reported: bool, steps: int) -> None:
        """Whatever it did last may never be heard of."""
        replica = self.draw(data, State.ready, State.draining)
        if replica is not None:
            report = self.replicas.pop(replica).turn(steps)
            self.end(replica)
            if reported:
                self.dispatcher.on_report(replica, report)
            self.dispatcher.lose(replica, "it died")

    @rule(data=st.data(), hand_over=st.booleans())
    def drain(self, data: st.DataObject, hand_over: bool) -> None:
        replica = self.draw(data, State.ready, State.draining)
        if replica is not None:
            self.dispatcher.drain(replica)
            if hand_over:
                self.dispatcher.hand_over(replica)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        replica = self.draw(data, State.draining)
        if replica is not None:
            self.dispatcher.resume(replica)

    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        """Its pages go to others while it still has requests, or goes before that is over, or not at all."""
        replica = self.draw(data, State.draining)
        if replica is not None:
            self.dispatcher.offer(replica)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ready = State.ready in self.dispatcher.states  # a Cluster does not let go of the last one
        replica = self.draw(data, State.draining, State.lost) if ready else None
        if replica is not None:
            self.let_go(replica)

    def let_go(self, replica: int) -> None:
        try:
            removed = self.dispatcher.remove(replica, 0, 0)
        except DrainError:
            return
        assert removed.known <= removed.cached <= PAGES and removed.taken <= 3 * PAGES
        gone = self.replicas.pop(replica, None)
        self.end(replica)
        assert gone is None or not gone.bench.engine.stats().running

    @rule(data=st.data(), rounds=st.integers(0, 8))
    def retire(self, data: st.DataObject, rounds: int) -> None:
        """It hands over, its pages are offered for a while, and it goes, if nothing came between."""
        replica = self.draw(data, State.ready, State.draining)
        if replica is None:
            return
        self.dispatcher.drain(replica)
        self.dispatcher.hand_over(replica)
        self.dispatcher.on_report(replica, self.replicas[replica].turn(1))
        self.dispatcher.offer(replica)
        for _ in range(rounds):
            for other in self.dispatcher.live:
                self.dispatcher.on_report(other, self.replicas[other].turn(1))
        if State.ready in self.dispatcher.states:
            self.let_go(replica)

    @precondition(lambda self: len(self.dispatcher.live) < 4)
    @rule(count=st.integers(1, 2), fails=st.booleans())
    def add(self, count: int, fails: bool = False) -> None:
        for replica in self.dispatcher.enlist(count):
            if fails:
                self.dispatcher.give_up([replica], RuntimeError("it did not start"))
                continue
            self.begin(replica)
            self.dispatcher.join(replica, PAGES, *self.end_of(replica))

    @rule()
    def time_passes(self) -> None:
        """So long that nobody waits for a copy any more."""
        self.now += 6

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        handle, _, _ = self.handles[data.draw(st.integers(0, len(self.handles) - 1))]
        if not handle.done:
            self.cancelled.add(handle.number)
        self.dispatcher.cancel(handle)

    @property
    def scripts_run(self) -> bool:
        return bool(self.dispatcher._scripts._running or self.dispatcher.core.scripts._running)

    @invariant()
    def all_agree_on_who_is_there(self) -> None:
        if hasattr(self, "dispatcher"):
            members, router = self.dispatcher.members, self.dispatcher.router
            members.check_integrity()
            assert np.flatnonzero(router.loads.ready).tolist() == members.ready
            placed = {handle.id: handle.replica for handle, _, _ in self.handles if not handle.done}
            counted = {i: each.replica for i, each in router._placed.items()}
            assert counted == {i: replica for i, replica in placed.items() if replica is not None}
            admission = self.dispatcher.core.admission
            if admission is not None:
                admission.check_integrity()
                assert set(admission._promised) <= set(counted)
                waiting = {request.key for request in self.dispatcher.core.waiting.requests}
                assert set(admission._offered) <= waiting and not admission._refused

    @invariant()
    def what_was_streamed_is_the_models(self) -> None:
        for i, (handle, prompt, count) in enumerate(getattr(self, "handles", [])):
            update = handle.take()
            self.seen[i] += update.tokens
            self.text[i] += update.text
            whole = answer(prompt, count)
            assert self.seen[i] == whole[: len(self.seen[i])]
            assert Tokenizer().decode(whole).startswith(self.text[i])

    def teardown(self) -> None:
        if not hasattr(self, "handles"):
            return
        for replica, state in enumerate(self.dispatcher.states):
            if state is State.draining:
                self.dispatcher.resume(replica)
        if not self.dispatcher.live:
            self.add(1)
        for _ in range(400):
            if all(handle.done for handle, _, _ in self.handles) and not self.scripts_run:
                break
            for replica in self.dispatcher.live:
                self.dispatcher.on_report(replica, self.replicas[replica].turn(3))
        self.what_was_streamed_is_the_models()
        for i, (handle, prompt, count) in enumerate(self.handles):
            output: Any = handle.result(0)
            if output.error is None:
                assert output.tokens == self.seen[i] == answer(prompt, count)
                assert output.text == self.text[i] == Tokenizer().decode(output.tokens)
            elif output.finish_reason == "cancelled":
                assert handle.number in self.cancelled
            elif isinstance(output.error, ReplicaLostError):
                assert "it died" in str(output.error)
            else:
                assert self.policy is not None and isinstance(output.error, (OverloadedError, NoReplicaError))
        for replica in self.replicas.values():  # hears what is not wanted any more
            self.dispatcher.on_report(replica.bench.engine.peers.port.me.replica, replica.turn(1))
        for replica in self.replicas.values():
            replica.turn(1)
            assert not replica.bench.core.exports.tips
            assert not replica.bench.core.requests and replica.bench.core.usage.used == 0


TestClusters = Clusters.TestCase
TestClusters.settings = settings.get_profile("rayk-machines")
