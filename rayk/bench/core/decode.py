"""W3: a running batch decodes. Lengths are staggered, so that each step a sixteenth of it goes on to a new page."""

from __future__ import annotations

from time import thread_time_ns

import numpy as np

from rayk.bench.core.cache import PAGE_SIZE, make_contexts, make_manager, random_prompts
from rayk.bench.core.case import Sample
from rayk.bench.core.prompts import PROMPT
from rayk.context import TextContext
from rayk.kvcache.context_batch import ContextBatch
from rayk.manager.manager import PagedKVCacheManager

STEPS = 512
BATCHES = (1, 32, 256)


class Decode:
    """`batch` requests of about 1,024 tokens, `steps` times: alloc, runtime_inputs, (update,) step.

    One call of alloc() for each request, or with `many` one of alloc_many() for a ContextBatch.
    """

    def __init__(self, batch: int, steps: int, many: bool) -> None:
        self._batch, self._steps, self._many = batch, steps, many

    def run(self, lap_ns: float) -> Sample:
        manager = make_manager(max_batch_size=self._batch)
        contexts = start_batch(manager, self._batch)
        batch = ContextBatch(contexts) if self._many else None

        def work() -> float:
            steps, laps = self._steps, 2 * self._steps * lap_ns
            spent = decode_each(manager, contexts, steps) if batch is None else decode_many(manager, batch, steps)
            return (spent - laps) / self._batch / steps / 1e3

        return Sample(work)


def start_batch(manager: PagedKVCacheManager, batch: int) -> list[TextContext]:
    """`batch` requests of 1,024 to 1,039 tokens that have their first token."""
    prompts = random_prompts(batch, PROMPT + PAGE_SIZE)
    contexts = make_contexts([prompt[: PROMPT + i % PAGE_SIZE] for i, prompt in enumerate(prompts)])
    for ctx in contexts:
        manager.claim(ctx.request_id, 0)
        manager.alloc(ctx, 0)
        ctx.update(1)
    manager.step([contexts])
    return contexts


def decode_each(manager: PagedKVCacheManager, contexts: list[TextContext], steps: int) -> float:
    """`steps` steps with an alloc() for each request: nanoseconds of all of them together."""
    alloc, runtime_inputs, step = manager.alloc, manager.runtime_inputs, manager.step
    now, spent, batches = thread_time_ns, 0, [contexts]
    for token in range(steps):
        start = now()
        for ctx in contexts:
            alloc(ctx, 0)
        runtime_inputs(batches)
        spent += now() - start
        for ctx in contexts:
            ctx.update(token)
        start = now()
        step(batches)
        spent += now() - start
    return spent


def decode_many(manager: PagedKVCacheManager, batch: ContextBatch, steps: int) -> float:
    """The same with one call for all of a ContextBatch. Publishing the pages that it put off counts, too."""
    alloc_many, runtime_inputs, step = manager.alloc_many, manager.runtime_inputs, manager.step
    now, spent, batches = thread_time_ns, 0, [batch]
    for token in range(steps):
        start = now()
        alloc_many(batches)
        runtime_inputs(batches)
        spent += now() - start
        batch.update(np.full(len(batch), token, np.int32))
        start = now()
        step(batches)
        spent += now() - start
    start = now()
    manager.num_free_blocks()  # an honest answer needs the pages published
    spent += now() - start
    return spent
