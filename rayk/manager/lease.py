"""The lease of a driver on a named cluster: its claims there last as long as a thread renews it."""

from __future__ import annotations

import logging
from threading import Event, Thread

from rayk import protocol as m
from rayk.actors.channel import ActorChannel
from rayk.actors.interface import ActorGoneError, Runtime
from rayk.errors import NotOwnerError, RaykError

log = logging.getLogger("rayk.scheduler")

OWNER_SECONDS = 5.0
LEASE_SECONDS = 15.0  # a driver of a named session that is silent this long has its requests released


class Lease:
    """Connects `client` to the cluster of that name; `owner` started the cluster, and may shut it down."""

    def __init__(self, runtime: Runtime, scheduler: ActorChannel, client: str, name: str, owner: bool) -> None:
        self._runtime = runtime
        self._scheduler = scheduler.actor
        self._client = client
        self._name = name
        self._owner = owner
        self.ended = Event()
        self.seconds = LEASE_SECONDS
        scheduler.ask(m.Connect(self.seconds, owner))
        Thread(target=self._renew, name="rayk-lease", daemon=True).start()

    def _renew(self) -> None:
        had = True
        while not self.ended.wait(self.seconds / 3):
            try:
                has = self._runtime.get(self._scheduler.call("renew", self._client, control=True), "the scheduler", 5)
                if had and not has:
                    log.warning("this driver was silent for longer than its lease: what it had claimed is released")
                had = has
            except (RaykError, ActorGoneError):
                continue  # the next call of the driver will say so

    def check_owned(self) -> None:
        """NotOwnerError when another driver started the cluster and still uses it."""
        if self._owner:
            return
        try:
            owner = self._runtime.get(self._scheduler.call("owner", control=True), "the scheduler", OWNER_SECONDS)
        except ActorGoneError:
            return  # without a scheduler the cluster is of no use to any driver
        if owner:
            raise NotOwnerError(self._name, owner)
