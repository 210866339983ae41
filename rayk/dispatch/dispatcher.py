"""The requests of a Cluster that has one driver: their table and their scheduler, in one process and under one lock.

No threads and no transport: commands go out through `post`, reports come in by on_report().
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from time import monotonic

from rayk import protocol as m
from rayk.dispatch.output import Handle
from rayk.dispatch.requests import Requests
from rayk.errors import NoPlaceError, ReplicaStateError
from rayk.metrics.reading import Labels, Reading, Reporter
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.engine import Command
from rayk.scheduler.membership import Membership, State
from rayk.scheduler.readings import read_serving
from rayk.scheduler.router.router import Router, RouterSettings
from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.core import ServingCore
from rayk.scheduler.serving.removal import remove_when_empty
from rayk.scheduler.supervisor import Replacement
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Endpoint
from rayk.values import told


class Dispatcher(Requests):
    """Safe to use from several threads. `settings` are its router's; `post` and `max_retries` as for Requests. With
    `replace` lost replicas are wanted back."""

    def __init__(
        self,
        post: Callable[[int, Command], None],
        settings: RouterSettings,
        max_retries: int,
        clock: Callable[[], float] = monotonic,
        replace: bool = False,
    ) -> None:
        self._policy = settings.admission
        numbers = count(1)  # of tickets, and of queries to replicas
        self.core = core = ServingCore(
            post, settings, clock, self._keys_of, numbers, lambda: self._left.notify_all(), replace
        )
        here, hopeful = lambda: core.members.here, lambda: core.hopeful
        super().__init__(post, core, max_retries, clock, numbers, here, hopeful, self._transfers)
        self._left = threading.Condition(self._lock)  # a request left its replica
        self.reporter: Reporter | None = None
        """Of its metrics, on Ray."""

    @property
    def router(self) -> Router:
        """Which replica requests go to."""
        return self.core.router

    @property
    def members(self) -> Membership:
        """Which replicas there are."""
        return self.core.members

    def _transfers(self) -> PageTransfers:
        assert self.router.fetching is not None  # nobody else orders copies
        return self.router.fetching.transfers

    def _keys_of(self, ticket: int) -> Sequence[int]:
        """Keys of the pages of a prompt, made when its turn comes: thousands may wait."""
        handle, make = self._handles[ticket], self.router.keys
        return make.of(handle.prompt.tobytes(), (handle.cache_salt, None)) if make is not None else ()

    def start(self, follow: Callable[[int], None]) -> None:
        """Nothing is heard from elsewhere. `follow(replica)` has the reports of an engine read that is new here."""

    def close(self) -> list[Handle]:
        if self.reporter is not None:
            self.reporter.stop()
        with self._lock:
            left = super().close()
            self.core.close()
            self._left.notify_all()
        return left

    def era(self, replica: int) -> Hashable:
        """Whose reports are followed there; this driver never comes again."""
        return 0

    def lose(self, replica: int, reason: str, era: Hashable = 0) -> None:
        """A replica is gone: what it had goes on elsewhere, as often as was allowed."""
        with self._turn():
            if self.closed or replica not in self.members.known:
                return
            self.core.lose(replica, reason)
            self._lost(replica, reason)
            self.core.pump()
            self.core.disconnect()

    # -- replicas that come and go ---------------------------------------------------------------------

    @property
    def states(self) -> list[State]:
        """The state of each replica."""
        with self._lock:
            return self.members.states

    @property
    def live(self) -> list[int]:
        """Replicas that answer: ready and draining ones."""
        with self._lock:
            return list(self.members.here)

    @property
    def ready(self) -> list[int]:
        """Replicas that take requests."""
        with self._lock:
            return list(self.members.ready)

    def check_removable(self, replica: int) -> State:
        """Its state; the error of membership, or ReplicaStateError for the last one that takes requests."""
        with self._lock:
            self.members.check(replica)
            state = self.members.state(replica)
            if state is not State.lost and not set(self.members.ready) - {replica}:
                raise ReplicaStateError(replica, "the last one that takes requests", "be removed")
            return state

    def enlist(self, count: int) -> list[int]:
        """Indices for `count` replicas that are being started: those of lost ones, then new ones."""
        with self._lock:
            return self.core.enlist(count)

    def take_due(self) -> list[int]:
        """Indices of lost replicas at which others are to be started now, as after enlist()."""
        with self._lock:
            return self.core.take_due() if not self.closed else []

    def seconds(self) -> float | None:
        """Until take_due() has something; None when it will not, as far as it is known now."""
        with self._lock:
            return self.core.supervisor.seconds() if not self.closed else None

    def replacements(self) -> list[Replacement]:
        """What is done about lost replicas."""
        with self._lock:
            supervisor = self.core.supervisor
            return supervisor.replacements() if supervisor.replaces else []

    def give_up(self, replicas: Sequence[int], error: BaseException) -> None:
        """Those could not be started."""
        with self._turn():
            self.core.give_up(replicas, told(error), isinstance(error, NoPlaceError))

    def meet(self, replica: int, epoch: int, endpoint: Endpoint | None) -> None:
        """Pages can be copied to and from that replica."""
        with self._lock:
            self.core.meet(replica, epoch, endpoint)

    def join(self, replica: int, pages: int, epoch: int, endpoint: Endpoint | None) -> None:
        """A replica of enlist(), with so many pages, takes requests from now on; see meet()."""
        with self._turn():
            self.core.join(replica, pages, epoch, endpoint)

    def drain(self, replica: int, leaving: bool = True) -> None:
        """Give a replica nothing new; what it has goes on there. ReplicaStateError for a lost one. Without `leaving`
        another is to take its place."""
        with self._turn():
            self.core.drain(replica, leaving)

    def resume(self, replica: int) -> None:
        """Let a draining replica take requests again."""
        with self._turn():
            self.core.resume(replica)

    def check_live(self, replica: int) -> None:
        """Nothing, for a replica that answers: else the error of membership, or ReplicaLostError."""
        with self._lock:
            self.core.check_live(replica)

    def hand_over(self, replica: int) -> None:
        """Have a draining replica let go of all that it has; on_report() places it elsewhere."""
        with self._turn():
            self.core.hand_over(replica)

    def offer(self, replica: int) -> None:
        """Begin to offer what a draining replica has cached to those that take requests."""
        with self._turn():
            self.core.offer(replica)

    def remove(self, replica: int, timeout: float | None, offer_seconds: float | None = None) -> Removed:
        """Wait until nothing is on a draining or lost replica, offer others what it has cached, and forget it.

        DrainError when something is still there after `timeout` seconds: it drains on. What was not taken after
        `offer_seconds` (OFFER_SECONDS when None) goes with it.
        """
        with self._turn():
            removed = remove_when_empty(self.core, self._left, lambda: self.closed, replica, timeout, offer_seconds)
            self._scripts.lose(replica)
            return removed

    def note_reset(self, token: bytes) -> None:
        """Nothing: who adds replicas knows of it."""

    # -- questions -------------------------------------------------------------------------------------

    def explain(self, request_id: str) -> m.Explained:
        """Why a request went where it went; ConfigError when no decision for it is remembered."""
        with self._lock:
            return self.core.explain(request_id)

    def readings(self, labels: Labels) -> list[Reading]:
        """Metrics of the scheduler."""
        with self._lock:
            return list(read_serving(self.core, 1, labels))

    @property
    def admission(self) -> AdmissionPolicy | None:
        """By what requests wait."""
        return self._policy

    def check_owned(self) -> None:
        """Nothing: there is one driver."""

    def go(self) -> None:
        """Nobody has to be told."""

    def admission_state(self) -> AdmissionState | None:
        """A snapshot of the queue, if there is an admission policy."""
        with self._lock:
            return self.core.admission_state()
