"""`rayk bench --forward hf`: the same workloads, answered by a Hugging Face model on its engines.

Prompts keep their structure, not their tokens: each slot becomes a token of the model's vocabulary, and where a prompt
quotes an earlier answer it quotes what the model really answered. Answers have the lengths that the workload says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from rayk.bench.loop import SAMPLE_S, LoopSettings
from rayk.bench.lru import Event
from rayk.bench.measure import Measured, ReplicaCounts, Sample
from rayk.bench.request import BenchRequest, IntArray, Workload, slot_tokens
from rayk.bench.request_source import Feed
from rayk.bench.settings import BenchSettings
from rayk.errors import ConfigError, ReplicaLostError
from rayk.kvcache.tick import Admission
from rayk.params import DTYPE_BYTES
from rayk.sampling import SamplingParams

if TYPE_CHECKING:
    from rayk.cluster import Cluster
    from rayk.dispatch.output import Handle, Output
    from rayk.engine.settings import EngineStats

log = logging.getLogger("rayk.bench")

FIRST_TOKEN = 3  # of those that prompts are made of: the first ones are special in most vocabularies
FITS = 0.97  # of a model's length, when lengths are scaled to it


class ModelShape(msgspec.Struct, frozen=True):
    """What a checkpoint's config says of its cache. `length` counts prompt and answer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    length: int

    def applied(self, settings: BenchSettings) -> BenchSettings:
        """The settings with this model's cache."""
        return msgspec.structs.replace(
            settings, layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype
        )


def model_shape(folder: Path) -> ModelShape:
    """Read from the checkpoint's config, without loading it. CheckpointError or ConfigError when that cannot be."""
    from transformers import AutoConfig

    from rayk.models.checkpoint import check_folder

    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{folder}: {str(error).splitlines()[0]}") from None
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return ModelShape(
        text.num_hidden_layers,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype if dtype in DTYPE_BYTES else "float32",
        text.max_position_embeddings,
    )


def longest(workload: Workload) -> int:
    """Tokens of the longest request, prompt and answer."""
    return max(request.prompt_length + request.output_length for request in workload.requests)


def fitted(make: Callable[[float], Workload], length: int) -> Workload:
    """A generated workload whose lengths are scaled down as far as `length` tokens for a request demand."""
    scale, workload = 1.0, make(1.0)
    while longest(workload) > length and scale > 1e-3:
        scale *= min(0.9, FITS * length / longest(workload))
        workload = make(scale)
    if longest(workload) > length:
        raise ConfigError(f"no request of this workload fits a model of {length} tokens; use another workload")
    return workload


