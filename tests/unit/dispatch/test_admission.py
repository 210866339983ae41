"""A Cluster with an admission policy: who waits, in which order, who is turned away, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.errors import ConfigError, NoReplicaError, OverloadedError
from rayk.protocol.admission import AdmissionPolicy, TenantQuota
from rayk.request_errors import RequestCancelledError, RequestError, RequestTimeoutError
from rayk.scheduler.router.router import Router

from ..engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # tests/ is no package
from .conftest import Gated

SETTINGS: dict[str, Any] = {"page_size": 4, "pages": 20, "max_batch_size": 4, "chunk_size": 16}


def opened(replicas: int = 1, **policy: Any) -> Cluster:
    def model(device: str) -> PageModel:
        return Gated(tokenizer=Tokenizer())

    return Cluster(model, replicas=replicas, admission=AdmissionPolicy(**policy), **SETTINGS)


@pytest.fixture(autouse=True)
def watermarks() -> Iterator[threading.Event]:
    Gated.watermarks.set()
    yield Gated.watermarks
    Gated.watermarks.set()


def settled(cluster: Cluster) -> None:
    """Nobody waits, nothing is promised, the books are right."""
    while cluster._dispatcher._handles:
        threading.Event().wait(0.002)
    admission = cluster._dispatcher.core.admission
    assert admission is not None and not admission._offered and not admission._promised and not admission._refused
    admission.check_integrity()
    state = cluster.admission_state()
    assert state is not None and (state.waiting, state.held_pages) == (0, 0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_all_are_served_in_their_turn(replicas: int) -> None:
    with opened(replicas) as cluster:
        outputs = cluster.generate([[i] * (1 + i % 20) for i in range(60)], max_new_tokens=6)
        assert [output.tokens for output in outputs] == [expected([i] * (1 + i % 20), 6) for i in range(60)]
        settled(cluster)
        state = cluster.admission_state()
        assert state is not None and (state.admitted, state.refused) == (60, 0)


def test_priority_and_deadline_go_first(watermarks: threading.Event) -> None:
    order: list[str] = []
    with opened(max_running=1, patience=600) as cluster:
        watermarks.clear()
        names = {"plain": {}, "urgent": {"priority": 9}, "due": {"deadline": 60.0}}
        first = cluster.submit([1, 1], max_new_tokens=2)
        prompts = [{"tokens": [i, 2], "id": name, **more} for i, (name, more) in enumerate(names.items())]
        handles = cluster.submit_all(prompts, max_new_tokens=2)
        for handle in handles:
            handle.future.add_done_callback(lambda future: order.append(future.result().id))
        watermarks.set()
        assert not any(handle.result(20).error for handle in [first, *handles])
        assert order == ["due", "urgent", "plain"], "due in a minute, 45 seconds early, and in 10 minutes"
        settled(cluster)


def test_tenants_take_turns_by_weight(watermarks: threading.Event) -> None:
    with opened(max_running=1, tenants={"big": TenantQuota(weight=3.0)}) as cluster:
        watermarks.clear()
        order: list[str] = []
        prompts = [{"tokens": [i, 2], "tenant": tenant} for tenant in ("big", "small") for i in range(8)]
        handles = cluster.submit_all(prompts, max_new_tokens=2)
        for handle in handles:
            handle.future.add_done_callback(lambda _, tenant=handle.tenant: order.append(tenant))
        watermarks.set()
        assert not any(handle.result(20).error for handle in handles)
        assert 5 <= order[:8].count("big") <= 7
        settled(cluster)


def test_what_is_too_much_is_turned_away(watermarks: threading.Event) -> None:
    with opened(max_waiting=2, max_running=1) as cluster:
        watermarks.clear()
        handles = cluster.submit_all([[i, 1] for i in range(5)], max_new_tokens=3)
        refused = [handle for handle in handles if handle.done]
        assert [handle.index for handle in refused] == [3, 4]
        for handle in refused:
            error = handle.result(0).error
            assert isinstance(error, OverloadedError) and "2 requests wait already" in str(error)
            assert error.retry_after > 0 and handle.result(0).finish_reason == "error"
        large = cluster.submit([7] * 79, max_new_tokens=1).result(5)
        assert isinstance(large.error, OverloadedError) and "needs 20 pages" in str(large.error)
        watermarks.set()
        assert [handle.result(20).tokens for handle in handles[:3]] == [expected([i, 1], 3) for i in range(3)]
        settled(cluster)
        again = cluster.generate([{"tokens": [4, 1], "id": refused[0].id}], max_new_tokens=3)
        assert again[0].tokens == expected([4, 1], 3), "its id is free"


def test_who_waits_too_long_is_turned_away(watermarks: threading.Event) -> None:
    with opened(max_running=1, patience=0.05) as cluster:
        watermarks.clear()
        first, late = cluster.submit_all([[1], [2]], max_new_tokens=3)
        threading.Event().wait(0.06)
        watermarks.set()
        assert first.result(20).error is None
        assert isinstance(late.result(20).error, OverloadedError) and "it waited" in str(late.result().error)
        settled(cluster)


def test_cancelled_and_timed_out_while_they_wait(watermarks: threading.Event) -> None:
    with opened(max_running=1) as cluster:
        watermarks.clear()
        first, cancelled = cluster.submit_all([[1], [2]], max_new_tokens=3)
        late = cluster.submit([3], max_new_tokens=3, timeout=0.01)
        cancelled.cancel()
        assert isinstance(cancelled.result(5).error, RequestCancelledError)
        again = cluster.submit({"tokens": [4], "id": cancelled.id}, max_new_tokens=3)
        threading.Event().wait(0.02)
        watermarks.set()
        assert isinstance(late.result(20).error, RequestTimeoutError)
        assert first.result(20).error is None and again.result(20).tokens == expected([4], 3)
        settled(cluster)


def test_what_a_removed_replica_had_goes_on_before_others(watermarks: threading.Event) -> None:
    with opened(2, max_running=2) as cluster:
        watermarks.clear()
        handles = cluster.submit_all([[i, 1] for i in range(12)], max_new_tokens=8)
        removing = threading.Thread(target=cluster.remove_replica, args=(0,))
        removing.start()
        watermarks.set()
        assert [handle.result(20).tokens for handle in handles] == [expected([i, 1], 8) for i in range(12)]
        removing.join(20)
        settled(cluster)


def test_nobody_waits_where_no_replica_is_left(watermarks: threading.Event) -> None:
    with opened(max_running=1) as cluster:
        watermarks.clear()
        running, waits = cluster.submit_all([[1], [2]], max_new_tokens=3)
        cluster.drain_replica(0)
        after = cluster.submit([3], max_new_tokens=3)
        assert isinstance(after.result(5).error, NoReplicaError)
        watermarks.set()
        assert running.result(20).error is None and isinstance(waits.result(20).error, NoReplicaError)
        cluster.resume_replica(0)
        assert cluster.generate([[4]], max_new_tokens=3)[0].tokens == expected([4], 3)
        settled(cluster)


@pytest.mark.parametrize("where", ["choose", "place"])
def test_a_router_that_raises_ends_one_request(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    sound = getattr(Router, where)

    def broken(self: Any, request_id: str, *given: Any) -> Any:
        if request_id == "bad":
            raise ZeroDivisionError("a bug")
        return sound(self, request_id, *given)

    monkeypatch.setattr(Router, where, broken)
    with opened() as cluster:
        good, bad, other = cluster.generate([[1], {"tokens": [2], "id": "bad"}, [3]], max_new_tokens=3)
        assert isinstance(bad.error, RequestError) and "ZeroDivisionError: a bug" in str(bad.error)
        assert good.tokens == expected([1], 3) and other.tokens == expected([3], 3)
        settled(cluster)


def test_traits_are_checked() -> None:
    wrong = [{"tenant": 1}, {"priority": 0.5}, {"deadline": "soon"}, {"deadline": float("nan")}]
    with opened() as cluster:
        outputs = cluster.generate([{"tokens": [1], **each} for each in wrong], max_new_tokens=1)
        for output, each in zip(outputs, wrong, strict=True):
            assert isinstance(output.error, RequestError) and next(iter(each)) in str(output.error)


@pytest.mark.parametrize("policy", [None, AdmissionPolicy()])
def test_where_a_request_went_is_explained(policy: AdmissionPolicy | None) -> None:
    with Cluster(lambda device: PageModel(), replicas=2, admission=policy, **SETTINGS) as cluster:
        [output] = cluster.generate([{"tokens": list(range(17)), "id": "a"}], max_new_tokens=2)
        why = cluster.explain("a")
        assert (why.request_id, why.router, why.replica, why.tokens) == ("a", "cost", output.replica, 17)
        assert why.manager == "" and why.seconds_ago >= 0
        assert {each["replica"] for each in why.candidates} == {0, 1}
        chosen = next(each for each in why.candidates if each["replica"] == output.replica)
        assert chosen["cost"] == min(each["cost"] for each in why.candidates)
        with pytest.raises(ConfigError, match="no routing decision for request 'b'"):
            cluster.explain("b")
