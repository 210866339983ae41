"""Callers that are interrupted (Ctrl-C in a notebook, a timeout): nothing that they asked for stays placed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rayk.manager.manager
from rayk import AdmissionPolicy, InferenceSession, PagedKVCacheManager, TextContext
from rayk.errors import AlreadyClaimedError, BatchError, CallTimeoutError, InsufficientBlocksError
from rayk.manager import placing_calls
from rayk.scheduler.admission.controller import AdmissionController

from ..actors.fake import Event, FakeRuntime, manager_on, params  # noqa: TID252  # tests/ is no package that has an absolute name

Call = Callable[[PagedKVCacheManager], Any]


def contexts(*names: str) -> list[TextContext]:
    return [TextContext(name, range(len(name), len(name) + 6), 100) for name in names]


CALLS: dict[str, Call] = {
    "claim": lambda m: m.claim("a", 1),
    "dummy": lambda m: m.alloc_dummy("a", 1),
    "try_admit": lambda m: m.try_admit(contexts("a", "b")),
    "try_admit where named": lambda m: m.try_admit(contexts("a", "b"), [1, 0]),
    "admit": lambda m: m.admit(contexts("a", "b")),
    "reserve": lambda m: (reserved := m.reserve([contexts("a"), contexts("b")]), reserved.__enter__()),
}


class Interruptions:
    """Raises `error` at the next `times` reads of an answer of the scheduler, before or after it is there."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.times = 0

    def __call__(self, event: Event) -> None:
        if event == ("read", "scheduler") and self.times:
            self.times -= 1
            assert self.error is not None
            raise self.error


@pytest.fixture
def interruptions() -> Interruptions:
    return Interruptions()


@pytest.fixture(params=[False, True], ids=["eager", "lazy"])
def runtime(request: pytest.FixtureRequest, interruptions: Interruptions) -> FakeRuntime:
    return FakeRuntime(lazy=request.param, fail=interruptions)


@pytest.fixture(params=[None, AdmissionPolicy()], ids=["", "policy"])
def manager(request: pytest.FixtureRequest, runtime: FakeRuntime) -> Iterator[PagedKVCacheManager]:
    with manager_on(runtime, admission=request.param) as manager:
        yield manager
        manager.check_integrity()


def held(runtime: FakeRuntime) -> list[str]:
    return sorted(i for r in range(2) for i in runtime.actor(f"replica-{r}").core.requests)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_leaves_nothing_placed(
    manager: PagedKVCacheManager, runtime: FakeRuntime, interruptions: Interruptions, name: str
) -> None:
    interruptions.error, interruptions.times = KeyboardInterrupt(), 1
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](manager)
    assert not held(runtime)
    assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0]
    kept = CALLS[name](manager)
    assert held(runtime), kept


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CallTimeoutError("the scheduler", 120.0)], ids=type)
@pytest.mark.parametrize("name", CALLS)
def test_what_was_given_up_for_good_is_given_back_before_anything_else_is_placed(
    manager: PagedKVCacheManager, runtime: FakeRuntime, interruptions: Interruptions, name: str, error: BaseException
) -> None:
    """Interrupted again while it tidies up, or no answer in time."""
    manager._calls.scheduler.quiet = None  # type: ignore[attr-defined]  # one read is all that it waits
    interruptions.error, interruptions.times = error, 2 if isinstance(error, KeyboardInterrupt) else 1
    with pytest.raises(type(error)):
        CALLS[name](manager)
    assert interruptions.times == 0
    manager.admit(contexts("other"))
    assert held(runtime) == ["other"]
    CALLS[name](manager)


def test_an_interrupted_batch_gives_back_its_earlier_messages(
    manager: PagedKVCacheManager, runtime: FakeRuntime, interruptions: Interruptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_calls, "MOST_TOGETHER", 2)
    reads: list[int] = []

    def second(event: Event) -> None:
        if event == ("read", "scheduler"):
            reads.append(1)
            if len(reads) == 2:
                raise KeyboardInterrupt

    runtime.fail = second
    with pytest.raises(KeyboardInterrupt):
        manager.try_admit(contexts("a", "b", "c", "d", "e"), [0, 1, 0, 1, 0])
    assert not held(runtime)


