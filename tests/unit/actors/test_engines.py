"""Engines are placed, started, added and ended by the launcher that starts a manager's actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayk.actors.engine import RayReplicas
from rayk.actors.named_engines import NamedReplicas
from rayk.actors.serving_roster import EngineHandle, ServingRoster
from rayk.engine.replicas import ModelSource, ServeSettings
from rayk.engine.tiers import TierConfig
from rayk.errors import CallTimeoutError, PlanError
from rayk.scheduler.router.router import RouterSettings

from ..engine.fake import PageModel  # noqa: TID252  # tests/ is no package that has an absolute name
from .fake import FakeRuntime


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    runtime = FakeRuntime()
    yield runtime
    for actor in runtime.actors:
        if actor.instance is not None:
            actor.instance.close()


SETTINGS: dict[str, Any] = {"replicas": 2, "page_size": 4, "pages": 8, "max_batch_size": 2, "device": "cpu"}


def engines(runtime: FakeRuntime, **changes: Any) -> RayReplicas:
    source = ModelSource(make=lambda device: PageModel(), model_id="fake")
    return RayReplicas(runtime, source, ServeSettings(**SETTINGS | changes)).start()


def groups(runtime: FakeRuntime) -> list[int]:
    """Bundles of each placement group that is held."""
    return [len(placement.node_ids) for placement in runtime.placements]


STAGES = [
    ("place",), ("start", "replica-0"), ("start", "replica-1"), ("construct", "replica-1"), ("run", "replica-1", "open")
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids="-".join)
def test_a_failure_leaves_nothing_behind_and_the_next_try_works(runtime: FakeRuntime, stage: tuple[str, ...]) -> None:
    runtime.fail = lambda event: RuntimeError("injected") if event[: len(stage)] == stage else None
    late = stage[0] in ("construct", "run")
    with pytest.raises(
        PlanError if late else RuntimeError, match="replica 1 could not start: .*inj" if late else "inj"
    ):
        engines(runtime)
    assert runtime.running == [] and runtime.placements == []
    runtime.fail = None
    replicas = engines(runtime)
    assert groups(runtime) == [2] and [facts.node for facts in replicas.facts] == ["host-of-node-a", "host-of-node-b"]
    replicas.close()
    assert runtime.running == [] and runtime.placements == []


def test_an_added_replica_has_a_group_of_its_own_until_it_is_removed(runtime: FakeRuntime) -> None:
    replicas = engines(runtime)
    replicas.add([2, 3], 5.0)
    assert groups(runtime) == [2, 1, 1] and len(replicas.facts) == 4
    replicas.remove(2)
    replicas.remove(0)
    assert groups(runtime) == [2, 1], "the first group has a replica still"
    assert runtime.running == ["replica-1", "replica-3"]
    replicas.remove(1)
    assert groups(runtime) == [1]
    replicas.close()
    assert runtime.running == [] and runtime.placements == []


def test_a_lost_replica_is_replaced_in_its_bundle_or_in_a_new_group(runtime: FakeRuntime) -> None:
    replicas = engines(runtime)
    replicas.add([2], 5.0)
    alone = runtime.placements[1]
    for replica in (1, 2):
        runtime.kill(f"replica-{replica}")
        replicas.drop(replica)
    since = len(runtime.events)
    replicas.add([1, 2], 5.0)
    asked = [event[0] for event in runtime.events[since:] if "place" in event[0]]
    assert asked == ["await_place", "place"] and groups(runtime) == [2, 1]
    assert alone not in runtime.placements, "nobody else used it"
    assert runtime.running == ["replica-0", "replica-1", "replica-2"]
    replicas.close()
    assert runtime.running == [] and runtime.placements == []


@pytest.mark.parametrize("stage", [*STAGES[:2], ("run", "replica-2", "open")], ids="-".join)
def test_a_failed_addition_changes_nothing(runtime: FakeRuntime, stage: tuple[str, ...]) -> None:
    replicas = engines(runtime)
    stage = tuple(part.replace("replica-0", "replica-2") for part in stage)
    runtime.fail = lambda event: RuntimeError("injected") if event[: len(stage)] == stage else None
    with pytest.raises((PlanError, RuntimeError), match="injected"):
        replicas.add([2], 5.0)
    assert runtime.running == ["replica-0", "replica-1"] and groups(runtime) == [2] and len(replicas.facts) == 2
    runtime.fail = None
    replicas.add([2], 5.0)
    assert groups(runtime) == [2, 1]


def test_a_replica_that_never_answers_is_ended(runtime: FakeRuntime) -> None:
    get = runtime.get

    def hanging(ref: Any, target: str, timeout: float) -> Any:
        if target == "replica 1":
            raise CallTimeoutError(target, timeout)
        return get(ref, target, timeout)

    runtime.get = hanging  # type: ignore[method-assign]
    with pytest.raises(CallTimeoutError, match="replica 1"):
        engines(runtime)
    assert runtime.running == [] and runtime.placements == []


def test_nodes_are_measured_once_and_their_replicas_share_a_tier(runtime: FakeRuntime, tmp_path: Path) -> None:
    replicas = engines(runtime, replicas=3, tiers=TierConfig(host_memory="1MiB", disk_dir=tmp_path, disk_memory="1MiB"))
    measured = [event[1] for event in runtime.events if event[0] == "measure"]
    assert measured == [*["node-a", "node-b"], "node-a", *["node-a", "node-b"]], "asked for seeds, given one, measured"
    seeds = [actor.instance._settings.hash_seed for actor in runtime.actors]
    assert len(set(seeds)) == 1 and seeds[0] is not None
    replicas.add([3], 5.0)
    assert len([event for event in runtime.events if event[0] == "measure"]) == len(measured)
    replicas.close()
    assert [event[1] for event in runtime.events if event[0] == "run" and event[2] == "close"] == [
        f"replica-{r}" for r in range(4)
    ]


def test_what_was_started_here_is_no_others_before_it_joins(runtime: FakeRuntime) -> None:
    """Other threads read the roster meanwhile, which names the lost one there, nobody, or another driver's."""

    def driver() -> NamedReplicas:
        source = ModelSource(make=lambda device: PageModel(), model_id="fake")
        return NamedReplicas(runtime, "x/cluster", source, ServeSettings(**SETTINGS | {"shared": True}))

    def roster(*handles: EngineHandle | None) -> ServingRoster:
        routing = RouterSettings("cost", (8, 8), 4)
        return ServingRoster("x/cluster", b"", "a model", routing, False, True, handles)

    first, mine, other = driver(), driver(), driver()
    first.start()
    lost = first.handles[1]
    for each in mine, other:
        each.facts = list(first.facts)
        assert each.follow(roster(first.handles[0], lost)) == [0, 1]
    runtime.kill("replica-1")
    other.add([1], 5.0)
    theirs = other.handles[1]
    mine.add([1], 5.0)
    own = mine.handles[1]
    assert own.actor is not lost.actor and own.bundle.placement == theirs.bundle.placement == lost.bundle.placement
    for there in lost, None, theirs:
        assert mine.follow(roster(first.handles[0], there)) == [] and mine.handles[1] is own
        assert mine._placed[1].actor is own.actor
    mine.remove(1)
    assert own.actor.stopped and not theirs.actor.stopped, "that one came first"  # type: ignore[attr-defined]  # a fake
    assert groups(runtime) == [2], "it is in use"
    assert mine.follow(roster(first.handles[0], theirs)) == [1] and mine.handles[1] is theirs
    other.joined(1)
    assert other.follow(roster(first.handles[0], lost)) == [1], "from then on the roster says who is there"
