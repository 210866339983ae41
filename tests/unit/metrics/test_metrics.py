"""The table of metrics, readings of everything that is in it, and what carries them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rayk import AdmissionPolicy, Cluster, InferenceSession, PagedKVCacheManager
from rayk import protocol as m
from rayk.kvcache.connector import TierCount
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.readings import read_pages
from rayk.kvcache.request import Reused, Usage
from rayk.metrics.histogram import AT_ONCE, Histogram
from rayk.metrics.reading import InMemory, Reading, Reporter, aliases, reading
from rayk.metrics.table import ALIASES, METRICS, SECONDS, markdown
from rayk.params import OBJECT_STORE
from rayk.protocol.context_sync import ContextSender
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.readings import read_scheduler
from rayk.scheduler.router.router import RouterSettings
from rayk.server.metrics import ServerMetrics
from rayk.transport.choice import Endpoint

from ..engine.fake import PageModel, Tokenizer  # noqa: TID252  # tests/ is no package that has an absolute name

OF = {"cluster": "c", "replica_idx": "0", "node": "n"}


def test_the_table_says_what_prometheus_wants() -> None:
    for metric in [*METRICS.values(), *(alias.metric for alias in ALIASES)]:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not {"request_id", "tenant"} & set(metric.labels)
        assert metric.unit and metric.help.endswith(".")


def test_the_page_of_metrics_is_the_table(repo: Path) -> None:
    assert markdown() in (repo / "docs/metrics.md").read_text(), "make it anew, as docs/metrics.md says"


def test_a_histogram_counts_what_was_added() -> None:
    times = Histogram(SECONDS)
    values = np.random.default_rng(3).lognormal(-3, 2, 3 * AT_ONCE).tolist()
    for at in range(0, len(values), 7):
        times.add(*values[at : at + 7])
    times.add(0.0)  # what was not done
    read = times.read()
    assert read.counts == np.histogram(values, [0, *SECONDS, np.inf])[0].tolist()
    assert read.total == pytest.approx(sum(values)) and read.count == len(values)
    median = float(np.median(values))
    found = read.quantile(0.5)
    assert found is not None and np.searchsorted(SECONDS, found) == np.searchsorted(SECONDS, median)
    assert read.plus(read).count == 2 * read.count
    assert Histogram(SECONDS).quantile(0.5) is None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = {"replicas": 2, "page_size": 4, "pages": 64, "max_batch_size": 4, "chunk_size": 16}
    policy = AdmissionPolicy(max_waiting=64)
    with Cluster(lambda device: PageModel(tokenizer=Tokenizer()), admission=policy, **made) as cluster:  # type: ignore[arg-type]  # all ints
        yield cluster


def test_a_cluster_reads_what_it_did(cluster: Cluster) -> None:
    outputs = cluster.generate([[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 5, max_new_tokens=4)
    kept = InMemory()
    kept.write(found := cluster.readings())
    assert kept.total("rayk_tokens_total", kind="prompt") == 45
    assert kept.total("rayk_tokens_total", kind="generated") == 20
    assert kept.total("rayk_prefix_tokens_queried_total") == 45
    assert kept.total("rayk_prefix_tokens_hit_total") == sum(o.cached_tokens for o in outputs)
    assert kept.total("rayk_pages") == 128 and kept.total("rayk_pages", state="used") == 0
    assert kept.total("rayk_pages", state="cached") > 0
    assert kept.total("rayk_requests_ended_total", outcome="finished") == 5
    assert kept.total("rayk_admissions_total", outcome="admitted") == 5
    assert kept.total("rayk_replica_state", state="ready") == 2
    for name in ("queue", "ttft", "e2e"):
        times = [each for each in kept.values[f"rayk_{name}_seconds"].values() if isinstance(each, Histogram)]
        assert sum(each.count for each in times) == 5, name
    [placing] = kept.values["rayk_placement_seconds"].values()
    assert isinstance(placing, Histogram) and placing.count == 5
    steps = [each for each in kept.values["rayk_itl_seconds"].values() if isinstance(each, Histogram)]
    assert 0 < sum(each.count for each in steps) <= kept.total("rayk_engine_steps_total")
    vllm = {(each.metric.name, each.labels): each.value for each in aliases(found, "tiny")}
    assert sum(v for (name, _), v in vllm.items() if name == "vllm:prompt_tokens_total") == 45  # type: ignore[misc]  # numbers
    assert vllm["vllm:kv_cache_usage_perc", ("tiny", "0")] == 0.0
    assert {name for name, _ in vllm} == {alias.metric.name for alias in ALIASES}


def everything(cluster: Cluster) -> Iterator[Reading]:
    """From all that can be read."""
    yield from cluster.readings()
    server = ServerMetrics()
    server.ended(200, 0.5, 0.1, 3, 1, 2)
    yield from server.read(1)
    tiers = TierCount(8, 3, 16, 4)
    yield from read_pages(Usage(4, 3, 2), 1, KVCacheMetrics(), 9, Reused(1, 2, 3, 4), tiers, 64, OF)
    core = SchedulerCore([1, 2], RouterSettings("least-loaded", (8, 8), 4, "sha256", b"", False), True, lambda: 0.0)
    core.links.joined(0, 1, Endpoint("here", "127.0.0.1", [], 64))
    core.links.joined(1, 2, Endpoint("here", "127.0.0.1", [], 64))
    core.links.carried(0, 1, OBJECT_STORE, 2, 0.1)
    yield from read_scheduler(core, OF)


def test_everything_in_the_table_is_read(cluster: Cluster) -> None:
    from rayk import MHAKVCacheParams

    read = {each.metric.name for each in everything(cluster)}
    shape = {"head_dim": 4, "num_layers": 1, "n_kv_heads": 1, "page_size": 4}
    params = MHAKVCacheParams(dtype="float32", devices=["cpu"], enable_prefix_caching=True, **shape)  # type: ignore[arg-type]  # all ints
    with PagedKVCacheManager(params, InferenceSession("inline"), 8, max_batch_size=4) as manager:
        read |= {each.metric.name for each in manager._calls.local(0).read(OF)}  # type: ignore[union-attr]  # inline
    assert read == set(METRICS)


def test_pages_are_in_one_state_each_while_requests_hold_cached_ones(cluster: Cluster) -> None:
    handles = cluster.submit_all([[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 6, max_new_tokens=40)
    kept, states = InMemory(), ("used", "cached", "free")
    while not all(handle.done for handle in handles):
        kept.write(cluster.readings())
        assert sum(kept.total("rayk_pages", state=state) for state in states) == 128
        assert all(value >= 0 for value in kept.values["rayk_pages"].values())  # type: ignore[operator]  # numbers


def test_a_reading_has_all_its_labels() -> None:
    assert reading("rayk_pages", 1, OF | {"more": "x"}, state="used").labels == ("c", "0", "n", "used")
    with pytest.raises(KeyError):
        reading("rayk_pages", 1, OF)


def test_a_reporter_goes_on_after_a_failure() -> None:
    import threading

    came, turns = threading.Event(), iter([RuntimeError("lost"), [reading("rayk_drivers", 1, OF)]])

    class Seen:
        def write(self, readings: object) -> None:
            came.set()

    def read() -> list[Reading]:
        this = next(turns)
        if isinstance(this, Exception):
            raise this
        return this

    reporter = Reporter(read, Seen(), every=0.01)
    assert came.wait(10)
    reporter.stop()


def test_times_of_admissions_are_counted_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody does for long: what is kept of them is bounded."""
    from rayk import MHAKVCacheParams, TextContext
    from rayk.replica import service

    monkeypatch.setattr(service, "UNREAD", 10)
    shape = {"head_dim": 4, "num_layers": 1, "n_kv_heads": 1, "page_size": 4}
    params = MHAKVCacheParams(dtype="float32", devices=["cpu"], enable_prefix_caching=True, **shape)  # type: ignore[arg-type]  # all ints
    with PagedKVCacheManager(params, InferenceSession("inline"), 64, max_batch_size=4) as manager:
        replica = manager._calls.local(0)  # type: ignore[union-attr]  # inline
        for turn in range(20):
            ctx = TextContext(f"r{turn}", list(range(turn, turn + 6)), 8)
            replica.answer(m.Admit(ContextSender().pack([ctx], whole=True), True))
            replica.answer(m.Release([ctx.request_id]))
            assert len(replica._took) <= 10
        found = {each.metric.name: each.value for each in replica.read(OF)}
    for name in ("rayk_claim_seconds", "rayk_alloc_seconds"):
        times = found[name]
        assert isinstance(times, Histogram) and times.count == 20, name
