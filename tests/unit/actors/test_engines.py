"""Engines are placed, started, added and ended by the launcher that starts a manager's actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayk.actors.engine import RayReplicas
from rayk.engine.replicas import ModelSource, ServeSettings
from rayk.engine.tiers import TierConfig
from rayk.errors import CallTimeoutError, PlanError

from ..engine.fake import PageModel  # noqa: TID252  # tests/ is no package that has an absolute name
from .fake import FakeRuntime


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    runtime = FakeRuntime()
    yield runtime
    for actor in runtime.actors:
        if actor.instance is not None:
            actor.instance.close()


def engines(runtime: FakeRuntime, **changes: Any) -> RayReplicas:
    settings: dict[str, Any] = {"replicas": 2, "page_size": 4, "pages": 8, "max_batch_size": 2, "device": "cpu"}
    source = ModelSource(make=lambda device: PageModel(), model_id="fake")
    return RayReplicas(runtime, source, ServeSettings(**settings | changes)).start()


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
