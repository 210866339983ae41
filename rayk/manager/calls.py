"""All that a driver says to its cluster: each call as a script of rounds, so that it can be waited for or awaited.

A script sends a round of messages, one per replica, yields them, and is sent their answers; its result is the call's.
Several scripts may be under way at once. Which replicas run may change (rayk.manager.cluster_view): a script begins
with the latest deployment that an answer told of, and ends with it, so that what its result names can be called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from rayk import protocol as m
from rayk.actors.interface import Runtime
from rayk.actors.launch import Deployment
from rayk.context import TextContext
from rayk.errors import CallTimeoutError, RaykError, SchedulerLostError
from rayk.manager.batch_calls import BatchCalls
from rayk.manager.cluster_view import wait_for
from rayk.manager.lease import Lease
from rayk.manager.query_calls import QueryCalls
from rayk.manager.scaling_calls import ScalingCalls

log = logging.getLogger("rayk.scheduler")

CLOSING_SECONDS = 5.0  # for which a scheduler may not answer a driver that leaves


class Calls(BatchCalls, QueryCalls, ScalingCalls):
    """The calls of one driver on one running cluster. With a `name` that outlives this driver, so its claims have a
    lease.

    `fast_lane`: ticks go by lanes (rayk.actors.lane), unless the cluster has a name: a replica has one lane, not one
    for each driver, and it would stay when its driver is killed.
    """

    def __init__(self, runtime: Runtime, cluster: Deployment, name: str | None = None, fast_lane: bool = False) -> None:
        super().__init__(runtime, cluster)
        self._name = name
        if fast_lane and name is not None:
            log.warning("no fast lanes to replicas of a named session, which several drivers share: %r has calls", name)
            self.have_no_lanes("a named session, whose drivers share its replicas")
        elif fast_lane:
            self.lay_lanes()
        self.lease = Lease(runtime, self.scheduler, self.client, name, cluster.started_here) if name else None

    def _allocator(self, replica: int) -> Callable[[TextContext], object]:
        return lambda ctx: wait_for(self.alloc(ctx, replica))

    def look(self) -> None:
        """Take note of replicas that other drivers added and removed."""
        if self._name is not None:
            wait_for(self.catch_up())

    def check_owned(self) -> None:
        """NotOwnerError when another driver started the cluster and still uses it."""
        if self.lease is not None:
            self.lease.check_owned()

    def close(self) -> None:
        """Stop the cluster."""
        self._end()
        with suppress(RaykError):  # a dead or silent scheduler cannot say which replicas were added
            self.look()
        self.have_no_lanes("shut down")
        self.cluster.stop(self._runtime)

    def leave(self) -> None:
        """Release what this driver has claimed; the cluster runs on."""
        self._end()
        with suppress(SchedulerLostError, CallTimeoutError):  # nothing is left to be released, or the lease ends
            self.scheduler.ask(m.Disconnect())

    def _end(self) -> None:
        if self.lease is not None:
            self.lease.ended.set()
        self.scheduler.quiet = CLOSING_SECONDS
