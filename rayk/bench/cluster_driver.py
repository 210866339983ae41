"""`rayk bench --forward hf`: the same workloads, answered by the engines of a Cluster.

Prompts keep their structure, not their tokens: each slot becomes a token of the model's vocabulary, and where a prompt
quotes an earlier answer it quotes what the model really answered. Answers have the lengths that the workload says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from rayk.bench.chaos.undisturbed import Asked
from rayk.bench.loop import ClosedLoop
from rayk.bench.measure import Answered, Measured
from rayk.bench.settings import BenchSettings
from rayk.errors import ReplicaLostError
from rayk.kvcache.tick import Admission
from rayk.sampling import SamplingParams
from rayk.scheduler.membership import State
from rayk.simulate.replay import Event
from rayk.workloads.request import BenchRequest, IntArray, Workload, slot_tokens

if TYPE_CHECKING:
    from rayk.cluster import Cluster
    from rayk.dispatch.output import Handle

log = logging.getLogger("rayk.bench")

FIRST_TOKEN = 3  # of those that prompts are made of: the first ones are special in most vocabularies


class ClusterDriver(ClosedLoop):
    """Serves a workload from one Cluster."""

    running = waiting = 0

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        settings: BenchSettings,
        clock: Callable[[], float],
        on_tick: Callable[[Any], None] = lambda driver: None,
    ) -> None:
        super().__init__(workload, settings, clock, on_tick)
        self.cluster = cluster
        self._vocab = cluster.facts[0].vocab_size
        self._open: dict[int, tuple[BenchRequest, float]] = {}  # by number: the request, and when it was sent
        self._answers: dict[int, list[int]] = {}  # by output_first
        self._timeline: list[tuple[float, Event]] = []
        self._news: SimpleQueue[Handle] = SimpleQueue()
        self._missed: set[int] = set()  # replicas
        self._pids: dict[int, int] = {}  # by replica
        self.asked: list[Asked] = []
        """Every request that was answered, if they are to be asked again without faults."""

    def run(self) -> Measured:
        """Serve the workload; see ClosedLoop. Admissions and events come in the order of their times in the end."""
        try:
            return super().run()
        finally:
            self.measured.admitted.sort(key=lambda entry: entry[0])
            self.measured.events = [event for _, event in sorted(self._timeline, key=lambda entry: entry[0])]

    def _take(self, request: BenchRequest) -> None:
        sampling = SamplingParams(max_new_tokens=request.output_length, ignore_eos=True)
        if self.settings.chaos is not None and request.index % 2:  # greedy and seeded ones in turn
            sampling = msgspec.structs.replace(sampling, temperature=1.0, seed=self.settings.seed + request.index)
        prompt = {"id": request.request_id, "tokens": self.prompt(request)}
        [handle] = self.cluster.submit_all(prompt, sampling, on_news=self._news.put)
        self._open[handle.number] = (request, self.elapsed)
        if handle.done:
            self._news.put(handle)

    def _step(self) -> None:
        wait = max(0.0, self._start + self._feed.next_at - self._clock()) if self._sending else math.inf
        try:
            handle = self._news.get(timeout=wait if math.isfinite(wait) else None)
        except Empty:
            self._now = self._clock()
            self._sample()
            return
        self._now = self._clock()
        self.measured.ticks += 1
        if handle.done and handle.number in self._open:
            self._finish(*self._open.pop(handle.number), handle)
        else:
            handle.take()
        self._sample()

    def prompt(self, request: BenchRequest) -> IntArray:
        """The request's prompt in the model's vocabulary, [prompt_length] int32."""
        parts: list[IntArray] = []
        for first, count in request.runs.tolist():
            answer = self._answers.get(first, [])
            if first >= 0:
                parts.append(self._words(slot_tokens(np.arange(first, first + count, dtype=np.int64))))
            elif len(answer) >= count:
                parts.append(np.array(answer[:count], np.int32))
            else:  # of a request that failed
                parts.append(self._words(np.arange(-first, count - first, dtype=np.int64)))
        return np.concatenate(parts)

    def _words(self, tokens: npt.NDArray[Any]) -> IntArray:
        """A token of the vocabulary for each: the same for the same."""
        low = min(FIRST_TOKEN, self._vocab - 1)
        return (tokens.astype(np.int64) % (self._vocab - low) + low).astype(np.int32)

    def _finish(self, request: BenchRequest, sent: float, handle: Handle) -> None:
        measured, output = self.measured, handle.result()
        measured.preempted += output.preemptions
        measured.retried += output.retries
        measured.generated += len(output.tokens)
        self._left(request, output.error)
        if output.error is not None:
            return
        if self.settings.chaos is not None:
            self.asked.append(Asked(request.request_id, handle.prompt, handle.sampling, output.tokens, output.retries))
        self._answers[request.output_first] = output.tokens
        admitted, first = sent + (output.queued or 0.0), sent + (output.ttft or 0.0)
        replica = output.replica or 0
        measured.admit(admitted, replica, request.prompt_length, Admission(replica, None, *output.cached))
        measured.latency["e2e"].add(output.seconds)
        if output.ttft is not None:
            measured.latency["ttft"].add(output.ttft)
            itl = (output.seconds - output.ttft) / max(1, len(output.tokens) - 1)
            measured.answered.append(Answered(output.ttft, itl, output.seconds))
        for gap, count in output.gaps:
            measured.latency["itl"].add(gap / count, count)
        processed = request.prompt_length + len(output.tokens) - 1
        self._timeline += [
            (admitted, Event("admit", request.index, request.prompt_length)),
            (max(admitted, first), Event("commit", request.index, request.prompt_length)),
            (self.elapsed, Event("grow", request.index, processed)),
            (self.elapsed, Event("release", request.index, processed)),
        ]

    def _look(self) -> None:
        """The engines' counters; a lost one's last numbers stay, and that it is gone is noted once."""
        measured = self.measured
        self.running = measured.recomputed = 0
        for replica, state in enumerate(self.cluster.replica_states()):
            try:
                stats = self.cluster.stats(replica) if state != State.lost else None
            except Exception as error:  # Ray's among them; the cluster learns of a loss a moment later
                stats = None
                log.debug("the counters of replica %d cannot be read: %s", replica, error)
            if stats is None:
                if self.settings.chaos is None and replica not in self._missed:
                    self._missed.add(replica)
                    measured.fault(ReplicaLostError(replica, 0, [], "it does not answer any more"), self.elapsed)
                continue
            pid = self.cluster.facts[replica].pid
            measured.replicas[replica].restarts += self._pids.setdefault(replica, pid) != pid
            self._pids[replica] = pid
            measured.replicas[replica].see(stats.peak_used_pages)
            measured.replicas[replica].see(stats.pages - stats.free_pages)
            self.running += stats.running
            measured.recomputed += stats.recomputed_tokens
        self.waiting = max(0, len(self._open) - self.running)
