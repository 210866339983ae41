"""An independent model of a paged prefix cache with LRU eviction, to judge a run by.

It shares nothing with the cache itself: pages are identified by chain values (chain.py), there are no page ids, no
tree and no tokens, only

    pinned     key -> number of running requests that hold the page
    evictable  keys nobody holds, in eviction order: least recently released first, deepest page of a release first
    private    the number of pages that running requests hold and that carry no key (yet)

and pinned + evictable + private <= capacity. The rest is empty and is taken before anything is evicted. A request's
full pages get their keys when they are committed (after the forward that filled them), generated tokens included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rayk.workloads.chain import page_chain
from rayk.workloads.request import BenchRequest


@dataclass(slots=True)
class _Held:
    keys: list[int]
    private: int


class PageLru:
    """One cache of `capacity` pages (None: infinite). All methods are O(pages touched)."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.pinned: dict[int, int] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.private = 0
        self._held: dict[int, _Held] = {}

    def admit(self, request: int, keys: Sequence[int], pages: int) -> int | None:
        """Pin the leading `keys` that are cached and take pages for the rest of `pages` in all.

        Returns the number of pages hit, or None when the capacity does not allow it; then nothing is changed.
        """
        hits = 0
        evictable_hits = 0
        for key in keys:
            if key not in self.pinned:
                if key not in self.evictable:
                    break
                evictable_hits += 1
            hits += 1
        if self._room(pages - hits + evictable_hits):
            for key in keys[:hits]:
                self._pin(key)
            self._take(pages - hits)
            self._held[request] = _Held(list(keys[:hits]), pages - hits)
            return hits
        return None

    def grow(self, request: int, pages: int) -> bool:
        """Take pages until `request` holds `pages`; False, and nothing changed, when the capacity does not allow it."""
        held = self._held[request]
        more = max(0, pages - len(held.keys) - held.private)
        if not self._room(more):
            return False
        self._take(more)
        held.private += more
        return True

    def commit(self, request: int, keys: Sequence[int]) -> None:
        """Key the request's full pages: `keys` are those of all of them, from the first page on."""
        held = self._held[request]
        for key in keys[len(held.keys) :]:
            self._pin(key)  # a page with this key may exist already: then ours becomes empty
            held.keys.append(key)
            held.private -= 1
            self.private -= 1

    def release(self, request: int) -> None:
        """Give up what the request holds: pages without a key become empty, the others evictable, deepest first."""
        held = self._held.pop(request)
        self.private -= held.private
        for key in reversed(held.keys):
            if self.pinned[key] == 1:
                del self.pinned[key]
                self.evictable[key] = None
            else:
                self.pinned[key] -= 1

    def check_integrity(self) -> None:
        """Assert that the counts agree with what requests hold."""
        counts: dict[int, int] = {}
        for held in self._held.values():
            for key in held.keys:
                counts[key] = counts.get(key, 0) + 1
        assert counts == self.pinned and not counts.keys() & self.evictable.keys()
        assert self.private == sum(held.private for held in self._held.values())
        assert self.capacity is None or self.private + len(self.pinned) + len(self.evictable) <= self.capacity

    def _room(self, pages: int) -> bool:
        return self.capacity is None or len(self.pinned) + self.private + pages <= self.capacity

    def _pin(self, key: int) -> None:
        self.evictable.pop(key, None)
        self.pinned[key] = self.pinned.get(key, 0) + 1

    def _take(self, pages: int) -> None:
        self.private += pages
        if self.capacity is not None:
            surplus = self.private + len(self.pinned) + len(self.evictable) - self.capacity
            for _ in range(surplus):
                self.evictable.popitem(last=False)


class Event(NamedTuple):
    """What a run did to its caches, in order. `tokens` is the request's length (admit, grow) or what was processed."""

    kind: str  # "admit", "commit", "grow" or "release"
    request: int
    tokens: int


@dataclass(slots=True)
class Replayed:
    """Hits of a replay, one entry for each first admission in order: [n] tokens."""

    prompt: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)

    @property
    def hit_rate(self) -> float | None:
        """Cached over prompt tokens; None when nothing was admitted."""
        return sum(self.cached) / sum(self.prompt) if self.prompt else None


class Keys:
    """Page keys of requests (prompt and answer), computed when first asked for and kept until dropped."""

    def __init__(self, requests: Sequence[BenchRequest], page_size: int) -> None:
        self._requests, self._page_size = requests, page_size
        self._kept: dict[int, list[int]] = {}

    def of(self, request: int, tokens: int) -> list[int]:
        """Keys of the full pages of the first `tokens` tokens."""
        if request not in self._kept:
            asked = self._requests[request]
            whole = np.concatenate([asked.prompt(), asked.output()])
            self._kept[request] = page_chain(whole, self._page_size).tolist()
        return self._kept[request][: tokens // self._page_size]

    def drop(self, request: int) -> None:
        """Forget a request that will not be asked for soon."""
        self._kept.pop(request, None)


def replay(events: Iterable[Event], requests: Sequence[BenchRequest], page_size: int, capacity: int | None) -> Replayed:
    """What one cache of `capacity` pages would have served of a run's events (None: an infinite cache).

    A request counts once, at its first admission. Where the cache has no room (it always has when `capacity` is what
    all replicas of the run had together) the request is counted as a miss and left out of the cache.
    """
    cache, keys, out = PageLru(capacity), Keys(requests, page_size), Replayed()
    counted: set[int] = set()
    inside: set[int] = set()
    for kind, request, tokens in events:
        if kind == "admit":
            hits = cache.admit(request, keys.of(request, tokens - 1), -(-tokens // page_size))
            if hits is not None:
                inside.add(request)
            if request not in counted:
                counted.add(request)
                out.prompt.append(tokens)
                out.cached.append((hits or 0) * page_size)
        elif request not in inside:
            continue
        elif kind == "commit":
            cache.commit(request, keys.of(request, tokens))
        elif kind == "grow":
            if not cache.grow(request, -(-tokens // page_size)):
                cache.release(request)
                inside.remove(request)
        else:
            cache.commit(request, keys.of(request, tokens))
            cache.release(request)
            inside.remove(request)
            keys.drop(request)
    return out
