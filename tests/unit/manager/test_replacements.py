"""How a driver starts replacements that are due: side by side, as it was before, and what fails by itself."""

from __future__ import annotations

from typing import Any

import pytest

from rayk import PagedKVCacheManager
from rayk.actors.interface import Placement
from rayk.errors import ReplicaLostError
from rayk.scheduler import supervisor
from rayk.scheduler.supervisor import RestartPolicy

from ..actors.fake import FakeRuntime, manager_on  # noqa: TID252  # tests/ is no package that has an absolute name


@pytest.fixture
def fake() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLICY", RestartPolicy(early=0.0, pause=0.0, place_pause=0.0))


def nothing(inputs: Any, batch: Any) -> None:
    pass


def lose(fake: FakeRuntime, manager: PagedKVCacheManager, *replicas: int) -> Any:
    """Those are lost; who replaces them."""
    for replica in replicas:
        fake.kill(f"replica-{replica}")
        with pytest.raises(ReplicaLostError):
            manager.execute([[] for _ in range(manager.num_replicas)], nothing)
    del fake.events[:]
    calls: Any = manager._calls
    return calls._starter


def test_they_start_side_by_side_and_nothing_is_measured(fake: FakeRuntime) -> None:
    with manager_on(fake, 3, pages=16) as manager:
        starter = lose(fake, manager, 0, 1)
        starter._replace()
        assert manager.replica_states() == ["ready"] * 3
        assert [manager.get_num_pages(r) for r in range(3)] == [16] * 3
        begun = [event for event in fake.events if event[0] in ("measure", "start", "read", "place")]
        assert begun.index(("start", "replica-1")) < begun.index(("read", "replica-0")), "not one after the other"
        assert not {"measure", "place"} & {event[0] for event in begun}


def test_where_its_node_is_gone_the_others_are_measured(fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_on(fake, 2, pages=16) as manager:
        starter = lose(fake, manager, 1)
        del fake.free["node-b"]
        moved = Placement(fake.placements[0].group, ("node-a", "node-a"))
        monkeypatch.setattr(FakeRuntime, "await_place", lambda self, placement, timeout: moved)
        starter._replace()
        assert ("measure", "node-a") in fake.events and manager.replica_states() == ["ready", "ready"]
        assert manager.get_node_names() == ["host-of-node-a"] * 2
        fake.placements[:] = []  # its group has another value now


def test_what_fails_is_started_by_itself_the_next_time(fake: FakeRuntime) -> None:
    with manager_on(fake, 3, pages=16) as manager:
        starter = lose(fake, manager, 0, 1)
        fake.fail = lambda event: RuntimeError("broken") if event == ("construct", "replica-1") else None
        starter._replace()
        assert manager.replica_states() == ["lost", "lost", "ready"]
        del fake.events[:]
        starter._replace()
        assert manager.replica_states() == ["ready", "lost", "ready"], "it keeps no other away"
        assert ("measure", "node-a") in fake.events, "there may be less room than before"
        fake.fail = None
        starter._replace()
        assert manager.replica_states() == ["ready"] * 3


@pytest.mark.parametrize("name", [None, "named"])
def test_a_scheduler_that_began_anew_takes_what_was_started_meanwhile(fake: FakeRuntime, name: str | None) -> None:
    with manager_on(fake, 2, pages=16, name=name) as manager:
        starter = lose(fake, manager, 1)
        begun = False

        def restart(event: tuple[Any, ...]) -> None:
            nonlocal begun
            if event == ("construct", "replica-1") and not begun:
                begun = True
                fake.restart_scheduler()

        fake.fail = restart
        starter._replace()
        assert begun and manager.replica_states() == ["ready", "ready"]
        assert [event for event in fake.events if event == ("start", "replica-1")] == [("start", "replica-1")]


def test_a_replacement_of_which_no_call_heard_ends_with_its_manager(fake: FakeRuntime) -> None:
    with manager_on(fake, 2, pages=16) as manager:
        lose(fake, manager, 1)._replace()
        manager.shutdown()
        assert fake.running == []
