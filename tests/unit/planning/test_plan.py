"""Plans of replicas and nodes: within the memory, as large as possible, and advice that holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayk.errors import ConfigError, PlanError
from rayk.planning.gpus import GPU_MIB, named_gpu, parse_gpu
from rayk.planning.model import Model
from rayk.planning.node_plan import DeviceMemory, NodeMemory
from rayk.planning.nodes import plan_nodes
from rayk.planning.plan import MEMORY, plan_replica
from rayk.planning.plan_request import PlanQuestion
from rayk.planning.reading import read_model
from rayk.planning.settings import PlanSettings

GIB = 1 << 30
H100 = parse_gpu("h100")
PLAIN = PlanSettings(activation_reserve=0)


def gpus(*free_gib: float) -> tuple[DeviceMemory, ...]:
    return tuple(DeviceMemory(i, "gpu", int(f * GIB), int(f * GIB)) for i, f in enumerate(free_gib))


def node(name: str, *free_gib: float) -> NodeMemory:
    return NodeMemory(name, f"host-{name}", 0, 0, gpus(*free_gib))


@pytest.fixture
def llama(configs: Path) -> Model:
    return read_model(configs / "llama-3.1-8b.json")


def test_the_8b_model_on_an_h100(llama: Model) -> None:
    plan = plan_replica(llama, PLAIN, [H100])
    assert plan.page_bytes == 16 << 20 and plan.token_bytes == 131_072
    assert plan.pages == (int(H100.free * 0.9) - llama.loaded_bytes(None)) // (16 << 20) - 1 == 3629
    assert plan.max_sequence_length == 131_072 and plan.max_batch_size == 512 and plan.bound == MEMORY
    assert (plan.requests_of(1), plan.requests_of(128), plan.requests_of(129)) == (3629, 3629, 1814)


def test_the_device_with_least_memory_decides(llama: Model) -> None:
    split = PlanSettings(tp=2, activation_reserve=0)
    uneven, even = plan_replica(llama, split, gpus(80, 40)), plan_replica(llama, split, gpus(40, 40))
    assert uneven.pages == even.pages and uneven.memory == 120 * GIB


def test_a_page_larger_than_the_memory_does_not_fit(llama: Model) -> None:
    answer = PlanQuestion(llama, PlanSettings(page_size=10**6), H100).answer()
    assert not answer.fits and "one page and the null page" in answer.plan.problems[0]
    assert [remedy.flags for remedy in answer.suggestions][-1] == "--page-size 128"


def test_a_length_beyond_the_memory_has_a_shorter_one_that_is_the_longest(llama: Model) -> None:
    question = PlanQuestion(llama, replace(PLAIN, max_length=10**6), H100)
    answer = question.answer()
    [shorter] = [dict(r.changes)["max_length"] for r in answer.suggestions if "max_length" in dict(r.changes)]
    assert shorter == 3629 * 128 and answer.plan.problems == ("the cache holds 464512 tokens, max_length is 1000000",)
    assert not question.changed([("max_length", shorter + 1)]).plan().fits


@pytest.mark.parametrize(
    "wrong",
    [
        {"tp": 0},
        {"dp": -1},
        {"page_size": 0},
        {"page_size": True},
        {"tp": 10**6},
        {"utilization": 0.0},
        {"utilization": -0.1},
        {"utilization": 1.01},
        {"utilization": float("nan")},
        {"activation_reserve": -2},
        {"pp": 0},
        {"tp": 4, "attention_dp": 3},
        {"mla": "dense"},
        {"max_length": 0},
        {"max_batch_size": 0},
        {"largest_allocation": 0},
        {"kv_dtype": "float3"},
        {"weights_dtype": "float3"},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PlanSettings(**wrong)


def test_gpus_by_name_and_size() -> None:
    assert parse_gpu("H200") == parse_gpu("nvidia h200") == named_gpu("h200")
    assert parse_gpu("A100-80GB").total == 80 * GIB and parse_gpu("h100_80gb").total == H100.total
    assert parse_gpu("141GiB").free == 141 * GIB and parse_gpu(str(24 * GIB)).free == 24 * GIB
    for name in GPU_MIB:
        assert parse_gpu(name).name == name
    for wrong in ("a100", "h1000", "", "-5GiB", "0.9", "5", "99TiB", "80Gib2"):
        with pytest.raises(ConfigError):
            parse_gpu(wrong)


def test_nodes_differ_and_so_do_their_replicas(llama: Model) -> None:
    nodes = [node("a", 80), node("b", 17, 40), node("c"), node("d", 24)]
    plan = plan_nodes(llama, PlanSettings(dp=3), nodes)
    assert plan.fits and [(r.node_id, r.gpus) for r in plan.replicas] == [("a", (0,)), ("b", (1,)), ("d", (0,))]
    assert plan.replicas[0].plan.pages > plan.replicas[1].plan.pages > plan.replicas[2].plan.pages
    assert plan.typical is plan.replicas[2].plan
    assert [use.replicas for use in plan.nodes] == [(0,), (1,), (), (2,)]
    assert plan.nodes[2].reason == "it has 0 GPU(s), a replica needs 1 on one node"
    same = plan_nodes(llama, PlanSettings(dp=3), nodes, uniform=True)
    assert {r.plan.pages for r in same.replicas} == {plan.typical.pages}


def test_too_few_nodes_are_named_with_their_reasons(llama: Model) -> None:
    nodes = [node("a", 80, 80), node("b", 10, 10)]
    answer = PlanQuestion(llama, PlanSettings(dp=3), nodes=tuple(nodes)).answer()
    assert not answer.fits and answer.plan.problems[0] == "3 replica(s) asked for, 2 fit"
    assert "host-b" in answer.plan.problems[1] and "16.91 GiB" in answer.plan.problems[1]
    assert answer.suggestions[0].changes == (("dp", 2),)
    assert plan_nodes(llama, PlanSettings(dp=2), nodes).nodes[1].replicas == ()
    assert plan_nodes(llama, PlanSettings(dp=1), [*nodes, node("e", 80)]).nodes[2].reason is not None


def test_remedies_for_nodes_name_no_other_gpu(llama: Model) -> None:
    answer = PlanQuestion(llama, PlanSettings(), nodes=(node("a", 12, 12),)).answer()
    names = [name for remedy in answer.suggestions for name, _ in remedy.changes]
    assert "tp" in names and "gpu" not in names
    assert all(answer.question.changed(remedy.changes).plan().fits for remedy in answer.suggestions)


def test_without_any_gpu_there_is_no_plan(llama: Model) -> None:
    with pytest.raises(PlanError, match="--gpu"):
        plan_nodes(llama, PlanSettings(), [node("a")])


def test_pages_asked_for_are_checked_against_the_plan(llama: Model) -> None:
    assert plan_replica(llama, PLAIN, [H100], wanted_pages=100).pages == 100
    refused = plan_replica(llama, PLAIN, [H100], wanted_pages=5000)
    assert refused.problems == ("5000 pages were asked for, 3629 fit (bound by memory)",)
    with pytest.raises(ConfigError, match="tp=2"):
        plan_replica(llama, PlanSettings(tp=2), [H100])
