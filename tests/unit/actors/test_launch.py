"""Starting and attaching: the order of the steps, and that a failure at any of them leaves nothing behind."""

import itertools

import pytest

from rayk import PagedKVCacheManager, RaykError
from rayk.actors.interface import ActorGoneError
from rayk.errors import CallTimeoutError, ClosedError, ConfigError, PlanError, SchedulerLostError

from .fake import GIB, FakeRuntime, manager_on, params, session_on

STEPS = ("nodes", "measure", "place", "start", "stop")


def steps(runtime: FakeRuntime) -> list[tuple[str, ...]]:
    return [
        event[:2] if event[0] in ("measure", "start") else event[:1] for event in runtime.events if event[0] in STEPS
    ]


def test_every_node_is_measured_then_placement_then_replicas_then_scheduler() -> None:
    runtime = FakeRuntime({"a": GIB, "b": GIB, "c": GIB})
    with manager_on(runtime, replicas=2):
        assert steps(runtime) == [
            ("nodes",),
            ("measure", "a"),
            ("measure", "b"),
            ("measure", "c"),
            ("place",),
            ("start", "replica-0"),
            ("start", "replica-1"),
            ("start", "scheduler"),
        ]
    assert runtime.running == [] and runtime.placements == []


def test_replicas_answer_before_the_scheduler_starts() -> None:
    runtime = FakeRuntime()
    with manager_on(runtime, replicas=2):
        events = runtime.events
        pings = [i for i, event in enumerate(events) if event[0] == "run" and event[2] in ("facts", "ping")]
        scheduler = events.index(("start", "scheduler"))
        assert [events[i][1] for i in pings] == ["replica-0", "replica-1", "scheduler"]
        assert pings[0] > events.index(("start", "replica-1")), "replicas start side by side"
        assert pings[1] < scheduler < pings[2]


def test_bundles_ask_for_a_sliver_of_a_cpu() -> None:
    runtime = FakeRuntime()
    with manager_on(runtime, replicas=3):
        [placed] = [event for event in runtime.events if event[0] == "place"]
        assert placed[1] == ((("CPU", 0.001),),) * 3


