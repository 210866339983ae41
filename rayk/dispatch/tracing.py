"""OpenTelemetry spans of requests, of a share of them and when they are over:

    rayk.request                                   from the call to the end
        rayk.placement                             until the scheduler gave it a replica
        rayk.copies                                until its prefix was sent from other replicas, where that paid
        rayk.queue                                 at the replica, until it was admitted
        rayk.prefill                               until its first token
        rayk.decode                                until its last one

Of a request that was placed again the last attempt counts. A span of whoever calls is the parent. A request that is not
sampled costs a comparison; spans are made when a sampled one has ended.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Any

from rayk.dispatch.output import Handle, Output
from rayk.errors import ConfigError

if TYPE_CHECKING:
    from concurrent.futures import Future


class RequestTrace:
    """The moments of one request. Marked by whoever has the lock of its requests."""

    def __init__(self, handle: Handle, tracer: Any, parent: Any) -> None:
        self._handle, self._tracer, self._parent = handle, tracer, parent
        self._offset = time_ns() - monotonic_ns()
        self._marks: dict[str, int] = {}

    def mark(self, moment: str) -> None:
        """Now: "placed" or "sent"."""
        self._marks[moment] = monotonic_ns()

    def end(self, future: Future[Output]) -> None:
        """It is over: make its spans."""
        from opentelemetry import trace

        output, begun, ended = future.result(), int(self._handle.submitted_at * 1e9), monotonic_ns()
        names = ("rayk.id", "rayk.prompt_tokens", "rayk.generated_tokens", "rayk.finish_reason", "rayk.retries")
        values = (output.id, output.prompt_length, len(output.tokens), output.finish_reason, output.retries)
        attributes: dict[str, Any] = dict(zip(names, values, strict=True)) | {"rayk.preemptions": output.preemptions}
        for tier, tokens in zip(("device", "peer", "host", "disk"), output.cached, strict=True):
            attributes[f"rayk.cached_tokens.{tier}"] = tokens
        if output.replica is not None:
            attributes["rayk.replica"] = output.replica
        root = self._tracer.start_span(
            "rayk.request", context=self._parent, start_time=begun + self._offset, attributes=attributes
        )
        if output.error is not None:
            root.record_exception(output.error, timestamp=ended + self._offset)
            root.set_status(trace.Status(trace.StatusCode.ERROR, str(output.error)))
        inside = trace.set_span_in_context(root, self._parent)
        for name, start, stop in self._phases(output, begun, ended):
            if stop > start:
                span = self._tracer.start_span(name, context=inside, start_time=start + self._offset)
                span.end(stop + self._offset)
        root.end(ended + self._offset)

    def _phases(self, output: Output, begun: int, ended: int) -> Iterator[tuple[str, int, int]]:
        placed = self._marks.get("placed")
        yield "rayk.placement", begun, placed or ended
        if placed is None:
            return
        sent = self._marks.get("sent", placed)
        yield "rayk.copies", placed, sent
        if output.queued is None:
            return
        admitted = min(ended, sent + int(output.queued * 1e9))
        yield "rayk.queue", sent, admitted
        first = ended if output.ttft is None else max(admitted, begun + int(output.ttft * 1e9))
        yield "rayk.prefill", admitted, first
        yield "rayk.decode", first, ended


class Tracing:
    """Traces that share (0..1) of the requests of one driver. ConfigError where OpenTelemetry is not installed."""

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"trace_share is {share}, a share of requests from 0 to 1 is needed")
        self._share = share
        if share and find_spec("opentelemetry") is None:
            raise ConfigError("trace_share needs opentelemetry-api: pip install 'rayk[tracing]'")

    def follow(self, handles: Iterator[Handle]) -> Iterator[Handle]:
        """The same handles, some of which are traced from now on."""
        return self._chosen(handles) if self._share else handles

    def _chosen(self, handles: Iterator[Handle]) -> Iterator[Handle]:
        from opentelemetry import context, trace

        tracer, parent = trace.get_tracer("rayk"), context.get_current()
        for handle in handles:
            if random.random() < self._share:
                handle.trace = request_trace = RequestTrace(handle, tracer, parent)
                handle.future.add_done_callback(request_trace.end)
            yield handle
