"""A replica in the middle of its day: every page taken, a request running for each hundred pages, the rest cached."""

from __future__ import annotations

from collections.abc import Iterator

from rayk.bench.core.cache import PAGE_SIZE, make_contexts, make_manager, random_prompts
from rayk.bench.core.prompts import PROMPT, serve
from rayk.context import TextContext
from rayk.manager.manager import PagedKVCacheManager

PAGES_PER_RUNNING = 100  # of which a request of 1,025 tokens holds 65
_PART = 100  # contexts made at a time: their tokens take as much memory as those that the cache keeps


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
