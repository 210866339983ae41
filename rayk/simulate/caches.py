"""Caches of pages over a page tree (paths.py), each with the policy that says what goes when there is no room.

Both serve requests one after the other: what a request's prompt finds is its leading run of cached pages, then all
its pages are put in, its answer's too. A page is evicted only when no cached page continues it, as a replica does.

    lru      least recently used first, the deepest page of a use first: what a replica does
    belady   the page whose next use is furthest away first: the most that any policy could reach
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from rayk.simulate.paths import Paths

Range = tuple[int, int]
Changed = Callable[[int, int], None]
"""Hears of pages first .. first + count - 1."""


class Cache(Protocol):
    """One replica's pages. `serve` returns how many pages the prompt found, and then holds the request's pages."""

    def serve(self, request: int) -> int:
        """Serve the request of that number."""
        ...


def _ignore(first: int, count: int) -> None:
    pass


class LruCache:
    """`capacity` pages (None: no limit). `stored` and `removed` hear of each change, in order."""

    def __init__(
        self, paths: Paths, capacity: int | None, stored: Changed = _ignore, removed: Changed = _ignore
    ) -> None:
        self._paths, self._stored, self._removed = paths, stored, removed
        self._room = capacity if capacity is not None else 1 << 62
        self._have: dict[int, int] = {}  # segment -> its leading pages that are cached
        self._used: dict[int, int] = {}  # segment -> tick of its last use
        self._queue: deque[tuple[int, int]] = deque()  # (tick, deepest segment of that use), stale ones included
        self._tick = 0

    def serve(self, request: int) -> int:
        """Pages that the prompt found. A path longer than the capacity is cached as far as it fits."""
        paths, have, used = self._paths, self._have, self._used
        size, path = paths.size, paths.path[request]
        hits, missing = find(paths, have, request)
        self._tick = tick = self._tick + 1
        for s in path:
            if s not in have:
                break
            used[s] = tick
        if missing > self._room:
            self._evict(missing - self._room)
        tip = -1
        for s in path:
            held = have.get(s, 0)
            more = min(size[s] - held, self._room)
            if more:
                have[s] = held + more
                self._room -= more
                self._stored(paths.first[s] + held, more)
            elif not held:
                break
            used[s] = tick
            tip = s
            if held + more < size[s]:
                break
        if tip >= 0:
            self._queue.append((tick, tip))
        return hits

    def _evict(self, pages: int) -> None:
        """Make room for `pages` more than there is, or as much as there is without what this tick uses."""
        have, used, queue = self._have, self._used, self._queue
        while pages > 0 and queue:
            tick, s = queue.popleft()
            if used.get(s) != tick:
                continue  # used again since, or gone
            held = have[s]
            gone = min(held, pages)
            pages -= gone
            self._room += gone
            self._removed(self._paths.first[s] + held - gone, gone)
            if gone < held:
                have[s] = held - gone
                queue.appendleft((tick, s))
            else:
                del have[s], used[s]
                above = self._paths.parent[s]
                if used.get(above) == tick:
                    queue.appendleft((tick, above))


class BeladyCache:
    """As LruCache; `next_use[i][k]` says when segment k of request i's path is used next after i (a large number:
    never), as `next_uses` computes it."""

    def __init__(
        self,
        paths: Paths,
        capacity: int | None,
        next_use: Sequence[Sequence[int]],
        stored: Changed = _ignore,
        removed: Changed = _ignore,
    ) -> None:
        self._paths, self._next_use, self._stored, self._removed = paths, next_use, stored, removed
        self._room = capacity if capacity is not None else 1 << 62
        self._have: dict[int, int] = {}
        self._next: dict[int, int] = {}  # segment -> its next use
        self._heap: list[tuple[int, int]] = []  # (-next use, -segment), stale ones included; deeper first on a tie

    def serve(self, request: int) -> int:
        """Pages that the prompt found."""
        paths, have = self._paths, self._have
        path, size = paths.path[request], paths.size
        hits, missing = find(paths, have, request)
        for s in path:
            self._next.pop(s, None)  # not to be evicted while it is in use
        if missing > self._room:
            self._evict(missing - self._room)
        for s, after in zip(path, self._next_use[request], strict=True):
            held = have.get(s, 0)
            more = min(size[s] - held, self._room)
            if not held + more:
                break
            if more:
                have[s] = held + more
                self._room -= more
                self._stored(paths.first[s] + held, more)
            self._next[s] = after
            heapq.heappush(self._heap, (-after, -s))
            if held + more < size[s]:
                break
        return hits

    def _evict(self, pages: int) -> None:
        have, following, heap = self._have, self._next, self._heap
        while pages > 0 and heap:
            after, s = heap[0]
            if following.get(-s) != -after:
                heapq.heappop(heap)
                continue
            held = have[-s]
            gone = min(held, pages)
            pages -= gone
            self._room += gone
            self._removed(self._paths.first[-s] + held - gone, gone)
            if gone < held:
                have[-s] = held - gone
            else:
                heapq.heappop(heap)
                del have[-s], following[-s]


def find(paths: Paths, have: dict[int, int], request: int) -> tuple[int, int]:
    """Pages of the request's prompt that are cached, and pages of its whole path that are not."""
    size, path, prompt = paths.size, paths.path[request], paths.prompt_segments[request]
    cached = hits = 0
    for depth, s in enumerate(path):
        held = have.get(s, 0)
        cached += held
        if depth < prompt:
            hits = cached
        if held < size[s]:
            break
    return hits, paths.length[request] - cached


def next_uses(paths: Paths, order: Sequence[int], group: Sequence[int]) -> list[list[int]]:
    """For each request and segment of its path, the place in `order` where a prompt uses that segment next.

    `group[k]` is the cache that request order[k] goes to, where that is known beforehand, or one number for all: then
    the next use is that by any request.
    """
    never = len(order)
    seen: list[dict[int, int]] = [{} for _ in range(max(group, default=0) + 1)]
    out: list[list[int]] = [[] for _ in paths.path]
    for place in range(never - 1, -1, -1):
        request = order[place]
        last, path = seen[group[place]], paths.path[request]
        out[request] = [last.get(s, never) for s in path]
        for s in path[: paths.prompt_segments[request]]:
            last[s] = place
    return out
