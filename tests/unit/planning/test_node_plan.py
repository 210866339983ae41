"""How many pages fit: arithmetic over what nodes offer, and refusals that name numbers and a remedy."""

import pytest

from rayk import InferenceSession, MHAKVCacheParams, PagedKVCacheManager
from rayk.errors import ConfigError, PlanError
from rayk.planning.node_plan import (
    GPU_UTILIZATION,
    HOST_UTILIZATION,
    DeviceMemory,
    NodeMemory,
    measure_node,
    plan_here,
    plan_replica,
    planned_pages,
    refused_nodes,
    replicas_that_fit,
)


def params(devices) -> MHAKVCacheParams:
    return MHAKVCacheParams(dtype="float32", n_kv_heads=4, head_dim=8, num_layers=1, page_size=16, devices=devices)


HOST = params(["cpu"])
ONE_GPU, TWO_GPUS = params(["cuda:0"]), params(["cuda:0", "cuda:1"])


def node(host_free: int = 0, gpus: tuple[int, ...] = (), name: str = "n1") -> NodeMemory:
    devices = tuple(DeviceMemory(i, "gpu", 2 * free, free) for i, free in enumerate(gpus))
    return NodeMemory(name, f"host-{name}", 2 * host_free, host_free, devices)


def test_the_example_page() -> None:
    assert HOST.bytes_per_page == TWO_GPUS.bytes_per_page == 2 * 1 * 16 * 4 * 8 * 4


def test_the_null_page_is_taken_off() -> None:
    page = HOST.bytes_per_page
    free = int(11 * page / HOST_UTILIZATION)
    plan = plan_replica(node(free), HOST, None, 1)
    assert (plan.pages, plan.planned, plan.bytes) == (10, 10, 11 * page)
    assert plan.bytes <= free * HOST_UTILIZATION


def test_replicas_on_a_host_share_its_memory() -> None:
    free = int(22 * HOST.bytes_per_page / HOST_UTILIZATION)
    assert [planned_pages(node(free), HOST, n) for n in (1, 2, 4)] == [21, 10, 4]


def test_the_gpu_with_the_least_memory_decides() -> None:
    page = TWO_GPUS.bytes_per_page // 2  # each shard keeps half of every page
    gpus = (int(100 * page / GPU_UTILIZATION) + 1, int(31 * page / GPU_UTILIZATION) + 1)
    assert planned_pages(node(gpus=gpus), TWO_GPUS, 1) == 30


def test_a_smaller_number_may_be_asked_for() -> None:
    free = int(11 * HOST.bytes_per_page / HOST_UTILIZATION)
    plan = plan_replica(node(free), HOST, 3, 1)
    assert (plan.pages, plan.planned, plan.bytes) == (3, 10, 4 * HOST.bytes_per_page)
    assert plan_replica(node(free), HOST, 10, 1).pages == 10


def test_too_many_pages_are_refused_with_numbers_and_the_most_that_fits() -> None:
    free = int(11 * HOST.bytes_per_page / HOST_UTILIZATION)
    with pytest.raises(PlanError) as caught:
        plan_replica(node(free), HOST, 11, 1)
    text = str(caught.value)
    for part in ("11 page(s)", f"{HOST.bytes_per_page} bytes", "host-n1", f"{free} bytes", "50%", "at most 10 pages"):
        assert part in text, part


@pytest.mark.parametrize("wanted", [None, 1, 5])
def test_no_room_for_a_page_names_another_remedy(wanted: int | None) -> None:
    with pytest.raises(PlanError, match="smaller pages, fewer layers or a larger node"):
        plan_replica(node(HOST.bytes_per_page), HOST, wanted, 1)


def test_a_node_without_gpus_has_no_room_for_cuda() -> None:
    assert replicas_that_fit(node(10**12), ONE_GPU) == 0
    with pytest.raises(PlanError):
        plan_replica(node(10**12), ONE_GPU, 1, 1)


def test_gpus_decide_how_many_replicas_fit() -> None:
    assert replicas_that_fit(node(gpus=(1, 1, 1, 1, 1)), TWO_GPUS) == 2
    assert replicas_that_fit(node(10**9), HOST) == 1


def test_each_refused_node_has_its_reason() -> None:
    room = 100 * ONE_GPU.bytes_per_page
    nodes = [node(gpus=(room,), name="good"), node(name="bare"), node(gpus=(10,), name="full")]
    reasons = refused_nodes(nodes, ONE_GPU, 8)
    assert set(reasons) == {"bare", "full"}
    assert "0 GPU" in reasons["bare"] and "host-full" in reasons["full"]


def test_this_machine() -> None:
    here = measure_node("me", "my host")
    assert (here.node_id, here.host_name) == ("me", "my host")
    assert 0 < here.host_free <= here.host_total
    assert plan_here(HOST, 4) == 4


def test_a_manager_checks_its_pages_against_the_plan(session: InferenceSession) -> None:
    with pytest.raises(PlanError, match=r"1000000000000 page.*ask for at most \d+ pages"):
        PagedKVCacheManager(HOST, session, 10**12, max_batch_size=1)


def test_none_takes_what_was_planned(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    small = node(int(9 * HOST.bytes_per_page / HOST_UTILIZATION))
    monkeypatch.setattr("rayk.planning.node_plan.measure_node", lambda: small)
    with PagedKVCacheManager(HOST, session, None, max_batch_size=1) as manager:
        assert manager.get_num_pages(0) == 8


def test_measuring_a_node(tmp_path) -> None:
    found = measure_node("n", "h", memory_limit=1000, disk_dir=str(tmp_path / "not" / "made" / "yet"))
    assert (found.node_id, found.host_name, found.host_free) == ("n", "h", 1000)
    assert found.host_total > 1000 and found.disk_free > 0 and found.measured_at > 0
    assert measure_node().disk_free is None


@pytest.mark.parametrize("utilization", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(utilization: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        planned_pages(node(1 << 40), HOST, 1, utilization)
