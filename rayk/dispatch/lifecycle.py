"""The replicas of a Cluster as they come and go: each has a thread that reads its reports while it lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from rayk.dispatch.keeper import Keeper
from rayk.engine.replicas import Replicas
from rayk.errors import ClosedError, ReplicaLostError
from rayk.kvcache.page_hash import Mask
from rayk.kvcache.tick import PrefixCacheReset
from rayk.request_errors import RequestCancelledError
from rayk.scheduler.membership import State
from rayk.scheduler.scaling import Removed

if TYPE_CHECKING:
    from rayk.dispatch.dispatcher import Dispatcher
    from rayk.dispatch.named import NamedDispatcher

log = logging.getLogger("rayk.engine")

REPLACE_SECONDS = 5.0  # to wait for a place for a replacement at a time


class Lifecycle:
    """Safe to use from several threads: one replica joins or leaves at a time. Cluster documents what callers see."""

    def __init__(self, replicas: Replicas, dispatcher: Dispatcher | NamedDispatcher) -> None:
        self._replicas = replicas
        self._dispatcher = dispatcher
        self._changing = threading.Lock()
        self._failed: set[int] = set()  # replacements that could not be started the last time
        self.readers: dict[int, threading.Thread] = {}
        leaving = replicas.leaving if replicas.settings.replaced else None
        self._keeper = Keeper(dispatcher, self._start_due, leaving)

    def start(self) -> None:
        """Follow the replicas that live."""
        for replica in self._dispatcher.live:
            self._follow(replica)
        self._dispatcher.start(self._follow)
        self._keeper.start()

    def _follow(self, replica: int) -> None:
        """Read a replica's reports from now on, in a thread of its own."""
        name, era = f"rayk-reports-{replica}", self._dispatcher.era(replica)
        reader = threading.Thread(target=self._read, args=(replica, era), name=name, daemon=True)
        self.readers[replica] = reader
        reader.start()

    def _read(self, replica: int, era: Hashable) -> None:
        """Follow one replica's reports to their end."""
        reason = "its engine was stopped"
        try:
            for report in self._replicas.reports(replica):
                self._dispatcher.on_report(replica, report)
        except BaseException as error:  # whatever it was, nobody reads what comes from there any more
            reason = str(error) or type(error).__name__
        if self._dispatcher.closed or self.readers.get(replica) is not threading.current_thread():
            return  # or another has its place, and a reader of its own
        if self._dispatcher.states[replica] is State.removed:
            return
        try:
            self._replicas.drop(replica)
        except Exception as error:
            log.warning("replica %d is lost and could not be ended", replica, exc_info=error)
        finally:
            self._dispatcher.lose(replica, reason, era)
            self._keeper.wake()

    def add(self, n: int, timeout: float) -> list[int]:
        """Start `n` more; their indices."""
        with self._changing:
            self.check_open()
            added = self._dispatcher.enlist(n)
            self._start(added, timeout)
            return added

    def _start(self, replicas: Sequence[int], timeout: float) -> None:
        try:
            self._replicas.add(replicas, timeout)
        except BaseException as error:
            self._dispatcher.give_up(replicas, error)
            raise
        for at, replica in enumerate(replicas):
            facts = self._replicas.facts[replica]
            try:
                self._dispatcher.join(replica, facts.pages, facts.epoch, facts.endpoint)
            except BaseException:  # nobody else knows of them
                for unknown in replicas[at:]:
                    self._replicas.remove(unknown)
                raise
            self._follow(replica)

    def _start_due(self) -> None:
        """Start what is due in place of lost replicas, side by side; what failed so by itself the next time, so that it
        keeps no other away."""
        with self._changing:
            due = self._dispatcher.take_due()
            together = [replica for replica in due if replica not in self._failed]
            for replicas in [together, *([replica] for replica in due if replica in self._failed)]:
                try:
                    if replicas:
                        self._start(replicas, REPLACE_SECONDS)
                        self._failed.difference_update(replicas)
                        log.warning("replica(s) %s were lost and are replaced", replicas)
                except Exception as error:
                    self._failed.update(replicas)
                    if not self._dispatcher.closed:
                        log.warning("replica(s) %s were lost and cannot be replaced: %s", replicas, error)

    def drain(self, replica: int, hand_over: bool) -> None:
        """Give a replica no new requests; what it has ends there, or goes on elsewhere at once."""
        self._dispatcher.drain(replica)
        if hand_over:
            self._dispatcher.hand_over(replica)

    def remove(self, replica: int, hand_over: bool, timeout: float | None) -> Removed:
        """End a replica when its requests have ended or are elsewhere."""
        with self._changing:
            self.check_open()
            if self._dispatcher.check_removable(replica) is not State.lost:
                self.drain(replica, hand_over)
            removed = self._dispatcher.remove(replica, timeout)
            self.check_open()
            self._replicas.remove(replica)
            return removed

    def reset_prefix_cache(self) -> PrefixCacheReset:
        """Have all that live forget what is cached; none joins meanwhile."""
        with self._changing:
            self.check_open()
            token = Mask.new()
            self._dispatcher.note_reset(token)
            return PrefixCacheReset(self._replicas.reset_prefix_cache(self._dispatcher.live, token), hits=False)

    def check_integrity(self) -> None:
        """IntegrityError unless the pages of all that live are where they should be."""
        for replica in self._dispatcher.live:
            with suppress(ReplicaLostError):  # it has no pages
                self._replicas.check(replica)

    def check_open(self) -> None:
        """ClosedError after end()."""
        if self._dispatcher.closed:
            raise ClosedError("this Cluster")

    def end(self, end_replicas: Callable[[], None]) -> None:
        """Cancel what this driver has, and end the replicas as the caller does."""
        for handle in self._dispatcher.close():
            handle.end(RequestCancelledError(handle.id, len(handle.tokens)))
        self._keeper.stop()
        self._replicas.give_up()
        with self._changing:
            self._dispatcher.go()
            end_replicas()
        self._keeper.join()
        for reader in self.readers.values():
            if reader is not threading.current_thread():
                reader.join(timeout=10)
