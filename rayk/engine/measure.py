"""What the engine's loop costs beside the forward and the sampling: CPU time of a decode step of a full batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import thread_time
from typing import Any

import numpy as np
import torch

from rayk.engine import engine as engine_module
from rayk.engine.engine import Engine
from rayk.engine.request import Request
from rayk.engine.sampling import SamplingParams
from rayk.engine.settings import EngineSettings
from rayk.inputs import ShardInputs
from rayk.params import MHAKVCacheParams
from rayk.replica import ReplicaCore

PROMPT = 64  # tokens
LENGTH = 4096


@dataclass(frozen=True)
class LoopCost:
    """CPU seconds of one decode step of `batch` requests, forward and sampling left out: the mean of `steps`."""

    batch: int
    steps: int
    seconds: float


class _Still:
    """A model that does nothing, and counts the time that it takes."""

    vocab_size, max_length, eos_token_ids, tokenizer = 1000, LENGTH, (999,), None

    def __init__(self) -> None:
        self.logits_of = torch.zeros(0, self.vocab_size)

    def logits(self, inputs: ShardInputs, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        if len(counts) != len(self.logits_of):
            self.logits_of = torch.zeros(len(counts), self.vocab_size)
        return self.logits_of


def loop_cost(batch: int = 256, steps: int = 300, page_size: int = 16) -> LoopCost:
    """Measure it on this thread, with the core's decode path, stop tokens and events, as in service."""
    pages = batch * (-(-(PROMPT + steps + 40) // page_size) + 1)
    params = MHAKVCacheParams(
        dtype="int8",
        n_kv_heads=1,
        head_dim=1,
        num_layers=1,
        page_size=page_size,
        devices=["cpu"],
        enable_prefix_caching=True,
    )
    engine = Engine(
        ReplicaCore(params, 0, pages, batch), _Still(), EngineSettings(chunk_size=batch * PROMPT, max_queue=batch)
    )
    rng = np.random.default_rng(0)
    for number in range(batch):
        prompt = rng.integers(1, 900, PROMPT - int(rng.integers(page_size)))  # so that pages fill at any step
        engine.submit(Request(number, str(number), prompt, SamplingParams(max_new_tokens=steps + 30)))
    left_out = 0.0
    real = engine_module.sample

    def timed(*given: Any) -> Any:
        nonlocal left_out
        began = thread_time()
        found = real(*given)
        left_out += thread_time() - began
        return found

    engine_module.sample = timed
    try:
        while engine.stats().waiting:
            engine.step()
        for _ in range(10):
            engine.step()
        costs = []
        for _ in range(steps):
            left_out, began = 0.0, thread_time()
            engine.step()
            costs.append(thread_time() - began - left_out)
    finally:
        engine_module.sample = real
    return LoopCost(batch, steps, sum(costs) / steps)
