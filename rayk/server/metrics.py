"""What a server counts, and Prometheus' text form of it and of what its Cluster says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from rayk.cluster import Cluster
from rayk.metrics.histogram import Histogram
from rayk.metrics.reading import Reading, aliases, reading
from rayk.metrics.table import SECONDS

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class ServerMetrics:
    """Of one server, which counts in its event loop. `vllm_model`: metrics have vLLM's names too, with that model."""

    def __init__(self, vllm_model: str | None = None) -> None:
        self._vllm_model = vllm_model
        self._requests, self._tokens = Counter[str](), Counter[str]()
        self._seconds, self._first = Histogram(SECONDS), Histogram(SECONDS)

    def ended(self, status: int, seconds: float, first: float | None, prompt: int, cached: int, generated: int) -> None:
        """A request for tokens is over."""
        self._requests[str(status)] += 1
        self._seconds.add(seconds)
        if first is not None:
            self._first.add(max(1e-6, first))
        self._tokens.update(prompt=prompt, cached=cached, generated=generated)

    def read(self, open_requests: int) -> list[Reading]:
        """Of the server alone; in its event loop."""
        found = [reading("rayk_server_open_requests", open_requests, {})]
        found += [reading("rayk_server_requests_total", n, {}, status=s) for s, n in self._requests.items()]
        found += [reading("rayk_server_tokens_total", n, {}, kind=kind) for kind, n in self._tokens.items()]
        found.append(reading("rayk_server_request_seconds", self._seconds.read(), {}))
        return [*found, reading("rayk_server_first_token_seconds", self._first.read(), {})]

    def text(self, cluster: Cluster, own: Iterable[Reading]) -> bytes:
        """All of it, with the server's `own`. Asks the replicas: not for an event loop."""
        found = [*own, *cluster.readings()]
        if self._vllm_model is not None:
            found += aliases(found, self._vllm_model)
        registry = CollectorRegistry()
        registry.register(_Collector(found))
        return bytes(generate_latest(registry))


class _Collector:
    """Shows readings to prometheus_client."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        """Metrics of all readings."""
        families: dict[str, Family] = {}
        for metric, labels, value in self._readings:
            family = families.get(metric.name)
            if family is None:
                kinds: dict[str, type[Family]] = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
                made = kinds.get(metric.kind, HistogramMetricFamily)
                family = families[metric.name] = made(metric.name, metric.help, labels=metric.labels)
            if isinstance(value, Histogram):
                assert isinstance(family, HistogramMetricFamily)
                so_far, buckets = 0, list[tuple[str, float]]()
                for bound, count in zip((*map(str, value.bounds), "+Inf"), value.counts, strict=True):
                    so_far += count
                    buckets.append((bound, so_far))
                family.add_metric(labels, buckets, value.total)
            else:
                assert not isinstance(family, HistogramMetricFamily)
                family.add_metric(labels, value)
        yield from families.values()
