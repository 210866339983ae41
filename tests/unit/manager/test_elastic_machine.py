"""Random histories of requests and of replicas that come, drain, go and die, in both runtimes.

After every step the books agree, every request that was not lost by name is on exactly one replica, and what its pages
hold is what its tokens say.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayk import InferenceSession, PagedKVCacheManager, TextContext
from rayk.errors import (
    DrainError,
    InsufficientBlocksError,
    NoReplicaError,
    NotClaimedError,
    ReplicaIndexError,
    ReplicaLostError,
    ReplicaRemovedError,
    ReplicaStateError,
)

from ..actors.fake import FakeRuntime, chain, contents, params, session_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

NAMES = [f"r{i}" for i in range(4)]
PROMPTS = [[1] * 18, [1] * 9 + [2] * 9, [3] * 5, [1] * 4 + [4] * 13]

number = st.integers(0, 5)
OPERATIONS = st.one_of(
    st.tuples(st.just("admit"), st.sampled_from(NAMES), st.sampled_from(range(len(PROMPTS)))),
    st.tuples(st.just("decode"), st.sampled_from(NAMES), st.integers(1, 5)),
    st.tuples(st.just("move"), st.sampled_from(NAMES), st.integers(1, 3)),
    st.tuples(st.just("release"), st.sampled_from(NAMES)),
    st.tuples(st.just("add")),
    st.tuples(st.just("drain"), number),
    st.tuples(st.just("hand_over"), number),
    st.tuples(st.just("resume"), number),
    st.tuples(st.just("remove"), number),
    st.tuples(st.just("retire"), number),
    st.tuples(st.just("kill"), number),
)


class History:
    """One manager and what should be true of it. `live` are requests that were admitted and not released or lost."""

    def __init__(self, manager: PagedKVCacheManager, runtime: FakeRuntime | None) -> None:
        self.manager = manager
        self.runtime = runtime
        self.live: dict[str, TextContext] = {}
        self.dead: set[int] = set()  # replicas that were killed and are still in their place

    def batches(self, ctx: TextContext, replica: int) -> list[list[TextContext]]:
        return [[ctx] if r == replica else [] for r in range(self.manager.num_replicas)]

    def where(self, name: str) -> int | None:
        """Where a live request is; one on a replica that was killed is lost, and that is said."""
        at = self.manager.holder(name)
        if at is None or at in self.dead:
            with pytest.raises((ReplicaLostError, NotClaimedError, ReplicaRemovedError)):
                self.manager.alloc(self.live[name], 0 if at is None else at)
            assert self.dead or self.runtime is not None
            self.live.pop(name)
            return None
        return at

    def admit(self, name: str, prompt: int) -> None:
        if name in self.live:
            return
        ctx = TextContext(name, PROMPTS[prompt], 1000)
        try:
            self.manager.admit([ctx])
        except (InsufficientBlocksError, NoReplicaError, ReplicaLostError):
            return
        self.live[name] = ctx

    def decode(self, name: str, steps: int) -> None:
        if name not in self.live or (at := self.where(name)) is None:
            return
        ctx = self.live[name]
        for _ in range(steps):
            try:
                self.manager.alloc(ctx, at)
            except InsufficientBlocksError:
                return
            batches = self.batches(ctx, at)
            if self.dead:
                with pytest.raises(ReplicaLostError):
                    self.manager.execute(batches, stamp)
                batches = batches[: at + 1]
            else:
                self.manager.execute(batches, stamp)
            length = ctx.tokens.length
            assert contents(self.manager, name, at, length) == chain(ctx.tokens.all.tolist())
            ctx.update(7)
            self.manager.step(batches + [[]] * (2 - len(batches)))

    def release(self, name: str) -> None:
        if name in self.live and (at := self.where(name)) is not None:
            self.manager.release(name, at)
            self.live.pop(name)

    def add(self) -> None:
        if self.manager.num_replicas < 6:
            for r in self.manager.add_replicas():
                self.dead.discard(r)

    def drain(self, replica: int) -> None:
        self.manager.drain_replica(replica)

    def hand_over(self, replica: int) -> None:
        before = {name for name in self.live if self.manager.holder(name) == replica}
        moved = self.manager.drain_replica(replica, 0.0).moved
        assert {name for name in before if name in self.live} == set(moved)
        assert all(self.manager.holder(name) == at != replica for name, at in moved.items())

    def move(self, name: str, steps: int) -> None:
        """A request that runs goes on elsewhere."""
        if name not in self.live:
            self.admit(name, len(self.live) % len(PROMPTS))
        self.decode(name, steps)
        if name in self.live and (at := self.where(name)) is not None:
            with suppress(DrainError):
                self.hand_over(at)
            self.decode(name, steps)
            self.manager.resume_replica(at)

    def resume(self, replica: int) -> None:
        self.manager.resume_replica(replica)

    def remove(self, replica: int) -> None:
        removed = self.manager.remove_replica(replica)
        assert removed.known <= removed.cached <= 14 and removed.taken <= 14 * (self.manager.num_replicas - 1)
        self.dead.discard(replica)

    def retire(self, replica: int) -> None:
        """It goes with nothing left on it but what is cached."""
        for name in [name for name in self.live if self.manager.holder(name) == replica]:
            self.release(name)
        self.remove(replica)

    def kill(self, replica: int) -> None:
        states = self.manager.replica_states()
        if self.runtime is not None and replica < len(states) and states[replica] in ("ready", "draining"):
            self.runtime.kill(f"replica-{replica}")
            self.dead.add(replica)

    def do(self, operation: tuple[Any, ...]) -> None:
        with suppress(DrainError, ReplicaStateError, ReplicaLostError, ReplicaIndexError):
            getattr(self, operation[0])(*operation[1:])
        self.check()

    def check(self) -> None:
        manager, states = self.manager, self.manager.replica_states()
        if not self.dead:
            manager.check_integrity()
            here = [r for r, state in enumerate(states) if state in ("ready", "draining")]
            for name in self.live:
                at = manager.holder(name)
                found = [r for r in here if manager.contains(name, r)]
                assert found == ([] if at is None else [at])
        calls: Any = manager._calls
        scheduler = calls.scheduler if self.runtime is None else self.runtime.actor("scheduler").instance._core
        lifecycle = scheduler.lifecycle
        lifecycle.members.check_integrity()
        router = scheduler.router
        router.index.check_integrity()
        assert router.loads.ready.tolist() == [state == "ready" for state in map(str, lifecycle.members.states)]


@pytest.mark.parametrize("kind", ["inline", "eager", "lazy"])
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(operations=st.lists(OPERATIONS, min_size=8, max_size=40), router=st.sampled_from(["cost", "round-robin"]))
def test_any_history(kind: str, operations: list[tuple[Any, ...]], router: str) -> None:
    runtime = None if kind == "inline" else FakeRuntime(lazy=kind == "lazy")
    with InferenceSession() if runtime is None else session_on(runtime) as session:
        manager = PagedKVCacheManager(
            params(2), session, 14, enable_runtime_checks=True, max_batch_size=8, router=router
        )
        history = History(manager, runtime)
        for operation in operations:
            history.do(operation)
        for r in sorted(history.dead):
            manager.replica_states()
            history.do(("remove", r))
        for name in list(history.live):
            history.release(name)
        for r, state in enumerate(manager.replica_states()):
            if state in ("ready", "draining") and r not in history.dead:
                assert manager.get_num_used_pages(r) == 0
        manager.shutdown()
    if runtime is not None:
        assert runtime.running == [] and runtime.placements == []
