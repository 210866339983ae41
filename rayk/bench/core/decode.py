"""W3: a running batch decodes. Lengths are staggered, so that each step a sixteenth of it goes on to a new page."""

from __future__ import annotations

from time import thread_time_ns

import numpy as np

from rayk.batch import ContextBatch
from rayk.bench.core.cache import PAGE_SIZE, make_contexts, make_manager, random_prompts
from rayk.bench.core.case import Sample
from rayk.bench.core.prompts import PROMPT
from rayk.context import TextContext
from rayk.manager import PagedKVCacheManager

STEPS = 512
BATCHES = (1, 32, 256)
HAS_BATCH_API = hasattr(PagedKVCacheManager, "alloc_many")


class Decode:
    """`batch` requests of about 1,024 tokens, `steps` times: alloc, runtime_inputs, (update,) step.

    One call of alloc() for each request, or with `many` one of alloc_many() for the batch.
    """

    def __init__(self, batch: int, steps: int, many: bool) -> None:
        self._batch, self._steps, self._many = batch, steps, many

    def run(self, lap_ns: float) -> Sample:
        manager = make_manager(max_batch_size=self._batch)
        contexts = start_batch(manager, self._batch)
        work = decode_many if self._many else decode_each
        per = self._batch * self._steps * 1e3
        return Sample(lambda: (work(manager, contexts, self._steps) - 2 * lap_ns * self._steps) / per, manager)


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


def decode_many(manager: PagedKVCacheManager, contexts: list[TextContext], steps: int) -> float:
    """The same with the contexts in a ContextBatch. Publishing the pages it put off counts, too."""
    alloc_many, runtime_inputs, step = manager.alloc_many, manager.runtime_inputs, manager.step
    batch = ContextBatch(contexts)
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
