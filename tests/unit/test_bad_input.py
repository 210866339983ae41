"""Bad input to each public call: a clear error of rayk's, and nothing lost. A call without a case here fails the test.

What a file of its own tests in depth has one case here that stands for it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import rayk
from rayk import AsyncPagedKVCacheManager, Cluster, InferenceSession, MHAKVCacheParams, PagedKVCacheManager, TextContext
from rayk.errors import RaykError
from rayk.planning.errors import MemoryPlanError

from .engine.fake import PageModel, Tokenizer

SHAPE: dict[str, Any] = {
    "dtype": "float32", "head_dim": 2, "num_layers": 1, "n_kv_heads": 1, "page_size": 4, "devices": ["cpu"],
    "enable_prefix_caching": True,
}  # fmt: skip
GIVEN = {  # by rayk to its callers, who have no reason to make one
    "Admission", "Drained", "HitCounts", "KVCacheMetrics", "Output", "PathState", "PrefixCacheReset", "Removed",
    "ReplicaLoad", "TickResult", "Update", "MemoryEstimator",
}  # fmt: skip
OWN = {  # for rayk itself
    "ContextBatch": {"bind", "data", "note_stepped", "position"},
    "Handle": {"add", "add_prompt_logprobs", "begin_again", "beside", "end", "finish", "record_end"},
    "InferenceSession": {"adopt", "dismiss"},
    "KVEventsConfig": {"check_replicas"},
    "SamplingParams": {"choice"},
    "TextContext": {"arrived"},
    "MHAKVCacheParams": {"replica_devices"},
    "MLAKVCacheParams": {"replica_devices"},
    "MultiKVCacheParams": {"replica_devices"},
    "Cluster": {"attached", "deliver_in"},
}
ASKED = {  # every value is answered
    "AdmissionPolicy.quota", "PagedKVCacheManager.holder", "PagedKVCacheManager.reset_prefix_cache",
    "PagedKVCacheManager.get_prefix_cache_hit_counts", "PagedKVCacheManager.shutdown", "Cluster.shutdown", "Handle",
    "Tick", "BatchCharacteristics",
}  # fmt: skip
PLANNED = "MemoryPlanner", "PagedMemoryPlanner"  # their inputs are a model's: tests/unit/planning

Case = Callable[[SimpleNamespace], Any]


def at_nobody(method: str, *before: Any) -> Case:
    return lambda w: getattr(w.manager, method)(*before, 9)


MANAGER: dict[str, Case] = {
    "add_replicas": lambda w: w.manager.add_replicas(0),
    "admit": lambda w: w.manager.admit([w.claimed]),
    "alloc": lambda w: w.manager.alloc(w.free, 0),
    "alloc_dummy": lambda w: w.manager.alloc_dummy("", 0),
    "alloc_many": lambda w: w.manager.alloc_many([[], [], []]),
    "claim": lambda w: w.manager.claim("\ud800", 0),
    "contains": lambda w: w.manager.contains(7, 0),
    "drain_replica": at_nobody("drain_replica"),
    "enter": lambda w: w.manager.enter([w.free]),
    "execute": lambda w: w.manager.execute([[w.free]], lambda inputs, batch: None),
    "get_device_buffer": at_nobody("get_device_buffer"),
    "get_num_disk_pages": at_nobody("get_num_disk_pages"),
    "get_num_host_pages": at_nobody("get_num_host_pages"),
    "get_num_pages": at_nobody("get_num_pages"),
    "get_num_used_disk_pages": at_nobody("get_num_used_disk_pages"),
    "get_num_used_host_pages": at_nobody("get_num_used_host_pages"),
    "get_num_used_pages": at_nobody("get_num_used_pages"),
    "get_pct_used_blocks_after_allocation": lambda w: w.manager.get_pct_used_blocks_after_allocation(w.free, 9),
    "get_req_blocks": at_nobody("get_req_blocks", "r"),
    "num_free_blocks": at_nobody("num_free_blocks"),
    "read_pages": lambda w: w.manager.read_pages([99], 0),
    "release": lambda w: w.manager.release("nobody", 0),
    "remove_replica": lambda w: w.manager.remove_replica(0),
    "reserve": lambda w: w.manager.reserve([[w.claimed]]).__enter__(),
    "resume_replica": at_nobody("resume_replica"),
    "runtime_inputs": lambda w: w.manager.runtime_inputs([[w.free]]),
    "runtime_inputs_for_leaf": lambda w: w.manager.runtime_inputs_for_leaf([[], []]),
    "step": lambda w: w.manager.step([[], []]),
    "tick": lambda w: w.manager.tick([rayk.Tick(release=("nobody",))]),
    "total_num_blocks": at_nobody("total_num_blocks"),
    "try_admit": lambda w: w.manager.try_admit([w.free], [0, 0]),
}  # fmt: skip
CASES: dict[str, Case] = {
    **{f"PagedKVCacheManager.{name}": case for name, case in MANAGER.items()},
    "PagedKVCacheManager": lambda w: PagedKVCacheManager(w.params, w.session, 0, max_batch_size=8),
    "AsyncPagedKVCacheManager": lambda w: AsyncPagedKVCacheManager(w.params, w.session, 8, max_batch_size=0),
    "AdmissionPolicy": lambda w: rayk.AdmissionPolicy(patience=0),
    "Cluster": lambda w: Cluster(model, replicas=0),
    "Cluster.add_replicas": lambda w: w.cluster.add_replicas(0),
    "Cluster.agenerate": lambda w: asyncio.run(w.cluster.agenerate(3)),
    "Cluster.astream": lambda w: asyncio.run(anext(w.cluster.astream([[1]], sampling=7))),
    "Cluster.chat": lambda w: w.cluster.chat([{"role": "user", "content": "x"}]),
    "Cluster.drain_replica": lambda w: w.cluster.drain_replica(9),
    "Cluster.explain": lambda w: w.cluster.explain("nobody"),
    "Cluster.generate": lambda w: w.cluster.generate([[1]], nothing=1),
    "Cluster.remove_replica": lambda w: w.cluster.remove_replica(0),
    "Cluster.resume_replica": lambda w: w.cluster.resume_replica(9),
    "Cluster.stats": lambda w: w.cluster.stats(9),
    "Cluster.stream": lambda w: next(w.cluster.stream(b"bytes")),
    "Cluster.submit": lambda w: raised(w.cluster.submit([500]).result(10).error),
    "Cluster.submit_all": lambda w: w.cluster.submit_all([[1]] * 100_001),
    "ContextBatch": lambda w: rayk.ContextBatch([w.free, w.free]),
    "ContextBatch.add": lambda w: rayk.ContextBatch([w.free]).add(w.free),
    "ContextBatch.update": lambda w: rayk.ContextBatch([w.free]).update([1, 2]),
    "ContextBatch.remove": lambda w: rayk.ContextBatch([w.free]).remove(w.claimed),
    "Handle.result": lambda w: raised(w.cluster.submit([]).result(10).error),
    "InferenceSession": lambda w: InferenceSession("threads"),
    "KVCacheQuantizationConfig": lambda w: rayk.KVCacheQuantizationConfig(quantization_granularity=0),
    "KVConnectorConfig": lambda w: rayk.KVConnectorConfig(num_disk_workers=0),
    "KVEventsConfig": lambda w: rayk.KVEventsConfig("nowhere"),
    "MHAKVCacheParams": lambda w: MHAKVCacheParams(**SHAPE | {"page_size": 0}),
    "MLAKVCacheParams": lambda w: rayk.MLAKVCacheParams(
        dtype="int3", head_dim=2, num_layers=1, devices=["cpu"], num_q_heads=1),
    "MultiKVCacheParams": lambda w: rayk.MultiKVCacheParams(**{k: v for k, v in SHAPE.items() if k != "n_kv_heads"}
        | {"devices": []}),
    "MultiKVCacheParams.from_params": lambda w: rayk.MultiKVCacheParams.from_params({}),
    "SamplingParams": lambda w: rayk.SamplingParams(max_tokens=1, max_new_tokens=2),
    "ScalePolicy": lambda w: rayk.ScalePolicy(least=3, most=1),
    "TenantQuota": lambda w: rayk.TenantQuota(weight=0),
    "TextContext": lambda w: TextContext("r", [], 10),
    "TextContext.realize_future_token": lambda w: w.free.realize_future_token(3),
    "TextContext.update": lambda w: TextContext("r", [1], 1).update(2),
    "attach": lambda w: rayk.attach("x", secret="short"),
    "compute_max_seq_len_fitting_in_cache": lambda w: rayk.compute_max_seq_len_fitting_in_cache(w.params, -1),
    "compute_num_device_blocks": lambda w: rayk.compute_num_device_blocks(w.params, 1),
    "compute_num_host_blocks": lambda w: rayk.compute_num_host_blocks(MHAKVCacheParams(
        **SHAPE, kv_connector="local", host_kvcache_swap_space_gb=-1.0)),
    "desired_replicas": lambda w: rayk.desired_replicas([], rayk.ScalePolicy(), -1),
    "estimated_memory_size": lambda w: rayk.estimated_memory_size(w.params, -1, 1, 1),
    "spec_decode_cache_slack": lambda w: rayk.spec_decode_cache_slack(
        MHAKVCacheParams(**SHAPE | {"num_draft_tokens": -1})),
}  # fmt: skip


def raised(error: BaseException | None) -> None:
    if error is not None:
        raise error


def model(device: str) -> PageModel:
    return PageModel(tokenizer=Tokenizer())


def takes(call: Any) -> bool:
    """Whether it has parameters."""
    try:
        return any(name not in ("self", "cls") for name in inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return False


def public() -> Iterator[str]:
    """Every public callable that is given something."""
    for name in rayk.__all__:
        found = getattr(rayk, name)
        if not callable(found) or name in (*GIVEN, *PLANNED) or (
            inspect.isclass(found) and issubclass(found, BaseException)
        ):  # fmt: skip
            continue
        if takes(found):
            yield name
        for method in dir(found) if inspect.isclass(found) else ():
            part = getattr(found, method)
            if method.startswith("_") or not callable(part) or hasattr(tuple, method) or method in OWN.get(name, ()):
                continue
            if takes(part):
                yield f"{name}.{method}"


@pytest.fixture(scope="module")
def world() -> Iterator[SimpleNamespace]:
    with (
        InferenceSession() as session,
        PagedKVCacheManager(MHAKVCacheParams(**SHAPE), session, 8, max_batch_size=8) as manager,
        Cluster(model, page_size=4, pages=16, max_batch_size=4) as cluster,
    ):
        claimed = TextContext("claimed", [1, 2, 3], 100)
        manager.claim("claimed", 0)
        manager.alloc(claimed, 0)
        yield SimpleNamespace(
            session=session, manager=manager, cluster=cluster, params=manager.params, claimed=claimed,
            free=TextContext("free", [1, 2], 100),
        )  # fmt: skip


def test_every_public_call_has_a_case() -> None:
    asked = {name.removeprefix("Async") for name in public() if not name.startswith("AsyncPagedKVCacheManager.")}
    assert asked - {*CASES, *ASKED} == set()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_loses_nothing(world: SimpleNamespace, name: str) -> None:
    with pytest.raises((RaykError, MemoryPlanError)) as caught:
        CASES[name](world)
    assert 10 < len(str(caught.value)) < 1000, "it says what is wrong"
    manager = world.manager
    manager.check_integrity()
    assert manager.contains("claimed", 0) and manager.get_num_used_pages(0) == 1
    assert not manager.contains("free", 0) and manager.replica_states() == ["ready"]
    assert world.cluster.generate([[1, 2]], max_new_tokens=1)[0].error is None


def test_what_is_awaited_is_checked_likewise() -> None:
    """The asynchronous manager's calls are made of the other's, each with its checks."""
    mine = {name.partition(".")[2] for name in public() if name.startswith("AsyncPagedKVCacheManager.")}
    assert mine <= {*MANAGER, *(name.partition(".")[2] for name in ASKED)}
