"""All that a driver says to its cluster: each call as a script of rounds, so that it can be waited for or awaited.

Here are its questions and its end; the other files have what places requests, what is about batches, and scaling.

A script sends a round of messages, one per replica, yields them, and is sent their answers; its result is the call's.
Several scripts may be under way at once. Which replicas run may change (rayk.manager.cluster_view): a script begins
with the latest deployment that an answer told of, and ends with it, so that what its result names can be called.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from rayk import protocol as m
from rayk.actors.channel import Answer, Traffic
from rayk.actors.deployment import Deployment
from rayk.actors.interface import Runtime
from rayk.context import TextContext
from rayk.errors import CallTimeoutError, RaykError, SchedulerLostError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.connector import TierCount
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.request import Usage
from rayk.kvcache.tick import HitCounts
from rayk.manager.batch_calls import BatchCalls
from rayk.manager.cluster_view import Script, current, result_of, wait_for
from rayk.manager.lease import Lease
from rayk.manager.scaling_calls import ScalingCalls

log = logging.getLogger("rayk.scheduler")

CLOSING_SECONDS = 5.0  # for which a scheduler may not answer a driver that leaves


class Calls(BatchCalls, ScalingCalls):
    """The calls of one driver on one running cluster. With a `name` that outlives this driver, so its claims have a
    lease.
    """

    def __init__(self, runtime: Runtime, cluster: Deployment, name: str | None = None) -> None:
        super().__init__(runtime, cluster)
        self._name = name
        self.lease = Lease(runtime, self.scheduler, self.client, name, cluster.started_here) if name else None
        self._lease_terms = (self.lease.seconds if self.lease is not None else None, cluster.started_here)

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
        with suppress(RaykError):  # a dead or silent scheduler cannot say which replicas were added or replaced
            wait_for(self.catch_up())
        self.close_sockets()
        self.cluster.stop(self._runtime)

    def leave(self) -> None:
        """Release what this driver has claimed; the cluster runs on."""
        self._end()
        with suppress(SchedulerLostError, CallTimeoutError):  # nothing is left to be released, or the lease ends
            self.scheduler.ask(m.Disconnect())
        self.close_sockets()

    def _end(self) -> None:
        self._starter.end()
        if self.lease is not None:
            self.lease.ended.set()
        self.scheduler.quiet = CLOSING_SECONDS

    # -- queries: those about every replica go to the scheduler, which asks them -------------------------

    @current
    def usage(self, replica: int) -> Script[Usage]:
        done: m.UsageDone = yield from self._ask(self.link(replica), m.GetUsage())
        return Usage(done.total, done.free, done.cached)

    @current
    def used_fraction_after(self, ctx: TextContext, replica: int) -> Script[float]:
        view = self._sender.view(ctx, whole=True)
        done: m.Fraction = yield from self._ask(self.link(replica), m.UsedFraction(view))
        return done.value

    @current
    def hit_counts(self, ctx: TextContext) -> Script[list[HitCounts]]:
        view = self._sender.view(ctx, whole=True)
        done: m.Counts = yield from self._ask(self.scheduler, m.HitCountsOf(view))
        if not done.host:
            return [HitCounts(pages) for pages in done.counts]
        return [HitCounts(*pages) for pages in zip(done.counts, done.host, done.disk, strict=True)]

    @current
    def metrics(self) -> Script[KVCacheMetrics]:
        done: m.MetricsDone = yield from self._ask(self.scheduler, m.EveryReplica(m.GetMetrics()))
        return done.metrics

    @current
    def reset_metrics(self) -> Script[None]:
        yield from self._ask(self.scheduler, m.EveryReplica(m.ResetMetrics()))

    @current
    def reset_prefix_cache(self, token: bytes | None) -> Script[dict[int, int]]:
        done: m.ResetDone = yield from self._ask(self.scheduler, m.EveryReplica(m.ResetPrefixCache(token)))
        return done.by_replica

    @current
    def tier_count(self, replica: int) -> Script[TierCount]:
        done: m.TiersDone = yield from self._ask(self.link(replica), m.GetTiers())
        return TierCount(done.host_total, done.host_used, done.disk_total, done.disk_used, done.trouble)

    @current
    def poll_transfers(self) -> Script[None]:
        yield from self._ask(self.scheduler, m.EveryReplica(m.PollTransfers()))

    @current
    def drain(self) -> Script[None]:
        yield from self._ask(self.scheduler, m.EveryReplica(m.Drain()))

    @current
    def check_integrity(self) -> Script[list[int]]:
        done: m.Unasked = yield from self._ask(self.scheduler, m.EveryReplica(m.CheckIntegrity()))
        return done.replicas

    def buffers(self, replica: int) -> list[torch.Tensor]:
        shards = ["meta"] * self._params.tensor_parallel_degree
        return PageBuffers(self._params, self.cluster.pages[replica], shards).all_buffers

    @current
    def read_pages(self, page_ids: Sequence[int], replica: int) -> Script[list[torch.Tensor]]:
        link = self.link(replica)
        if not page_ids:  # no bytes have no stride that another dtype could be read by
            return [torch.empty((0, *buffer.shape[1:]), dtype=buffer.dtype) for buffer in self.buffers(replica)]
        [reply] = yield [link.send(m.ReadPages(list(page_ids)), with_data=True)]
        result_of(reply)
        assert isinstance(reply, Answer)
        data = link.fetch(reply.data)
        return [
            torch.from_numpy(np.array(raw)).view(buffer.dtype).view(len(page_ids), *buffer.shape[1:])
            for raw, buffer in zip(data, self.buffers(replica), strict=True)
        ]

    # -- processes ---------------------------------------------------------------------------------

    def traffic(self) -> list[Traffic]:
        """What this driver has sent to each replica and to the scheduler, which comes last, and read from them."""
        return [link.traffic if link is not None else Traffic() for link in (*self._links, self.scheduler)]

    def node_names(self) -> list[str]:
        """The host name of each index' node, empty for a hole."""
        return [handle.plan.host_name if handle is not None else "" for handle in self.cluster.handles]

    def replica_pids(self) -> list[int]:
        """The process of each replica that runs, on its node."""
        return [facts.pid for facts in self.cluster.facts]

    def scheduler_pid(self) -> int:
        """The scheduler's process, on its node."""
        pid: int = self._runtime.get(self.scheduler.actor.call("pid", control=True), "the scheduler", 5)
        return pid
