"""W1 and W2: requests one after the other, each claimed, allocated, processed, committed and released. And a replica in
the middle of its day: every page taken, a request running for each hundred pages, the rest cached.

The forward and the sampled token are the caller's: context.update() is between the timed parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import thread_time_ns

import numpy as np

from rayk.bench.core.cache import PAGE_SIZE, POOL, make_contexts, make_manager, random_prompts
from rayk.bench.core.case import Sample
from rayk.context import IntArray, TextContext
from rayk.manager.manager import PagedKVCacheManager

PROMPT = 1024
SHARED, OWN = 4096, 128
REQUESTS = 1000
SMALL_POOL = 8_000
FULL_REQUESTS = 300
PAGES_PER_RUNNING = 100  # of which a request of 1,025 tokens holds 65
_PART = 100  # contexts made at a time: their tokens take as much memory as those that the cache keeps


def serve(manager: PagedKVCacheManager, contexts: Sequence[TextContext], lap_ns: float = 0.0) -> float:
    """Serve each context to its first token, one after the other: nanoseconds of all of them together."""
    claim, alloc, step, release = manager.claim, manager.alloc, manager.step, manager.release
    now, spent = thread_time_ns, 0
    for ctx in contexts:
        name = ctx.request_id
        start = now()
        claim(name, 0)
        alloc(ctx, 0)
        spent += now() - start
        ctx.update(1)
        start = now()
        step([[ctx]])
        release(name, 0)
        spent += now() - start
    return spent - 2 * lap_ns * len(contexts)


class Prompts:
    """`requests` unique prompts of 1,024 tokens on `pages` pages, after `before` others that fill the pool."""

    def __init__(self, requests: int, pages: int = POOL, before: int = 0, hashing: str | None = None) -> None:
        self._requests, self._pages, self._before, self._hashing = requests, pages, before, hashing

    def run(self, lap_ns: float) -> Sample:
        manager = make_manager(self._pages, hashing=self._hashing)
        prompts = random_prompts(self._before + self._requests, PROMPT)
        serve(manager, make_contexts(prompts[: self._before], "before"))
        contexts = make_contexts(prompts[self._before :])
        return Sample(lambda: serve(manager, contexts, lap_ns) / self._requests / 1e3, manager)


class SharedPrefix:
    """`requests` prompts of one common prefix of 4,096 tokens and 128 of their own."""

    def __init__(self, requests: int, hashing: str | None = None) -> None:
        self._requests, self._hashing = requests, hashing

    def prompts(self) -> list[IntArray]:
        (shared,) = random_prompts(1, SHARED)
        return [np.concatenate([shared, own]) for own in random_prompts(self._requests, OWN, seed=1)]

    def run(self, lap_ns: float) -> Sample:
        manager, contexts = make_manager(hashing=self._hashing), make_contexts(self.prompts())
        return Sample(lambda: serve(manager, contexts, lap_ns) / self._requests / 1e3, manager)


def filling(pages: int) -> int:
    """Prompts that fill `pages` pages with cached ones."""
    return pages // (PROMPT // PAGE_SIZE)


def crowded(pages: int) -> PagedKVCacheManager:
    """A full replica of `pages` pages with pages / 100 running requests of 1,024 processed tokens."""
    manager, running = make_manager(pages), pages // PAGES_PER_RUNNING
    for part in _parts("crowd", running, seed=1):
        start(manager, part)
    left = pages - manager.get_num_used_pages(0)
    for part in _parts("cached", left * PAGE_SIZE // PROMPT, seed=2):
        serve(manager, part)
    return manager


def start(manager: PagedKVCacheManager, contexts: list[TextContext]) -> None:
    """Let the requests run: claimed, their prompts allocated, processed and committed, no token sampled yet.

    Not sampling one keeps each context's array, which belongs to the caller, as it is.
    """
    for ctx in contexts:
        ctx.tokens.chunk(PROMPT)
        manager.claim(ctx.request_id, 0)
        manager.alloc(ctx, 0)
        ctx.update(1)
    manager.step([contexts])


def _parts(name: str, count: int, seed: int) -> Iterator[list[TextContext]]:
    """Contexts of `count` unique prompts of 1,024 tokens and one to go, in parts."""
    for first in range(0, count, _PART):
        prompts = random_prompts(min(_PART, count - first), PROMPT + 1, seed=seed << 32 | first)
        yield make_contexts(prompts, f"{name}-{first}-")