def with_room(settings: BenchSettings, workload: Workload) -> BenchSettings:
    """At least the pages that an engine wants for the longest request: its last token has a slot, too."""
    return msgspec.structs.replace(settings, pages=max(settings.pages, -(-longest(workload) // settings.page_size)))


def start(settings: BenchSettings, session: Any, workload: Workload) -> Cluster:
    """The model's replicas."""
    from rayk.cluster import Cluster

    assert settings.model is not None
    return Cluster(
        settings.model,
        session,
        replicas=settings.replicas,
        page_size=settings.page_size,
        pages=settings.pages,
        max_batch_size=settings.max_batch_size,
        chunk_size=settings.token_budget or longest(workload),
        router=settings.router,
        host_memory=settings.host_pages * settings.params().bytes_per_page or None,
        disk_dir=settings.disk_dir,
        disk_memory=settings.disk_bytes or None,
        peer_copies=settings.peer_copies,
    )


class ModelDriver:
    """Serves one workload from one Cluster, once; what Driver is for managers. `measured` is complete at any moment."""

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        settings: LoopSettings,
        clock: Callable[[], float],
        on_tick: Callable[[ModelDriver], None] = lambda driver: None,
    ) -> None:
        self.cluster = cluster
        self.settings = settings
        self.measured = Measured([ReplicaCounts() for _ in range(settings.replicas)])
        self.running = self.waiting = 0
        self._vocab = cluster.facts[0].vocab_size
        self._feed = Feed(workload.requests)
        self._clock, self._on_tick = clock, on_tick
        self._start = self._now = clock()
        self._sampled_at = -SAMPLE_S
        self._open: dict[int, tuple[BenchRequest, float]] = {}  # by number: the request, and when it was sent
        self._answers: dict[int, list[int]] = {}  # by output_first
        self._timeline: list[tuple[float, Event]] = []
        self._news: SimpleQueue[Handle] = SimpleQueue()
        self._missed: set[int] = set()  # replicas

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._now - self._start

    def run(self) -> Measured:
        """Serve the workload. KeyboardInterrupt ends it; `measured` then has the fault."""
        self._start = self._now = self._clock()
        try:
            self._send()
            while self._open:
                handle = self._news.get()
                self._now = self._clock()
                self.measured.ticks += 1
                if handle.done and handle.number in self._open:
                    self._finish(*self._open.pop(handle.number), handle.result())
                    self._send()
                else:
                    handle.take()
                self._sample()
                self._on_tick(self)
            self._sample(last=True)
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, what was measured is kept
            self._now = self._clock()
            self.measured.fault(error, self.elapsed)
            self.measured.failed += len(self._open)
            raise
        finally:
            self.measured.elapsed = self.elapsed
            self.measured.admitted.sort(key=lambda entry: entry[0])
            self._timeline.sort(key=lambda entry: entry[0])
            self.measured.events = [event for _, event in self._timeline]
        return self.measured

    def _send(self) -> None:
        settings = self.settings
        while len(self._open) < settings.concurrency:
            over = settings.duration_s is not None and self.elapsed >= settings.duration_s
            request = None if over else self._feed.take()
            if request is None:
                return
            self.measured.submitted += 1
            sampling = SamplingParams(max_new_tokens=request.output_length, ignore_eos=True)
            prompt = {"id": request.request_id, "tokens": self.prompt(request)}
            [handle] = self.cluster.submit_all(prompt, sampling, on_news=self._news.put)
            self._open[handle.number] = (request, self.elapsed)
            if handle.done:
                self._news.put(handle)

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

    def _finish(self, request: BenchRequest, sent: float, output: Output) -> None:
        measured = self.measured
        self._feed.finished(request.index)
        measured.preempted += output.preemptions
        measured.retried += output.retries
        measured.generated += len(output.tokens)
        if output.error is not None:
            measured.failed += 1
            measured.fault(output.error, self.elapsed, request.request_id)
            return
        self._answers[request.output_first] = output.tokens
        measured.completed += 1
        admitted, first = sent + (output.queued or 0.0), sent + (output.ttft or 0.0)
        replica = output.replica or 0
        measured.admit(admitted, replica, request.prompt_length, Admission(replica, None, *output.cached))
        measured.latency["e2e"].add(output.seconds)
        if output.ttft is not None:
            measured.latency["ttft"].add(output.ttft)
        for gap, count in output.gaps:
            measured.latency["itl"].add(gap / count, count)
        processed = request.prompt_length + len(output.tokens) - 1
        self._timeline += [
            (admitted, Event("admit", request.index, request.prompt_length)),
            (max(admitted, first), Event("commit", request.index, request.prompt_length)),
            (self.elapsed, Event("grow", request.index, processed)),
            (self.elapsed, Event("release", request.index, processed)),
        ]

    def _sample(self, last: bool = False) -> None:
        if not last and self.elapsed - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = self.elapsed
        measured = self.measured
        self.running = self.waiting = measured.recomputed = 0
        for replica, state in enumerate(self.cluster.replica_states()):
            stats = self._stats(replica) if state != "lost" else None
            if stats is None:
                self._miss(replica)
                continue
            measured.replicas[replica].see(stats.peak_used_pages)
            measured.replicas[replica].see(stats.pages - stats.free_pages)
            self.running += stats.running
            measured.recomputed += stats.recomputed_tokens
        self.waiting = max(0, len(self._open) - self.running)
        used = [counts.used_pages for counts in measured.replicas]
        measured.samples.append(Sample(self.elapsed, used, self.running, self.waiting, measured.completed))

    def _stats(self, replica: int) -> EngineStats | None:
        """None of a replica that is just being lost: the cluster hears of that a moment later."""
        try:
            return self.cluster.stats(replica)
        except Exception as error:  # Ray's among them
            log.debug("the counters of replica %d cannot be read: %s", replica, error)
            return None

    def _miss(self, replica: int) -> None:
        """Note once that a replica is gone; its last numbers stay."""
        if replica not in self._missed:
            self._missed.add(replica)
            error = ReplicaLostError(replica, 0, [], "it does not answer any more")
            self.measured.fault(error, self.elapsed)
