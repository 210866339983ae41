"""Who waits, who goes first and who is turned away when a cluster has more to do than it can: a queue without a clock.

A request that finds no room waits. The queue is bounded, and so is the wait: what could not meet its deadline any more
is refused at once with OverloadedError, which says when to try again.

Order. Tenants take turns by weight (start-time fair queueing over pages). Of one tenant the request that is due
first goes first; it is due at its deadline, or `patience` seconds after it came if it has none, and `boost` seconds
earlier for each step of priority. What is first is waited for until it fits: nothing small overtakes it.

So nobody starves:

* Of its own tenant a request is overtaken only by such that came less than patience + boost x (their priority less its
  own) seconds after it.
* Two tenants that both wait get pages in the ratio of their weights, up to one largest request of each.
* A tenant at its quota waits for its own requests to leave, and for nobody else's.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rayk.errors import ConfigError, OverloadedError

SMOOTHING = 0.1  # weight of the latest service in what is usual
SPREADS = 3  # mean deviations from the usual service that a deadline has to leave room for
SOONEST, LATEST = 0.05, 60.0  # bounds of a retry_after, seconds


class TenantQuota(msgspec.Struct, frozen=True):
    """`weight` is a tenant's share against others'; `max_pages` what it may hold at once (None: no limit)."""

    weight: float = 1.0
    max_pages: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0 or (self.max_pages is not None and self.max_pages < 1):
            raise ConfigError(f"a tenant needs a weight above 0 and at least 1 page, got {self}")


class AdmissionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How many may wait and for how long. `high` and `low` are parts of all pages: from `high` on nobody is admitted
    until less than `low` is in use. Seconds; `tenants` without an entry share `others`."""

    max_waiting: int = 1024
    patience: float = 30.0
    boost: float = 5.0
    high: float = 0.95
    low: float = 0.9
    tenants: dict[str, TenantQuota] = {}
    others: TenantQuota = TenantQuota()

    def __post_init__(self) -> None:
        if self.max_waiting < 0 or self.patience <= 0 or self.boost < 0:
            raise ConfigError(f"max_waiting and boost are at least 0 and patience is above 0, got {self}")
        if not 0 < self.low <= self.high <= 1:
            raise ConfigError(f"0 < low <= high <= 1 is needed, got low {self.low} and high {self.high}")

    def quota(self, tenant: str) -> TenantQuota:
        """That tenant's; ones that are not named each have `others`."""
        return self.tenants.get(tenant, self.others)


@dataclass(order=True)
class Ticket:
    """A request that waits; ordered by when it is due. `pages` it will hold, `finish` when it has to be done."""

    due: float
    number: int
    request_id: str = field(compare=False)
    tenant: str = field(compare=False)
    pages: int = field(compare=False)
    came: float = field(compare=False)
    finish: float = field(compare=False)
    payload: Any = field(compare=False, default=None)


class _Tenant:
    __slots__ = ("finish", "heap", "held")

    def __init__(self) -> None:
        self.heap: list[Ticket] = []
        self.held = 0
        self.finish = 0.0  # virtual time at which its last request was paid for