def test_a_large_batch_goes_in_messages_of_a_bounded_size(
    runtime: FakeRuntime, manager: PagedKVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_calls, "MOST_TOGETHER", 3)
    monkeypatch.setattr(placing_calls, "TOKENS_TOGETHER", 20)
    ctxs = contexts(*(f"r{i}" for i in range(7)))
    ctxs[3] = TextContext("r3", range(30), 100)
    with runtime.watch() as sent:
        admissions = manager.try_admit(ctxs)
    assert [a.error for a in admissions] == [None] * 7
    assert sum(who == "scheduler" for who, _ in sent) == 3, "3 requests, the long one, 3 requests"
    assert held(runtime) == sorted(c.request_id for c in ctxs)
    for ctx, admission in zip(ctxs, admissions, strict=True):
        assert manager.holder(ctx.request_id) == admission.replica


def test_all_or_none_holds_over_several_messages(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing_calls, "MOST_TOGETHER", 2)
    with manager_on(runtime) as manager:
        ctxs = [*contexts("a", "b", "c"), TextContext("big", range(500), 1000), *contexts("e", "f", "g")]
        with runtime.watch() as sent, pytest.raises(InsufficientBlocksError, match="'big'"):
            manager.admit(ctxs)
        assert sum(what == ("scheduler", "PlaceMany") for what in sent) == 2, "what follows is not tried"
        assert not held(runtime)
        assert [c.tokens.processed for c in ctxs] == [0] * 7


def test_of_a_batch_the_request_that_no_message_can_carry_fails(
    runtime: FakeRuntime, manager: PagedKVCacheManager
) -> None:
    ctxs = contexts("a", "b", "c", "d")
    ctxs[1].tenant = 7  # type: ignore[assignment]  # what nobody checks
    ctxs[1].root_key = ("\ud800", None)
    results = manager.try_admit(ctxs)
    assert [type(a.error) for a in results] == [type(None), BatchError, type(None), type(None)]
    assert held(runtime) == ["a", "c", "d"]
    manager.release("a", results[0].replica)
    with pytest.raises(BatchError, match="'b' cannot be sent"):
        manager.admit([*contexts("e"), ctxs[1]])
    assert held(runtime) == ["c", "d"]
    with pytest.raises(AlreadyClaimedError):
        manager.admit(contexts("c"))
    manager.admit(contexts("a"))


def test_a_call_places_a_bounded_number_of_requests(
    manager: PagedKVCacheManager, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rayk.manager.manager, "MOST_IN_CALL", 2)
    ctxs = contexts("a", "b", "c")
    calls: list[Callable[[], Any]] = [lambda: manager.admit(ctxs), lambda: manager.try_admit(ctxs, [0, 1, 0])]
    if manager._admission is not None:
        calls.append(lambda: manager.enter(ctxs))
    for call in calls:
        with pytest.raises(BatchError, match="got 3 requests in one call, at most 2"):
            call()
    assert not held(runtime)
    manager.admit(ctxs[:2])


def test_an_offer_that_was_interrupted_in_this_process_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    offer, interrupted = AdmissionController.offer, list[str]()

    def interrupt(self: AdmissionController, queued: Any, request_id: str, *rest: Any) -> None:
        if request_id == "b" and not interrupted:
            interrupted.append(request_id)
            raise KeyboardInterrupt
        offer(self, queued, request_id, *rest)

    monkeypatch.setattr(AdmissionController, "offer", interrupt)
    with InferenceSession() as session:
        manager = PagedKVCacheManager(params(2), session, 16, max_batch_size=8, admission=AdmissionPolicy())
        ctxs = contexts("a", "b")
        with pytest.raises(KeyboardInterrupt):
            manager.admit(ctxs)
        assert [manager.holder(name) for name in "ab"] == [None, None]
        manager.admit(ctxs)
        assert None not in [manager.holder(name) for name in "ab"]
        manager.shutdown()
