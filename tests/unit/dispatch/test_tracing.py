"""Spans of requests, as OpenTelemetry's exporter in memory gets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.dispatch import tracing
from rayk.dispatch.tracing import Tracing
from rayk.errors import ConfigError

from ..engine.fake import PageModel, Tokenizer  # noqa: TID252  # tests/ is no package that has an absolute name

export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="opentelemetry-sdk is not installed")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Asked for what was exported so far."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield kept.get_finished_spans
    provider.shutdown()


def cluster(share: float) -> Cluster:
    made = {"replicas": 2, "page_size": 4, "pages": 64, "max_batch_size": 4, "chunk_size": 16}
    return Cluster(lambda device: PageModel(tokenizer=Tokenizer()), trace_share=share, **made)  # type: ignore[arg-type]  # all ints


def test_a_request_and_its_phases(spans: Any) -> None:
    with cluster(1.0) as served:
        [output] = served.generate([[1, 2, 3, 4, 5, 6, 7]], max_new_tokens=5)
    found = {span.name: span for span in spans()}
    root = found["rayk.request"]
    assert root.attributes["rayk.id"] == output.id and root.attributes["rayk.prompt_tokens"] == 7
    assert root.attributes["rayk.generated_tokens"] == 5 and root.attributes["rayk.replica"] == output.replica
    assert root.attributes["rayk.finish_reason"] == "length" and root.status.is_ok is not False
    phases = [found[name] for name in ("rayk.placement", "rayk.prefill", "rayk.decode")]
    assert all(each.parent.span_id == root.context.span_id for each in phases)
    assert root.start_time == phases[0].start_time and root.end_time >= phases[-1].end_time
    times = [(each.start_time, each.end_time) for each in phases]
    assert all(start < stop for start, stop in times) and times == sorted(times)
    assert abs((root.end_time - root.start_time) / 1e9 - output.seconds) < 0.5


def test_the_callers_span_is_the_parent_and_errors_are_said(spans: Any) -> None:
    from opentelemetry import trace

    with cluster(1.0) as served, trace.get_tracer("caller").start_as_current_span("call") as call:
        handles = served.submit_all([[1, 2, 3], [4, 5, 6]], max_new_tokens=200)
        handles[1].cancel()
        outputs = [handle.result(30) for handle in handles]
    roots = {span.attributes["rayk.id"]: span for span in spans() if span.name == "rayk.request"}
    assert {each.parent.span_id for each in roots.values()} == {call.get_span_context().span_id}
    cancelled = roots[outputs[1].id]
    assert not cancelled.status.is_ok and cancelled.attributes["rayk.finish_reason"] == "cancelled"
    assert cancelled.events[0].name == "exception"


def test_a_share_is_traced(spans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([0.1, 0.6, 0.4, 0.9])
    monkeypatch.setattr(tracing.random, "random", lambda: next(draws))
    with cluster(0.5) as served:
        served.generate([[1, 2], [3, 4], [5, 6], [7, 8]], max_new_tokens=2)
    assert sum(span.name == "rayk.request" for span in spans()) == 2
    with cluster(0.0) as served:
        served.generate([[1, 2]], max_new_tokens=2)
    assert sum(span.name == "rayk.request" for span in spans()) == 2


def test_what_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"trace_share is 2"):
        Tracing(2)
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rayk\[tracing\]"):
        Tracing(0.1)
    Tracing(0.0)
