"""What `--router round-robin --forward none` hits, modelled a second time to be compared with the closed loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from rayk.simulate.replay import Keys, PageLru
from rayk.workloads.request import BenchRequest


def round_robin_hit_rate(
    requests: Sequence[BenchRequest], replicas: int, pages: int, page_size: int, concurrency: int
) -> float:
    """Hit rate of `replicas` separate LRU caches of `pages` pages each, from a closed loop of its own.

    Request i goes to replica i mod `replicas`; `concurrency` requests are in flight over all of them, first come first
    served; a prompt is processed in one step, then one token a step; full pages are committed after the step that
    filled them, and given back in the step after the request's last. A request that does not fit waits for one to
    finish; when one cannot grow the newest on its replica starts over. This is how the driver behaves with
    `--router round-robin --forward none`, written a second time to be compared with it. Sessions are not modelled: a
    request may be sent before its predecessor has finished.
    """
    keys = Keys(requests, page_size)
    sides = [_Side(PageLru(pages), keys, page_size) for _ in range(replicas)]
    counted: dict[int, int] = {}  # request -> tokens hit at its first admission
    submitted = finished = 0
    while finished < len(requests):
        while submitted < len(requests) and submitted - finished < concurrency:
            sides[submitted % replicas].waiting.append((submitted, requests[submitted].prompt_length))
            submitted += 1
        for side in sides:
            for request, hits in side.admit():
                counted.setdefault(request, hits * page_size)
        for side in sides:
            finished += side.step(requests)
    return sum(counted.values()) / sum(request.prompt_length for request in requests)


class _Side:
    """One replica of round_robin_hit_rate(): its cache, its queue, and the tokens of its running requests."""

    def __init__(self, cache: PageLru, keys: Keys, page_size: int) -> None:
        self.cache, self.keys, self.page_size = cache, keys, page_size
        self.waiting: deque[tuple[int, int]] = deque()
        self.running: dict[int, int] = {}  # request -> tokens so far, oldest first
        self.processed: dict[int, int] = {}  # request -> tokens whose pages are full and not committed yet
        self.leaving: list[int] = []
        self.starting_over: list[tuple[int, int]] = []
        self.blocked = False

    def admit(self) -> Iterator[tuple[int, int]]:
        """Admit from the head of the queue while there is room: (request, pages hit) of each."""
        while self.waiting and not (self.blocked and (self.running or self.leaving)):
            request, tokens = self.waiting[0]
            hits = self.cache.admit(request, self.keys.of(request, tokens - 1), -(-tokens // self.page_size))
            if hits is None:
                self.blocked = True
                return
            self.waiting.popleft()
            self.running[request] = tokens
            yield request, hits

    def step(self, requests: Sequence[BenchRequest]) -> int:
        """Commit and give back what the last step left behind, then one token for each; how many requests left."""
        for request, tokens in self.processed.items():
            self.cache.commit(request, self.keys.of(request, tokens))
        for request in (*self.leaving, *(request for request, _ in self.starting_over)):
            self.cache.release(request)
        left, self.leaving = len(self.leaving), []
        self.waiting.extendleft(self.starting_over)
        self.blocked = self.blocked and not left
        self.processed, self.starting_over = {}, []
        refused = False
        for request, tokens in list(self.running.items()):
            if not self.cache.grow(request, -(-tokens // self.page_size)):
                refused = True
                continue
            self.processed[request] = tokens
            self.running[request] = tokens + 1
            if tokens + 1 == requests[request].prompt_length + requests[request].output_length:
                self.leaving.append(request)
                del self.running[request]
        if refused and not self.leaving:
            newest, tokens = self.running.popitem()
            self.starting_over.append((newest, tokens))
            self.blocked = True
        return left
