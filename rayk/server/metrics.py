"""What a server counts, in Prometheus' text form: its requests, and what its replicas say of themselves."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rayk.cluster import Cluster
from rayk.errors import RaykError

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STATES = ("ready", "draining", "lost", "removed", "starting")


class ServerMetrics:
    """Of one server. Names are those of docs/serving.md."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("rayk_server_requests", "Requests for tokens, by status.", ["status"], **made)
        self._tokens = Counter("rayk_server_tokens", "Tokens of prompts and answers.", ["kind"], **made)
        self._seconds = Histogram("rayk_server_request_seconds", "Until the last byte.", buckets=SECONDS, **made)
        self._first = Histogram("rayk_server_first_token_seconds", "Until the first.", buckets=SECONDS, **made)
        self._open = Gauge("rayk_server_open_requests", "Requests for tokens that are not over.", **made)
        self._states = Gauge(
            "rayk_replica_state", "1 for the state that a replica is in.", ["replica_idx", "state"], **made
        )
        self._pages = Gauge("rayk_pages", "Pages of a replica.", ["replica_idx", "state"], **made)
        self._phases = Gauge("rayk_requests", "Requests of a replica.", ["replica_idx", "phase"], **made)
        self._engine = Gauge(
            "rayk_engine_tokens", "Tokens of a replica since its start.", ["replica_idx", "kind"], **made
        )

    def ended(self, status: int, seconds: float, first: float | None, prompt: int, cached: int, generated: int) -> None:
        """A request for tokens is over."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)
        if first is not None:
            self._first.observe(max(0.0, first))
        for kind, count in (("prompt", prompt), ("cached", cached), ("generated", generated)):
            self._tokens.labels(kind).inc(count)

    def text(self, cluster: Cluster, open_requests: int) -> bytes:
        """All of it now. Asks the replicas: not for an event loop."""
        self._open.set(open_requests)
        for replica, state in enumerate(cluster.replica_states()):
            for each in STATES:
                self._states.labels(str(replica), each).set(each == state)
        for replica in cluster.live:
            try:
                stats = cluster.stats(replica)
            except RaykError:  # lost, or it does not answer: the others are told of
                continue
            name = str(replica)
            self._pages.labels(name, "total").set(stats.pages)
            self._pages.labels(name, "free").set(stats.free_pages)
            self._phases.labels(name, "waiting").set(stats.waiting)
            self._phases.labels(name, "running").set(stats.running)
            self._engine.labels(name, "prompt").set(stats.prompt_tokens)
            self._engine.labels(name, "cached").set(stats.cached_tokens)
            self._engine.labels(name, "generated").set(stats.generated_tokens)
        found: bytes = generate_latest(self._registry)
        return found
