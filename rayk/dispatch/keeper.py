"""Who acts for a Cluster's supervisor: a thread that starts replacements when they are due, and moves requests off
replicas whose nodes are about to go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread, current_thread
from typing import TYPE_CHECKING

from rayk.errors import RaykError

if TYPE_CHECKING:
    from rayk.dispatch.dispatcher import Dispatcher
    from rayk.dispatch.named import NamedDispatcher

log = logging.getLogger("rayk.engine")

LOOK_SECONDS = 1.0  # between two looks at which nodes go


class Keeper:
    """`start_due` starts what is due, and raises nothing. `leaving` says which replicas' nodes are about to go; None
    where nobody is to act."""

    def __init__(
        self,
        dispatcher: Dispatcher | NamedDispatcher,
        start_due: Callable[[], None],
        leaving: Callable[[], list[int]] | None,
    ) -> None:
        self._dispatcher = dispatcher
        self._start_due = start_due
        self._leaving = leaving
        self._told: set[int] = set()  # replicas that were drained since their nodes go
        self._changed = Event()
        self._stopped = False
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin, if there is anything to do."""
        if self._leaving is not None:
            self._thread = Thread(target=self._run, name="rayk-keeper", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """A replica was lost."""
        self._changed.set()

    def stop(self) -> None:
        """Start nothing any more; what is being started is not waited for."""
        self._stopped = True
        self._changed.set()

    def join(self) -> None:
        """Wait for its thread, after stop()."""
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopped:
            wait = self._dispatcher.seconds()
            if wait == 0.0:
                self._start_due()
                continue
            self._changed.wait(LOOK_SECONDS if wait is None else min(wait, LOOK_SECONDS))
            self._changed.clear()
            try:
                self._move_off()
            except Exception:  # Ray is asked by a private name: without an answer nobody is moved
                if self._stopped:
                    return
                log.exception("it cannot be told which nodes go")
                self._leaving = lambda: []

    def _move_off(self) -> None:
        """Have what runs on nodes that go run elsewhere, and others started in their place."""
        assert self._leaving is not None
        leaving = set(self._leaving())
        for replica in leaving - self._told:
            with suppress(RaykError):  # it is lost, or drains already
                self._dispatcher.drain(replica, leaving=False)
        self._told = leaving
        for replica in leaving if self._dispatcher.ready else ():
            self._dispatcher.hand_over(replica)