def test_pages_follow_the_node_of_each_replica() -> None:
    page = params().bytes_per_page
    runtime = FakeRuntime({"a": 40 * page, "b": 100 * page})
    with manager_on(runtime, replicas=3, pages=None) as manager:  # a, b, a: half of a node's memory, shared
        assert [manager.get_num_pages(r) for r in range(3)] == [40 // 4 - 1, 100 // 2 - 1, 40 // 4 - 1]


def failures() -> list:
    boom = RuntimeError("injected")
    stages = [
        ("nodes",), ("measure", "node-b"), ("place",), ("start", "replica-0"), ("start", "replica-1"),
        ("construct", "replica-0"), ("construct", "replica-1"), ("start", "scheduler"), ("construct", "scheduler"),
    ]  # fmt: skip
    return [pytest.param(stage, boom, id="-".join(stage)) for stage in stages]


@pytest.mark.parametrize(("stage", "error"), failures())
def test_a_failure_leaves_nothing_behind_and_the_next_try_works(stage: tuple[str, ...], error: Exception) -> None:
    runtime = FakeRuntime(fail=lambda event: error if event[: len(stage)] == stage else None)
    with session_on(runtime) as session:
        expected = PlanError if stage[0] == "construct" else type(error)
        with pytest.raises(expected, match="injected"):
            PagedKVCacheManager(params(), session, 8, max_batch_size=4, router="least-loaded")
        assert runtime.running == [] and runtime.placements == []
        runtime.fail = None
        with PagedKVCacheManager(params(), session, 8, max_batch_size=4, router="least-loaded") as manager:
            assert manager.get_num_pages(1) == 8
        assert runtime.running == [] and runtime.placements == []


@pytest.mark.parametrize("silent", ["replica-1", "scheduler"])
def test_an_actor_that_never_answers_is_stopped_again(silent: str) -> None:
    """A constructor that hangs ends in CallTimeoutError, which names who was silent."""
    runtime = FakeRuntime()
    get = runtime.get

    def hanging(ref, target, timeout):
        if ref.actor is not None and ref.actor.label == silent:
            raise CallTimeoutError(target, timeout)
        return get(ref, target, timeout)

    runtime.get = hanging
    with session_on(runtime) as session, pytest.raises(CallTimeoutError, match=silent.replace("-", " ")):
        PagedKVCacheManager(params(), session, 8, max_batch_size=4, router="least-loaded")
    assert runtime.running == [] and runtime.placements == []


def test_an_interrupt_while_starting_leaves_nothing_behind() -> None:
    runtime = FakeRuntime(fail=lambda event: KeyboardInterrupt() if event == ("start", "replica-1") else None)
    with session_on(runtime) as session, pytest.raises(KeyboardInterrupt):
        PagedKVCacheManager(params(), session, 8, max_batch_size=4, router="least-loaded")
    assert runtime.running == [] and runtime.placements == []


def test_nodes_that_are_too_small_are_named() -> None:
    page = params().bytes_per_page
    runtime = FakeRuntime({"a": 10 * page, "b": 20 * page})
    with session_on(runtime) as session, pytest.raises(PlanError) as caught:
        PagedKVCacheManager(params(), session, 100, max_batch_size=4, router="least-loaded")
    text = str(caught.value)
    assert "host-of-a" in text and "host-of-b" in text and "100 page(s)" in text
    assert str(10 * page) in text and "ask for at most 9 pages" in text
    assert not [event for event in runtime.events if event[0] in ("place", "start")], "nothing was started"


def test_a_node_that_is_too_small_is_avoided() -> None:
    page = params().bytes_per_page
    runtime = FakeRuntime({"a": 10 * page, "b": 1000 * page})
    with manager_on(runtime, replicas=2, pages=100):
        [placed] = [event for event in runtime.events if event[0] == "place"]
        assert placed[2] == ("a",)


def test_replicas_that_fit_one_by_one_but_not_together_are_refused() -> None:
    page = params().bytes_per_page
    runtime = FakeRuntime({"a": 60 * page})
    with session_on(runtime) as session, pytest.raises(PlanError, match=r"host-of-a.*2 replica"):
        PagedKVCacheManager(params(), session, 20, max_batch_size=4, router="least-loaded")
    assert runtime.running == [] and runtime.placements == []


def test_cuda_needs_gpus() -> None:
    runtime = FakeRuntime()
    with session_on(runtime) as session, pytest.raises(PlanError, match=r"host-of-node-a has 0 GPU\(s\)"):
        PagedKVCacheManager(params(devices=["cuda:0", "cuda:1"]), session, 8, max_batch_size=4, router="least-loaded")


# -- by name -----------------------------------------------------------------------------------------


def test_a_second_session_of_that_name_uses_the_same_actors() -> None:
    runtime = FakeRuntime()
    with manager_on(runtime, name="prod") as first:
        started = list(runtime.actors)
        first.claim("r", 1)
        with session_on(runtime, "prod") as session:
            second = PagedKVCacheManager(
                params(), session, 16, enable_runtime_checks=True, max_batch_size=8, router="least-loaded"
            )
            assert runtime.actors == started
            assert second.contains("r", 1)
            anything = PagedKVCacheManager(
                params(), session, 16, max_batch_size=8, router="least-loaded"
            )  # index 1: another one
            assert len(runtime.actors) == 2 * len(started)
            anything.shutdown()
        assert first.contains("r", 1), "closing a named session leaves its managers alone"
    assert runtime.running == [] and runtime.placements == []


def test_attaching_without_a_page_count_takes_what_runs() -> None:
    runtime = FakeRuntime()
    with manager_on(runtime, name="prod", pages=12), session_on(runtime, "prod") as session:
        assert (
            PagedKVCacheManager(params(), session, None, max_batch_size=8, router="least-loaded").get_num_pages(0) == 12
        )


@pytest.mark.parametrize(
    ("what", "changes", "options"),
    [
        ("params", {"page_size": 8}, {}),
        ("params", {"head_dim": 4}, {}),
        ("params", {"kv_hash_seed": b"x" * 32}, {}),
        ("total_num_pages", {}, {"total_num_pages": 17}),
        ("max_batch_size", {}, {"max_batch_size": 9}),
        ("router", {}, {"router": "round-robin"}),
    ],
)
def test_attaching_with_other_settings_names_them(what: str, changes: dict, options: dict) -> None:
    runtime = FakeRuntime()
    wanted = {"total_num_pages": 16, "max_batch_size": 8, "router": "least-loaded"} | options
    with manager_on(runtime, name="prod") as first, session_on(runtime, "prod") as session:
        running = runtime.running
        with pytest.raises(ConfigError, match=f"'prod/0' runs with other settings: {what};"):
            PagedKVCacheManager(params(**changes), session, **wanted)
        assert runtime.running == running
        first.claim("r", 0)


def test_a_refused_attempt_does_not_use_up_the_name() -> None:
    """The next manager of that session is still the one that other sessions of that name attach to."""
    runtime = FakeRuntime()
    with manager_on(runtime, name="prod"), session_on(runtime, "prod") as session:
        running = runtime.running
        with pytest.raises(ConfigError, match="max_batch_size"):
            PagedKVCacheManager(params(), session, 16, max_batch_size=9, router="least-loaded")
        PagedKVCacheManager(params(), session, 16, max_batch_size=8, router="least-loaded")
        assert runtime.running == running, "it attached, nothing new was started"


def test_two_drivers_at_once_start_one_cluster() -> None:
    """The second finds nothing, begins to start, and finds the first name taken: it attaches."""
    runtime = FakeRuntime()
    with manager_on(runtime, name="prod") as first, session_on(runtime, "prod") as session:
        running, find = runtime.running, runtime.find
        answers = [None, find]
        runtime.find = lambda name: answer(name) if (answer := answers.pop(0) if answers else find) else None
        second = PagedKVCacheManager(params(), session, 16, max_batch_size=8, router="least-loaded")
        assert runtime.running == running and len(runtime.placements) == 1, "what it had begun is gone"
        first.claim("r", 0)
        assert second.contains("r", 0)


def test_attaching_to_a_dead_scheduler() -> None:
    runtime = FakeRuntime()
    with manager_on(runtime, name="prod"):
        runtime.fail = lambda event: ActorGoneError("shot") if event == ("run", "scheduler", "roster") else None
        with session_on(runtime, "prod") as session, pytest.raises(SchedulerLostError, match="shot"):
            PagedKVCacheManager(params(), session, 16, max_batch_size=8, router="least-loaded")


# -- the end -------------------------------------------------------------------------------------------


def test_shutdown_is_idempotent_and_final() -> None:
    runtime = FakeRuntime()
    with manager_on(runtime) as manager:
        manager.shutdown()
        stops = [event for event in runtime.events if event[0] == "stop"]
        assert stops == [("stop", ("scheduler", "replica-0", "replica-1"), True)]
        manager.shutdown()
        assert [event for event in runtime.events if event[0] == "stop"] == stops
        for call in (lambda: manager.claim("r", 0), lambda: manager.step([[], []]), manager.get_metrics_aggregated):
            with pytest.raises(ClosedError):
                call()


def test_closing_the_session_shuts_its_managers_down() -> None:
    runtime = FakeRuntime()
    with session_on(runtime) as session:
        managers = [
            PagedKVCacheManager(params(), session, 8, max_batch_size=4, router="least-loaded") for _ in range(2)
        ]
        assert len(runtime.running) == 6
    assert runtime.running == [] and runtime.placements == [] and runtime.disconnected == 1
    for manager in managers:
        with pytest.raises(ClosedError):
            manager.claim("r", 0)
    with pytest.raises(ClosedError, match="session"):
        PagedKVCacheManager(params(), session, 8, max_batch_size=4, router="least-loaded")


def test_epochs_are_distinct_and_grow_from_start_to_start() -> None:
    runtime = FakeRuntime()
    epochs = []
    for _ in range(2):
        with manager_on(runtime, replicas=3):
            epochs += [runtime.actor(f"replica-{r}").service.epoch for r in range(3)]
    assert all(a < b for a, b in itertools.pairwise(epochs))
    assert all(issubclass(error, RaykError) for error in (PlanError, ConfigError))
