"""What the engine's loop costs beside the forward and the sampling: CPU time of a decode step of a full batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import thread_time

import numpy as np
import torch

from rayk.engine.engine import Engine
from rayk.engine.sampler import Sampled, sample
from rayk.engine.sequence import SequenceState
from rayk.engine.settings import EngineSettings
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.runtime_inputs import ShardInputs
from rayk.params import MHAKVCacheParams
from rayk.protocol.engine import Report, encode
from rayk.protocol.engine_request import Request
from rayk.sampling import SamplingParams

PROMPT = 64  # tokens
LENGTH = 4096


@dataclass(frozen=True)
class LoopCost:
    """CPU seconds of one decode step of `batch` requests and its report: the mean of `steps`.

    Forward and sampling are left out. The goal is at most 0.5 ms for 256 requests on the machine of the stored limits.
    """

    batch: int
    steps: int
    seconds: float


class _Still:
    """A model that does nothing."""

    vocab_size: int = 1000
    max_length: int = LENGTH
    eos_token_ids: tuple[int, ...] = (999,)
    tokenizer: None = None

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
    left_out = 0.0

    def timed(logits: torch.Tensor, sequences: Sequence[SequenceState], plain: bool) -> Sampled:
        nonlocal left_out
        began = thread_time()
        found = sample(logits, sequences, plain)
        left_out += thread_time() - began
        return found

    settings = EngineSettings(chunk_size=batch * PROMPT, max_queue=batch)
    engine = Engine(ReplicaCore(params, 0, pages, batch), _Still(), settings, sampler=timed)
    rng = np.random.default_rng(0)
    for number in range(batch):
        prompt = rng.integers(1, 900, PROMPT - int(rng.integers(page_size)))  # so that pages fill at any step
        engine.submit(Request(number, str(number), prompt, SamplingParams(max_new_tokens=steps + 30)))
    while engine.stats().waiting:
        engine.step()
    for _ in range(10):
        engine.step()
    left_out, began = 0.0, thread_time()
    for _ in range(steps):
        encode(Report.of(engine.step(), engine.steps))
    return LoopCost(batch, steps, (thread_time() - began - left_out) / steps)
