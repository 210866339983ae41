"""W4: a trace's first requests, one after the other, on a pool that holds a small part of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from rayk.bench.core.cache import PAGE_SIZE, make_contexts, make_manager
from rayk.bench.core.case import Sample
from rayk.bench.core.prompts import serve
from rayk.context import IntArray
from rayk.simulate.replay import Event, replay
from rayk.workloads.generators import chat
from rayk.workloads.request import Workload
from rayk.workloads.traces import read_trace

REQUESTS = 2000
POOL = 50_000


class Served:
    """The first `requests` requests of `trace`, or generated chats of the same shape; prompts only."""

    def __init__(self, trace: Path | None, requests: int) -> None:
        self._trace, self._requests = trace, requests

    @cached_property
    def workload(self) -> Workload:
        """Read or generated when first asked for."""
        return read_trace(self._trace, self._requests) if self._trace else chat(self._requests, scale=1.0)

    @cached_property
    def _prompts(self) -> list[IntArray]:
        return [request.prompt() for request in self.workload.requests]

    @property
    def name(self) -> str:
        """The file's or the generator's name."""
        return self._trace.name if self._trace else "generated chats"

    def run(self, lap_ns: float) -> Sample:
        """Milliseconds for all of them."""
        manager, contexts = make_manager(POOL), make_contexts(self._prompts)
        return Sample(lambda: serve(manager, contexts, lap_ns) / 1e6, manager)

    def lru_hit_rate(self) -> float:
        """What an independent LRU of as many pages hits on the same requests."""
        requests = self.workload.requests
        events = [
            event
            for i, r in enumerate(requests)
            for event in (Event("admit", i, r.prompt_length), Event("release", i, r.prompt_length))
        ]
        return replay(events, requests, PAGE_SIZE, POOL).hit_rate or 0.0
