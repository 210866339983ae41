"""A manager on Ray without Ray: the driver, the scheduler actor and the replica actors are the real ones, and at every
message that reaches one of them something may go wrong.

    dies before    its process dies before it has done what the message says
    dies after     .. after that: nobody hears its answer
    twice          the message arrives twice

A scheduler that dies is started again, as Ray does; a replica is replaced at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from rayk import PagedKVCacheManager, TextContext
from rayk.actors import scheduler as scheduler_module
from rayk.actors.interface import ActorAwayError, ActorGoneError
from rayk.actors.scheduler import SchedulerActor
from rayk.errors import NotClaimedError, RaykError, ReplicaLostError
from rayk.manager import cluster_view

from ..unit.actors.fake import FakeActor, FakeRuntime, manager_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

FAULTS = ("dies before", "dies after", "twice")
PAGES = 12


class Interposed:
    """An actor's object, whose messages go by the world."""

    def __init__(self, world: ClaimsWorld, actor: FakeActor, instance: Any) -> None:
        self.world, self.actor, self.inner = world, actor, instance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def handle(self, *given: Any) -> Any:
        return self.world.deliver(self.actor, self.inner.handle, given)

    def handle_with_data(self, *given: Any) -> Any:
        return self.world.deliver(self.actor, self.inner.handle_with_data, given)


class ClaimsWorld:
    """`plan` says at which message what goes wrong; messages count from the first call on."""

    def __init__(self, runtime: FakeRuntime, manager: PagedKVCacheManager, plan: Mapping[int, str]) -> None:
        self.runtime, self.manager, self.plan, self.messages = runtime, manager, plan, 0
        self.told: Counter[str] = Counter()  # how often the loss of a claim was told
        self.claimed: dict[str, int] = {}  # all acknowledged ones
        self.held: dict[str, int] = {}  # acknowledged claims that nobody said to be lost, with their replicas
        for actor in runtime.actors:
            actor.instance = Interposed(self, actor, actor.instance)

    def deliver(self, actor: FakeActor, call: Callable[..., Any], given: Any) -> Any:
        self.messages += 1
        fault = self.plan.get(self.messages)
        if fault == "dies before":
            self._die(actor)
        answer = call(*given)
        if fault == "twice":
            answer = call(*given)
        elif fault == "dies after":
            self._die(actor)
        return answer

    def _die(self, actor: FakeActor) -> None:
        if actor.label != "scheduler":
            actor.dead = "its process died"
            raise ActorGoneError(actor.dead)
        actor.instance = Interposed(self, actor, SchedulerActor(*actor.arguments, runtime=self.runtime))
        raise ActorAwayError("it is started again")

    # -- the driver ----------------------------------------------------------------------------------------------

    def call(self, what: Callable[[], Any]) -> bool:
        """Whether that went well; losses that it tells of are noted."""
        try:
            result = what()
            errors = [each.error for each in result if each.error is not None] if isinstance(result, list) else []
        except RaykError as error:
            errors = [error]
        for error in errors:
            names = error.requests if isinstance(error, ReplicaLostError) else []
            names = [error.request_id] if isinstance(error, NotClaimedError) else names
            self.told.update(names)
            for name in names:
                self.held.pop(name, None)
        return not errors

    def run(self) -> None:
        manager = self.manager
        x, y = TextContext("x", range(6), 100), TextContext("y", range(20, 26), 100)
        if self.call(lambda: manager.claim("x", 0)):
            self.held["x"] = self.claimed["x"] = 0
        self.check()
        if "x" in self.held:
            self.call(lambda: manager.alloc(x, 0))
        self.check()
        if self.call(lambda: manager.try_admit([y], [1])):
            self.held["y"] = self.claimed["y"] = 1
        self.check()
        for _ in range(1):  # each replica alone: what one of them raises keeps nothing from the other
            for ctx, replica in ((x, 0), (y, 1)):
                batch = [[ctx] if r == replica else [] for r in range(2)]
                if ctx.request_id in self.held and self.call(lambda b=batch: self._forward(b)):  # type: ignore[misc]  # mypy does not infer defaults
                    ctx.update(7)
                    self.call(lambda b=batch: manager.step(b))  # type: ignore[misc]  # as above
                self.check()
        for name, replica in (("x", 0), ("y", 1)):
            if name in self.held and self.call(lambda n=name, r=replica: manager.release(n, r)):  # type: ignore[misc]  # as above
                del self.held[name], self.claimed[name]
            self.check()

    def _forward(self, batch: list[list[TextContext]]) -> None:
        for r, ctxs in enumerate(batch):
            for ctx in ctxs:
                self.manager.alloc(ctx, r)
        self.manager.execute(batch, stamp)

    def check(self) -> None:
        """An acknowledged claim is there, unless its replica died."""
        there = {actor.label: actor for actor in self.replicas}
        for name, replica in self.held.items():
            actor = there.get(f"replica-{replica}")
            assert actor is None or name in actor.core.requests, f"{name} is gone, and nobody said so"
        for actor in there.values():
            actor.core.check_integrity()

    @property
    def replicas(self) -> list[FakeActor]:
        return [each for each in self.runtime.actors if each.label != "scheduler" and each.dead is None]

    def end(self) -> None:
        """All is given back; nothing is left anywhere."""
        self.plan = {}
        manager = self.manager
        for name, replica in list(self.held.items()):
            try:
                if not manager.contains(name, replica):
                    self.told[name] += 1
            except ReplicaLostError:
                self.told[name] += 1
        died = {f"replica-{r}" for r in range(2)} - {actor.label for actor in self.replicas}
        there = {name for name, replica in self.claimed.items() if f"replica-{replica}" in died}
        may = {name for name, replica in (("x", 0), ("y", 1)) if f"replica-{replica}" in died}
        assert there <= self.told.keys() <= may, f"told {self.told}, lost {there}"
        for name, replica in (("x", 0), ("y", 1)):
            with suppress(NotClaimedError, ReplicaLostError):
                manager.release(name, replica)
        lost = [r for r, state in enumerate(manager.replica_states()) if state == "lost"]
        if lost:
            assert sorted(manager.add_replicas(len(lost))) == lost
        manager.claim("last", 0)  # what calls that were not heard had placed is given back before
        manager.release("last", 0)
        manager.check_integrity()
        assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0]
        for actor in self.replicas:
            assert not actor.core.requests, f"{actor.label} keeps {list(actor.core.requests)}"
        [scheduler] = [each for each in self.runtime.actors if each.label == "scheduler"]
        counts, tokens = scheduler.instance._core.placer.counts()
        manager.get_num_used_pages(0)
        assert not any(tokens) or not any(counts), (counts, tokens)


@contextmanager
def played(plan: Mapping[int, str]) -> Iterator[ClaimsWorld]:
    """A history with those faults, and its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayk.manager.starter.Starter.keep", lambda self: None)
        patch.setattr(cluster_view, "sleep", lambda seconds: None)
        patch.setattr("rayk.actors.deployment.AWAY_SECONDS", 0.0)
        patch.setattr(scheduler_module.log, "disabled", True)
        with manager_on(FakeRuntime(), 2, PAGES) as manager:
            world = ClaimsWorld(manager._session.ray, manager, plan)  # type: ignore[arg-type]  # it is a fake
            world.run()
            world.end()
            yield world