class AdmissionQueue:
    """Requests that wait and what the admitted ones hold, in pages of all replicas together; `clock` in seconds."""

    def __init__(self, policy: AdmissionPolicy, pages: int, clock: Callable[[], float]) -> None:
        self.policy = policy
        self.pages = pages
        self.held = 0
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._admitted: dict[str, tuple[str, int, float]] = {}  # id -> tenant, pages, when
        self._numbers = itertools.count()
        self._waiting = self._waiting_pages = 0
        self._virtual = 0.0
        self._closed = False  # above the high mark, and not yet below the low one
        self._service = 0.0  # seconds that a request usually stays, 0 while nobody left
        self._spread = 0.0  # how far from that they are
        self._freed = 0.0  # pages a second that leave while others wait
        self._left_at = clock()

    def __len__(self) -> int:
        return self._waiting

    # -- waiting -----------------------------------------------------------------------------------

    def offer(
        self,
        request_id: str,
        pages: int,
        tenant: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        payload: Any = None,
    ) -> Ticket:
        """A request wants to be admitted, and to be done `deadline` seconds from now. OverloadedError turns it away."""
        now, name, policy = self._clock(), tenant or "", self.policy
        quota = policy.quota(name)
        if pages > self.pages * policy.high or (quota.max_pages is not None and pages > quota.max_pages):
            raise OverloadedError(request_id, "it needs more pages than it may ever have", LATEST)
        if self._waiting >= policy.max_waiting:
            raise OverloadedError(request_id, f"{self._waiting} requests wait already", self.retry_after())
        wait = self.expected_wait(pages)
        if deadline is not None and wait + self._usual() > deadline:
            why = f"it would take {wait + self._usual():.2f} s and its deadline is {deadline:.2f} s"
            raise OverloadedError(request_id, why, self.retry_after())
        finish = now + (deadline if deadline is not None else float("inf"))
        due = min(now + policy.patience, finish) - priority * policy.boost
        ticket = Ticket(due, next(self._numbers), request_id, name, pages, now, finish, payload)
        waiting = self._tenants.setdefault(name, _Tenant())
        if not waiting.heap:  # nobody saves up turns while it has nothing to do
            waiting.finish = max(waiting.finish, self._virtual)
        heapq.heappush(waiting.heap, ticket)
        self._waiting += 1
        self._waiting_pages += pages
        return ticket

    def take(self) -> Ticket | None:
        """The next request to be admitted, which holds its pages from now on; None when all have to wait."""
        mark = self.policy.low if self._closed else self.policy.high
        first = min(
            (t for name, t in self._tenants.items() if t.heap and not self._at_quota(name, t)),
            key=lambda t: (t.finish, t.heap[0]),
            default=None,
        )
        if first is None:
            return None
        ticket = first.heap[0]
        if self.held + ticket.pages > self.pages * mark:
            self._closed = self.held > self.pages * self.policy.low
            return None
        self._closed = False
        heapq.heappop(first.heap)
        self._virtual = first.finish
        first.finish += ticket.pages / self.policy.quota(ticket.tenant).weight
        first.held += ticket.pages
        self.held += ticket.pages
        self._waiting -= 1
        self._waiting_pages -= ticket.pages
        self._admitted[ticket.request_id] = (ticket.tenant, ticket.pages, self._clock())
        return ticket

    def _at_quota(self, name: str, tenant: _Tenant) -> bool:
        limit = self.policy.quota(name).max_pages
        return limit is not None and tenant.held + tenant.heap[0].pages > limit

    def expire(self) -> list[tuple[Ticket, OverloadedError]]:
        """Those that waited longer than `patience`, or could not meet their deadline any more: they are turned away."""
        now, out = self._clock(), list[tuple[Ticket, OverloadedError]]()
        for tenant in self._tenants.values():
            late = [t for t in tenant.heap if now - t.came > self.policy.patience or now + self._usual() > t.finish]
            if late:
                gone = {t.number for t in late}
                tenant.heap = [t for t in tenant.heap if t.number not in gone]
                heapq.heapify(tenant.heap)
                out += [(t, OverloadedError(t.request_id, f"waited {now - t.came:.2f} s", LATEST)) for t in late]
        self._waiting -= len(out)
        self._waiting_pages -= sum(ticket.pages for ticket, _ in out)
        after = self.retry_after()
        return [(ticket, OverloadedError(error.request_id, error.reason, after)) for ticket, error in out]

    def give_up(self, ticket: Ticket) -> bool:
        """Its owner does not want it any more; whether it still waited."""
        tenant = self._tenants[ticket.tenant]
        if ticket not in tenant.heap:
            return False
        tenant.heap.remove(ticket)
        heapq.heapify(tenant.heap)
        self._waiting -= 1
        self._waiting_pages -= ticket.pages
        return True

    # -- leaving -----------------------------------------------------------------------------------

    def left(self, request_id: str) -> None:
        """An admitted request is done and its pages are free; unknown ones are ignored."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is None:
            return
        name, pages, since = admitted
        now = self._clock()
        stayed = now - since
        self._spread += ((abs(stayed - self._service) if self._service else stayed / 2) - self._spread) * SMOOTHING
        self._service += (stayed - self._service) * (SMOOTHING if self._service else 1.0)
        if self._waiting and now > self._left_at:
            rate = pages / (now - self._left_at)
            self._freed += (rate - self._freed) * (SMOOTHING if self._freed else 1.0)
        self._left_at = now
        self._forget(name, pages)

    def returned(self, ticket: Ticket) -> None:
        """A replica had no room for it after all: it waits on, where it was."""
        self._admitted.pop(ticket.request_id)
        self._forget(ticket.tenant, ticket.pages)
        tenant = self._tenants.setdefault(ticket.tenant, _Tenant())
        tenant.finish -= ticket.pages / self.policy.quota(ticket.tenant).weight
        heapq.heappush(tenant.heap, ticket)
        self._waiting += 1
        self._waiting_pages += ticket.pages

    def _forget(self, name: str, pages: int) -> None:
        tenant = self._tenants[name]
        tenant.held -= pages
        self.held -= pages
        if not tenant.held and not tenant.heap and tenant.finish <= self._virtual:
            del self._tenants[name]

    # -- estimates ---------------------------------------------------------------------------------

    def _usual(self) -> float:
        """Seconds within which nearly all requests are done once they are admitted."""
        return self._service + SPREADS * self._spread

    def expected_wait(self, pages: int) -> float:
        """Seconds until a request that came now would be admitted, as things go; 0 while there is room."""
        ahead = self.held + self._waiting_pages + pages - self.pages * self.policy.high
        if ahead <= 0 and not self._waiting:
            return 0.0
        rate = self._freed or (self.held / self._service if self._service else 0.0)
        return max(0.0, ahead) / rate if rate else 0.0

    def retry_after(self) -> float:
        """Seconds after which it is worth to try again."""
        return min(LATEST, max(SOONEST, self.expected_wait(0)))

    def check_integrity(self) -> None:
        """AssertionError unless all counts are those of what they count."""
        assert self._waiting == sum(len(t.heap) for t in self._tenants.values())
        assert self._waiting_pages == sum(each.pages for t in self._tenants.values() for each in t.heap)
        assert self.held == sum(pages for _, pages, _ in self._admitted.values())
        assert self.held == sum(t.held for t in self._tenants.values()) <= self.pages * self.policy.high
        assert self._waiting <= self.policy.max_waiting + len(self._admitted)
