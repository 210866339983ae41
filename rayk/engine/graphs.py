"""Decode steps as CUDA graphs: one for each padded batch size, captured at start, replayed instead of launched.

A graph reads and writes fixed places: tokens, block table and lengths are copied there before each replay. Rows that
pad a batch are dummies: one token at position 0 of the null page, which nobody reads. A replay is bitwise what the
model gives for the same padded batch. Prompts, mixed steps and batches beyond the largest graph run as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from rayk.engine.forward import Model
from rayk.kvcache.lookup_table import table_width
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.runtime_inputs import LeafInputs, ShardInputs

log = logging.getLogger("rayk.engine")

Forward = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """Makes something that can be repeated of a forward whose inputs stay where they are."""

    def record(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        """What repeats it, and where its result is after each repetition."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory: record the largest first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # kernels choose and allocate what they need before they are captured
            for _ in range(2):
                forward()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = forward()
        return graph.replay, result


class EagerRecorder:
    """Repeats a forward by running it again: the same places and paddings without a device, for tests."""

    def record(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        result = forward().clone()

        def again() -> None:
            result.copy_(forward())

        return again, result


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8 up to 64 and every 16 beyond, and the largest."""
    steps = [1, 2, 4, *range(8, 65, 8), *range(80, largest, 16)]
    return sorted({*(size for size in steps if size < largest), largest})


class DecodeGraphs:
    """A model whose decode steps are replayed. It stands in for `model` in an engine over the same core.

    The logits that it returns are valid until its next call.
    """

    def __init__(self, model: Model, core: ReplicaCore, recorder: Recorder, sizes: Sequence[int] | None = None) -> None:
        self.vocab_size = model.vocab_size
        self.max_length = model.max_length
        self.eos_token_ids = model.eos_token_ids
        self.tokenizer = model.tokenizer
        self.backend = str(getattr(model, "backend", ""))
        self.num_bytes = getattr(model, "num_bytes", None)
        self.replays = 0  # so far
        self._model = model
        self._whole: Callable[..., torch.Tensor] = model.logits
        self._null = core.num_pages
        inputs = core.runtime_inputs([])
        assert isinstance(inputs, LeafInputs)
        shard = inputs.shards[0]
        assert shard.kv_blocks is not None
        device = shard.kv_blocks.device
        self._sizes = sorted(sizes or graph_sizes(core.max_batch_size))
        self._limit = min(model.max_length, core.num_pages * core.params.page_size)
        rows, width = self._sizes[-1], table_width(-(-(self._limit + 1) // core.params.page_size))
        self._table = torch.full((rows, width), self._null, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._staged = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._used = (0, 0)  # rows and columns of the table that may hold page ids
        self._graphs = {size: recorder.record(self._forward(shard, size)) for size in reversed(self._sizes)}

    def _forward(self, shard: ShardInputs, rows: int) -> Forward:
        inputs = replace(
            shard,
            lookup_table=self._table[:rows],
            cache_lengths=self._lengths[:rows],
            max_prompt_length=torch.tensor([1], dtype=torch.int32),
            max_cache_length=torch.tensor([self._limit], dtype=torch.int32),
            attention_dispatch_metadata=torch.tensor([rows, 1, 1, self._limit], dtype=torch.int64),
        )
        return lambda: self._model.logits(inputs, self._tokens[:rows], [1] * rows)

    def logits(self, inputs: ShardInputs, tokens: torch.Tensor, counts: Sequence[int], **more: bool) -> torch.Tensor:
        """As the model's; by a graph when every row has one token and nothing `more` is wanted."""
        if more:
            return self._whole(inputs, tokens, counts, **more)
        rows, width = inputs.lookup_table.shape
        size = next((size for size in self._sizes if size >= rows), 0)
        if not size or len(tokens) != rows or width > self._table.shape[1]:
            return self._model.logits(inputs, tokens, counts)
        used_rows, used_width = self._used
        if used_rows > rows:  # they are padding now
            self._table[rows:used_rows, :used_width] = self._null
            self._lengths[rows:used_rows] = 0
        if used_width > width:
            self._table[:rows, width:used_width] = self._null
        self._used = (rows, width)
        self._table[:rows, :width].copy_(inputs.lookup_table, non_blocking=True)
        self._lengths[:rows].copy_(inputs.cache_lengths, non_blocking=True)
        # The copy of the step before has ended: its tokens were sampled and read.
        self._staged[:rows].copy_(tokens)
        self._tokens[:rows].copy_(self._staged[:rows], non_blocking=True)
        replay, logits = self._graphs[size]
        replay()
        self.replays += 1
        return logits[:rows]


def with_graphs(model: Model, core: ReplicaCore) -> Model:
    """The model with its decode steps captured, where it runs on CUDA and they can be; else the model."""
    device = core.buffers.all_buffers[0].device
    if device.type != "cuda":
        return model
    try:
        return DecodeGraphs(model, core, CudaRecorder(device))
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        torch.cuda.synchronize(device)
        log.warning("decode steps are not captured as CUDA graphs: %s", str(error).splitlines()[0])
        return model
