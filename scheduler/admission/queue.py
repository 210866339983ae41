"""Who waits, who goes first and who is turned away when a cluster has more to do than it can: a queue without a clock.

A request that finds no room waits. The queue is bounded, and so is the wait: what could not meet its deadline any more
is refused at once with OverloadedError, which says when to try again. There is one queue for all drivers of a cluster,
where they meet (rayk.scheduler.admission.controller); who has room is said by whoever asks.

Whether a deadline can be met is known from those that left (rayk.scheduler.admission.service_time): how long one stays
that may generate so many tokens. So a short request may wait longer than a long one; but not where its tenant has a
queue, or short ones would keep that so long that no long one could ever join it.

Order. Tenants take turns by weight (start-time fair queueing over pages). Of one tenant the request that is due
first goes first; it is due at its deadline, or `patience` seconds after it came if it has none, and `boost` seconds
earlier for each step of priority. What is first is waited for until it fits: nothing small overtakes it.

So nobody starves:

* Nobody waits longer than `patience`, nor than its deadline: it is let in or told to try again.
* Of its own tenant a request is overtaken only by such that came less than patience + boost x (their priority less its
  own) seconds after it.
* Tenants that wait get pages in the ratio of their weights, up to one largest request of each: while a request of
  tenant i waits, tenant j gets at most (weight of j / weight of i) x (pages that i gets meanwhile + i's largest
  request) + j's largest request.
* A full queue turns away the tenant that fills it: one with a smaller part, by weight, gets a place, and the last of
  the largest part loses its own.
* A tenant at its quota waits for its own requests to leave, and for nobody else's.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp
from typing import Any

from rayk.errors import OverloadedError
from rayk.protocol.admission import AdmissionPolicy, AdmissionState, TenantQuota, TenantState
from rayk.scheduler.admission.service_time import ServiceTimeEstimator

MEMORY = 5.0  # seconds of a full cluster that its pace is reckoned over
SOONEST, LATEST = 0.05, 60.0  # bounds of a retry_after, seconds
LARGE = 1 << 62
QUEUE = 3  # requests of its tenant that make a newcomer wait no longer than a long one could
TENANTS_COUNTED = 1024  # beyond that the one that was heard of longest ago is counted no more


@dataclass(order=True)
class QueueEntry:
    """A request that waits; ordered by when it is due. `pages` it will hold, `finish` when it has to be done."""

    due: float
    number: int
    request_id: str = field(compare=False)
    tenant: str = field(compare=False)
    pages: int = field(compare=False)
    came: float = field(compare=False)
    finish: float = field(compare=False)
    payload: Any = field(compare=False, default=None)
    output: int = field(compare=False, default=0)  # tokens that it may generate
    trial: bool = field(compare=False, default=False)  # let in to see how things go, whatever was usual


class _Tenant:
    __slots__ = ("finish", "heap", "held", "pages")

    def __init__(self) -> None:
        self.heap: list[QueueEntry] = []
        self.pages = 0  # of those in the heap
        self.held = 0
        self.finish = 0.0  # virtual time at which its last request was paid for


class _Count:
    __slots__ = ("admitted", "longest", "refused")

    def __init__(self) -> None:
        self.admitted = self.refused = 0
        self.longest = 0.0


class _Pace:
    """Pages a second that leave while the cluster is full: what the last few such seconds say."""

    def __init__(self) -> None:
        self._pages = self._seconds = self._since = 0.0
        self._full = False

    def full(self, full: bool, now: float) -> None:
        """From now on somebody waits for room, or nobody does."""
        if self._full:
            self._pass(now)
        self._full, self._since = full, now

    def freed(self, pages: int, now: float) -> None:
        """So many pages were given back."""
        if self._full:
            self._pass(now)
            self._pages += pages

    def _pass(self, now: float) -> None:
        keep = exp(-(now - self._since) / MEMORY)
        self._pages, self._seconds = self._pages * keep, self._seconds * keep + now - self._since
        self._since = now

    def rate(self, guess: float) -> float:
        """Pages a second; `guess` (0: none) counts as much as one second that was seen."""
        if guess:
            return (self._pages + guess) / (self._seconds + 1.0)
        return self._pages / self._seconds if self._seconds > 0.25 else 0.0


class AdmissionQueue:
    """Requests that wait and what the admitted ones hold, in pages as their tokens fill them; `clock` in seconds."""

    def __init__(self, policy: AdmissionPolicy, clock: Callable[[], float]) -> None:
        self.policy = policy
        self.held = 0
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._admitted: dict[str, tuple[QueueEntry, float, int]] = {}  # id -> which, when, and what was held then
        self._turned_away: list[tuple[QueueEntry, OverloadedError]] = []
        self._numbers = itertools.count()
        self._waiting = self._waiting_pages = 0
        self._virtual = 0.0
        self.stay = ServiceTimeEstimator()
        self._entered_at = clock()  # the last one
        self._pace = _Pace()
        self._counts: OrderedDict[str, _Count] = OrderedDict()

    def __len__(self) -> int:
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return self._waiting >= self.policy.max_waiting

    # -- waiting -----------------------------------------------------------------------------------

    def offer(
        self,
        request_id: str,
        pages: int,
        tenant: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        payload: Any = None,
        *,
        most: int,
        room: bool = False,
        output: int = 0,
    ) -> QueueEntry:
        """A request wants to be admitted, and to be done `deadline` seconds from now. OverloadedError turns it away.

        `most`: pages that a replica may ever give to one; `room`: whether one would take this request now.
        `output`: tokens that it may generate at most.
        """
        now, name, policy = self._clock(), tenant or "", self.policy
        quota = policy.quota(name)
        if pages > most or (quota.max_pages is not None and pages > quota.max_pages):
            raise self._refusal(request_id, name, f"it needs {pages} pages, more than it may ever have", LATEST)
        finish = now + (deadline if deadline is not None else float("inf"))
        due = min(now + policy.patience, finish) - priority * policy.boost
        trial = self._should_try(now)
        self.stay.came(output)
        if deadline is not None and not trial:
            wait = 0.0 if room and not self._waiting else self.expected_wait(pages, name, due)
            mine = self._tenants.get(name)
            size = max(output, self.stay.long) if mine is not None and len(mine.heap) >= QUEUE else output
            late = wait + self.stay.within(self.held + pages if room else LARGE, size) - deadline
            if late > 0:
                why = f"it would take {late + deadline:.2f} s and its deadline is {deadline:.2f} s"
                raise self._refusal(request_id, name, why, late)
        if self.full and not (room and not self._waiting) and not self._push_out(name, quota):
            raise self._refusal(request_id, name, f"{self._waiting} requests wait already", self.retry_after())
        ticket = QueueEntry(due, next(self._numbers), request_id, name, pages, now, finish, payload, output, trial)
        self._put(ticket)
        return ticket

    def _should_try(self, now: float) -> bool:
        """Whether a request is let in to see how things go: nobody is there, or nobody came for as long as one stays.
        What was usual when all was full must not keep everybody out for ever."""
        return not self._admitted or (not self._waiting and now - self._entered_at > self.stay.usual > 0)

    def _refusal(self, request_id: str, tenant: str, reason: str, after: float) -> OverloadedError:
        self._count(tenant).refused += 1
        return OverloadedError(request_id, reason, min(LATEST, max(SOONEST, after)))

    def _push_out(self, name: str, quota: TenantQuota) -> bool:
        """Make place in a full queue for a tenant with a smaller part than the largest; whether there is one now."""
        mine = self._tenants.get(name)
        part = ((len(mine.heap) if mine is not None else 0) + 1) / quota.weight
        waiting = [(n, t) for n, t in self._tenants.items() if t.heap]
        if not waiting:
            return False
        largest, tenant = max(waiting, key=lambda each: len(each[1].heap) / self.policy.quota(each[0]).weight)
        if len(tenant.heap) / self.policy.quota(largest).weight <= part:
            return False
        last = max(tenant.heap)
        self.give_up(last)
        why = f"{self.policy.max_waiting} requests wait, and its tenant has most of them"
        self._turned_away.append((last, self._refusal(last.request_id, largest, why, self.retry_after())))
        return True

    def _put(self, ticket: QueueEntry) -> None:
        if ticket.tenant not in self._tenants and len(self._tenants) > 2 * TENANTS_COUNTED:
            self._tenants = {name: t for name, t in self._tenants.items() if t.heap or t.held}
        tenant = self._tenants.setdefault(ticket.tenant, _Tenant())
        if not tenant.heap:  # nobody saves up turns while it has nothing to do
            tenant.finish = max(tenant.finish, self._virtual)
        heapq.heappush(tenant.heap, ticket)
        tenant.pages += ticket.pages
        self._waiting += 1
        self._waiting_pages += ticket.pages

    def _unput(self, ticket: QueueEntry) -> None:
        self._tenants[ticket.tenant].pages -= ticket.pages
        self._waiting -= 1
        self._waiting_pages -= ticket.pages

    def take(self, fits: Callable[[int], bool]) -> QueueEntry | None:
        """The next request to be admitted, which holds its pages from now on; None when all have to wait. `fits` says
        whether there is room for a request of so many pages."""
        now, first = self._clock(), self._first()
        if first is None or not fits(first.heap[0].pages):
            self._pace.full(first is not None, now)
            return None
        ticket = heapq.heappop(first.heap)
        self._unput(ticket)
        self._virtual = first.finish
        first.finish += ticket.pages / self.policy.quota(ticket.tenant).weight
        first.held += ticket.pages
        self.held += ticket.pages
        self._admitted[ticket.request_id] = (ticket, now, self.held)
        self._entered_at = now
        count = self._count(ticket.tenant)
        count.admitted += 1
        count.longest = max(count.longest, now - ticket.came)
        return ticket

    def adopt(self, request_id: str, pages: int, tenant: str | None, output: int) -> None:
        """A request that another queue let in holds its pages here from now on; what its deadline was is not known."""
        now, name = self._clock(), tenant or ""
        entry = QueueEntry(now, next(self._numbers), request_id, name, pages, now, float("inf"), None, output)
        self._tenants.setdefault(name, _Tenant()).held += pages
        self.held += pages
        self._admitted[request_id] = (entry, now, self.held)

    def _first(self) -> _Tenant | None:
        """The tenant whose turn it is."""
        first: _Tenant | None = None
        for name, tenant in self._tenants.items():
            if not tenant.heap:
                continue
            limit = self.policy.quota(name).max_pages
            if limit is not None and tenant.held + tenant.heap[0].pages > limit:
                tenant.finish = max(tenant.finish, self._virtual)  # it saves up no turns either
            elif first is None or (tenant.finish, tenant.heap[0]) < (first.finish, first.heap[0]):
                first = tenant
        return first

    def expire(self) -> list[tuple[QueueEntry, OverloadedError]]:
        """Those that are turned away: they waited longer than `patience`, could not meet their deadline any more, or
        lost their place."""
        now, policy = self._clock(), self.policy
        for name, tenant in list(self._tenants.items()):
            late = [
                t
                for t in tenant.heap
                if now - t.came > policy.patience
                or now + (0.0 if t.trial else self.stay.within(self.held, t.output)) > t.finish
            ]
            if not late:
                continue
            gone = {t.number for t in late}
            tenant.heap = [t for t in tenant.heap if t.number not in gone]
            heapq.heapify(tenant.heap)
            for ticket in late:
                self._unput(ticket)
            after = self.retry_after()
            for ticket in late:
                why = f"it waited {now - ticket.came:.2f} s"
                self._turned_away.append((ticket, self._refusal(ticket.request_id, name, why, after)))
            self._tidy(name)
        out, self._turned_away = self._turned_away, []
        return out

    def give_up(self, ticket: QueueEntry) -> bool:
        """Its owner does not want it any more; whether it still waited."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None or not any(each is ticket for each in tenant.heap):
            return False
        tenant.heap = [each for each in tenant.heap if each is not ticket]
        heapq.heapify(tenant.heap)
        self._unput(ticket)
        self._tidy(ticket.tenant)
        return True

    # -- leaving -----------------------------------------------------------------------------------

    def left(self, request_id: str) -> None:
        """An admitted request is done and its pages are free; unknown ones are ignored."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is None:
            return
        ticket, since, crowd = admitted
        now = self._clock()
        self.stay.left(now - since, crowd, ticket.output)
        if ticket.finish < float("inf") and not ticket.trial:
            self.stay.judge(now > ticket.finish)
        self._pace.freed(ticket.pages, now)
        self._drop(ticket)

    def returned(self, ticket: QueueEntry) -> bool:
        """A replica had no room for it after all: it waits on, where it was; unless it left in between."""
        if self._admitted.get(ticket.request_id, (None,))[0] is not ticket:
            return False
        del self._admitted[ticket.request_id]
        self._count(ticket.tenant).admitted -= 1
        tenant = self._tenants[ticket.tenant]
        tenant.finish -= ticket.pages / self.policy.quota(ticket.tenant).weight
        heapq.heappush(tenant.heap, ticket)
        tenant.pages += ticket.pages
        self._waiting += 1
        self._waiting_pages += ticket.pages
        self._drop(ticket)
        return True

    def forget(self, request_id: str) -> None:
        """It was let in and came to nothing, which says nothing about how long requests stay; unknown ones are
        ignored."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is not None:
            self._drop(admitted[0])

    def _drop(self, ticket: QueueEntry) -> None:
        self._tenants[ticket.tenant].held -= ticket.pages
        self.held -= ticket.pages
        self._tidy(ticket.tenant)

    def _tidy(self, name: str) -> None:
        tenant = self._tenants[name]
        if not tenant.held and not tenant.heap and tenant.finish <= self._virtual:
            del self._tenants[name]

    # -- estimates ---------------------------------------------------------------------------------

    def expected_wait(self, pages: int, tenant: str | None = None, due: float = float("inf")) -> float:
        """Seconds until such a request that came now and finds no room would be admitted, as things go: behind those of
        its own tenant that are due before, and what other tenants get until it is its turn. Without a tenant, behind
        all that wait."""
        rate = self._pace.rate(self.held / self.stay.usual if self.stay.usual else 0.0)
        if not rate:
            return 0.0
        if tenant is None:
            return (self._waiting_pages + pages) / rate
        mine, quota = self._tenants.get(tenant) or _Tenant(), self.policy.quota(tenant)
        before = sum(t.pages for t in mine.heap if t.due <= due)
        start = max(mine.finish, self._virtual) + before / quota.weight
        for name, other in self._tenants.items():
            if other.heap and name != tenant:
                theirs = (start - other.finish) * self.policy.quota(name).weight
                before += min(other.pages, max(0, int(theirs)))
        wait = (before + pages) / rate
        if quota.max_pages is not None and self.stay.usual:
            over = mine.pages + pages + mine.held - quota.max_pages
            wait = max(wait, over / quota.max_pages * self.stay.usual)
        return wait

    def retry_after(self) -> float:
        """Seconds after which it is worth to try again."""
        return min(LATEST, max(SOONEST, self.expected_wait(0)))

    # -- for readers -------------------------------------------------------------------------------

    def _count(self, tenant: str) -> _Count:
        count = self._counts.get(tenant)
        if count is None:
            count = self._counts[tenant] = _Count()
            if len(self._counts) > TENANTS_COUNTED:
                self._counts.popitem(last=False)
        self._counts.move_to_end(tenant)
        return count

    def state(self) -> AdmissionState:
        """A snapshot."""
        tenants: dict[str, TenantState] = {}
        for name in {**self._counts, **self._tenants}:
            tenant, count = self._tenants.get(name) or _Tenant(), self._counts.get(name) or _Count()
            tenants[name] = TenantState(len(tenant.heap), tenant.held, count.admitted, count.refused, count.longest)
        admitted, refused = (sum(getattr(c, what) for c in self._counts.values()) for what in ("admitted", "refused"))
        return AdmissionState(
            self._waiting,
            self._waiting_pages,
            self.held,
            admitted,
            refused,
            self.stay.within(self.held),
            self.retry_after(),
            tenants,
        )

    def check_integrity(self) -> None:
        """AssertionError unless all counts are those of what they count."""
        assert self._waiting == sum(len(t.heap) for t in self._tenants.values())
        assert self._waiting_pages == sum(each.pages for t in self._tenants.values() for each in t.heap)
        assert all(t.pages == sum(each.pages for each in t.heap) for t in self._tenants.values())
        assert self.held == sum(ticket.pages for ticket, _, _ in self._admitted.values())
        assert self.held == sum(t.held for t in self._tenants.values())
        assert self._waiting <= self.policy.max_waiting + len(self._admitted) + 1
